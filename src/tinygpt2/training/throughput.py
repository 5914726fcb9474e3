"""The speed of a run (tokens per second, share of the device's peak), and the operations of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import GPT2Config

from tinygpt2.objectives.combined import LossWeights
from tinygpt2.runtime.memory import memory_in_use
from tinygpt2.training.state import RunState


class ThroughputMeter:
    """Measures the time and the speed of a run. The time includes that before a resume.

    Args:
        state: the state in which the run starts or continues.
        step_tokens: the number of tokens in a global batch.
        bound: tokens per second at the peak rate of all devices, or None if it is not known.
    """

    def __init__(self, state: RunState, step_tokens: int, bound: float | None) -> None:
        self._start = self._mark = time.perf_counter()
        self._step, self._before, self._step_tokens, self._bound = state.step, state.seconds, step_tokens, bound

    def seconds(self) -> float:
        """Return the seconds since the run's first step."""
        return self._before + time.perf_counter() - self._start

    def lap(self, step: int) -> dict[str, float]:
        """Return tokens per second since the last lap, and MFU (model FLOPs utilisation) if the peak is known."""
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
        """Return a line for the user with losses, speed and memory; with `left` steps, also the remaining time."""
        parts = [f"{name.removeprefix('loss/')} {value:.4g}" for name, value in terms.items()]
        shown = parts[:1] + ([f"({', '.join(parts[1:])})"] if parts[2:] else [])
        rate = speed["tokens_per_second"]
        shown += [f" {rate:,.0f} tokens/s", f" {memory_in_use() / 1e9:.2f} GB"]
        shown += [f" mfu {speed['mfu']:.0%}"] if "mfu" in speed else []
        shown += [f" eta {left * self._step_tokens / rate:.0f} s"] if left else []
        return " ".join(shown)


def layer_operations(shape: GPT2Config, length: int) -> int:
    """Return the operations per token of a layer's forward pass: two per weight, and those of causal attention."""
    width: int = shape.n_embd
    inner: int = shape.n_inner or 4 * width
    return 2 * (4 * width * width + 2 * width * inner) + 2 * length * width


def step_operations(student: GPT2Config, teacher: GPT2Config | None, weights: LossWeights, length: int) -> int:
    """Return the operations per token of one training step.

    The student's forward pass counts three times, because the backward pass costs twice as much (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1). The teacher's forward pass counts once, with all its layers. Element-wise
    operations are not counted.
    """
    logits = weights.ce or weights.prediction
    total: int = 3 * student.n_layer * layer_operations(student, length)
    total += 6 * student.n_embd * student.vocab_size if logits else 0
    if teacher is not None:
        total += teacher.n_layer * layer_operations(teacher, length)
        total += 2 * teacher.n_embd * teacher.vocab_size if weights.prediction else 0
    if teacher is not None and weights.attention:
        total += student.n_layer * length * (3 * student.n_embd + teacher.n_embd)
    return total
