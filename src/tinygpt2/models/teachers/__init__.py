"""Teachers of any architecture: their hidden states, their logits, and how they read a student's tokens."""
