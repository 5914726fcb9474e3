"""Batches of blocks."""
