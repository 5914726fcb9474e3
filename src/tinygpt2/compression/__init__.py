"""Cut a student out of a teacher."""
