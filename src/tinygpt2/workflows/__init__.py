"""Commands that train or open several things in a row."""
