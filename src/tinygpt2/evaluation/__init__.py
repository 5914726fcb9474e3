"""Perplexity of models on texts."""
