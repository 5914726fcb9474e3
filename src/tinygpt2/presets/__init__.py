"""Shapes of models, one YAML file each."""
