"""Processes, devices, memory and signals of this machine."""
