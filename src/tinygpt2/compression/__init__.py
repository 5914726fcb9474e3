"""Cutting a student out of a teacher."""
