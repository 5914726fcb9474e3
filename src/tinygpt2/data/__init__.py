"""From texts to blocks of tokens, and back into training."""
