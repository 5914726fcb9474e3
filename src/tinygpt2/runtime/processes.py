"""Which of several processes this one is."""

from __future__ import annotations

import os


def launched() -> bool:
    """Say whether this process is one of several that somebody started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Return this process's number among all."""
    return int(os.environ.get("RANK", "0")) if launched() else 0
