"""A GPU that is not there: whole steps on fake tensors of device type "cuda"."""
