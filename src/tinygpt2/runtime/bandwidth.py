"""How fast a device reads its memory."""

from __future__ import annotations

import time

import torch

from tinygpt2.runtime.devices import current_device
from tinygpt2.utils.progress import detail

_BYTES = 2**28  # several times as much as the last-level cache of a CPU or a GPU
_READS = 5


def memory_bandwidth() -> float:
    """Measure how many bytes a second the current device reads, with all of its threads.

    A float32 tensor of 256 MiB is summed five times, and the fastest time counts.
    """
    numbers = torch.ones(_BYTES // 4, device=current_device())
    seconds = []
    for _ in range(_READS):
        started = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - started)
    rate = _BYTES / min(seconds)
    detail(f"memory bandwidth: {rate / 1e9:.1f} GB/s, the fastest of {_READS} sums of {_BYTES >> 20} MiB")
    return rate
