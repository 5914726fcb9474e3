"""Read documents from files, directories and datasets."""
