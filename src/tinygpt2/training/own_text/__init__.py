"""Text that is sampled while a student learns."""
