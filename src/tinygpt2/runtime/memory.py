"""The memory that is free, and the memory that this process uses."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

from tinygpt2.runtime.devices import on_cuda


def available_memory() -> int:
    """Return the bytes of memory that are still free: in the machine, or in its container if that has fewer."""
    free = int(psutil.virtual_memory().available)
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = int(parts.get("inactive_file", 0)) + int(parts.get("active_file", 0))  # given back when needed
            free = min(free, int(limit) - int((group / "memory.current").read_text()) + files)
    except (OSError, ValueError):  # this system does not have such a limit
        pass
    return max(free, 0)


def free_memory(processes: int = 1) -> int:
    """Return the bytes that this process may still take: of its CUDA GPU, else its share of the machine's memory.

    Args:
        processes: on this machine. They share its memory, but each has a GPU.
    """
    if on_cuda():
        return int(torch.cuda.mem_get_info()[0])
    return available_memory() // processes


def memory_in_use() -> int:
    """Return the bytes that this process uses: on a CUDA GPU those that torch has reserved, else in main memory."""
    if on_cuda():
        return int(torch.cuda.memory_reserved())
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Return the most bytes that this process has used so far, counted as `memory_in_use` counts them."""
    if on_cuda():
        return int(torch.cuda.max_memory_reserved())
    try:
        import resource
    except ImportError:  # on Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset"))  # noqa: B009  (other systems lack it)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
