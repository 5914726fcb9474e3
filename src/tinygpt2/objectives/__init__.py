"""The objectives: losses that compare a student with its teacher or with the data."""
