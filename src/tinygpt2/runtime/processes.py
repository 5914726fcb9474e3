"""The place of this process among several that a launcher started."""

from __future__ import annotations

import os


def launched() -> bool:
    """Return whether this process is one of several that a launcher started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Return this process's number, or 0 if it is the only one."""
    return int(os.environ.get("RANK", "0")) if launched() else 0
