"""Cuts to a target: which student of a given size is the best one."""
