"""Memory: what is free, what this process holds."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch


def available_memory() -> int:
    """Return the bytes of memory that this process may still take: of the machine, or of its container if fewer."""
    free = int(psutil.virtual_memory().available)
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such limit on this system
        pass
    return max(free, 0)


def memory_in_use() -> int:
    """Return the bytes that this process holds: of the GPU where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_reserved())
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Return the most bytes that this process has held so far: of the GPU where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
