"""Commands that combine other parts: training, planning within a time, quickstart and verification."""
