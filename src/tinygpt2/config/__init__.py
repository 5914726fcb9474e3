"""One typed configuration for each command. An option is declared once, here."""
