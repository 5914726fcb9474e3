"""Recipes of distillation, one YAML file each."""
