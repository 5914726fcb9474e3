"""Teacher and student that read the same text in different tokens."""
