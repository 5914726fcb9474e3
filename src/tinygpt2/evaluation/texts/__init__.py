"""Texts that models write, judged."""
