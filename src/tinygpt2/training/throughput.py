"""How fast a run is and what it takes: steps, tokens, memory, and the share of the device's peak."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from tinygpt2.training.state import RunState


class Meter:
    """Times a run, the time before a resume included.

    Args:
        state: where the run begins.
        step_tokens: in the global batch.
        bound: tokens per second at the peak of all devices, where that is known.
    """

    def __init__(self, state: RunState, step_tokens: int, bound: float | None) -> None:
        self._start = self._mark = time.perf_counter()
        self._step, self._before, self._step_tokens, self._bound = state.step, state.seconds, step_tokens, bound

    def seconds(self) -> float:
        """Return the seconds since the run's first step."""
        return self._before + time.perf_counter() - self._start

    def lap(self, step: int) -> dict[str, float]:
        """Return tokens per second since the last lap, and MFU (model FLOPs utilisation) where a peak is known."""
        now = time.perf_counter()
        speed = (step - self._step) / (now - self._mark) * self._step_tokens
        self._mark, self._step = now, step
        return {"tokens_per_second": speed, **({"mfu": speed / self._bound} if self._bound else {})}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out of the current lap."""
        before = time.perf_counter()
        yield
        self._mark += time.perf_counter() - before

    def note(self, terms: dict[str, float], speed: dict[str, float], left: int = 0) -> str:
        """Say for people how it goes; `left` is the number of steps to come, where that is worth saying."""
        parts = [f"{name.removeprefix('loss/')} {value:.4g}" for name, value in terms.items()]
        shown = parts[:1] + ([f"({', '.join(parts[1:])})"] if parts[2:] else [])
        rate = speed["tokens_per_second"]
        shown += [f" {rate:,.0f} tokens/s", f" {memory_in_use() / 1e9:.2f} GB"]
        shown += [f" mfu {speed['mfu']:.0%}"] if "mfu" in speed else []
        shown += [f" eta {left * self._step_tokens / rate:.0f} s"] if left else []
        return " ".join(shown)


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
