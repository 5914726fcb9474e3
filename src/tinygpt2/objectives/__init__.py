"""What a student learns to match."""
