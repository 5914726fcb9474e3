"""What commands print: results as tables, text and JSON, for people and for programs."""
