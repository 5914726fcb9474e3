"""Helpers that all other modules use: files, figures, progress reports, and access to the Hub."""
