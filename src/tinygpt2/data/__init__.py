"""Turn texts into datasets of token blocks, and read these blocks for training."""
