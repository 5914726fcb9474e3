"""Models as files for other engines, and what the engines make of them."""
