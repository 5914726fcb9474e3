"""The speed of a run, the steps that fit into a time, and the operations of a training step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from transformers import GPT2Config

from tinygpt2.data.dataset import Blocks
from tinygpt2.models.teachers.teacher import Shape
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.runtime.memory import memory_in_use
from tinygpt2.training.state import RunState
from tinygpt2.training.step import StepData, gradients, read_step
from tinygpt2.utils.units import duration, size

_MEMORY = 30.0  # seconds after which the time of a step counts a third in the mean
_SAVED_PER_SECOND = 1e8  # bytes: a slow disk, with checksums
_ENDING = 6.0  # seconds to draw the curves, write the report and end the process, on a busy machine


class ThroughputMeter:
    """Measures the time and the speed of a run. The time includes that before a resume.

    Args:
        state: the state in which the run starts or continues.
        step_tokens: the number of tokens in a global batch.
        bound: tokens per second at the peak rate of all devices, or None if it is not known.
        clock: returns the time in seconds.
        memory: seconds after which the time of a step counts a third in `step_seconds`.

    Attributes:
        eval_seconds: the time of the last evaluation.
    """

    def __init__(
        self,
        state: RunState,
        step_tokens: int,
        bound: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        memory: float = _MEMORY,
    ) -> None:
        self._clock, self._memory = clock, memory
        self._start = self._mark = self._last = clock()
        self._state, self._step, self._before = state, state.step, state.seconds
        self._step_tokens, self._bound = step_tokens, bound
        self._warm = False
        self._mean = (0.0, 0.0)  # weighted seconds, and the weights of the steps that took them
        self.eval_seconds = 0.0

    def seconds(self) -> float:
        """Return the seconds since the run's first step."""
        return self._before + self._clock() - self._start

    def stepped(self) -> None:
        """Count the time of a step. The first one after a start is slower than the others, and does not count."""
        now = self._clock()
        if self._warm:
            self.count(now - self._last)
        self._last, self._warm = now, True

    def count(self, seconds: float) -> None:
        """Count a step of so many seconds in the mean."""
        kept = math.exp(-seconds / self._memory)
        self._mean = (self._mean[0] * kept + seconds, self._mean[1] * kept + 1)

    @property
    def step_seconds(self) -> float | None:
        """The mean time of the last steps, without evaluations; None before the first step that counts."""
        return self._mean[0] / self._mean[1] if self._mean[1] else None

    def lap(self, step: int) -> dict[str, float]:
        """Return tokens per second since the last lap, and MFU (model FLOPs utilisation) if the peak is known."""
        now = self._clock()
        speed = (step - self._step) / (now - self._mark) * self._step_tokens
        self._mark, self._step = now, step
        return {"tokens_per_second": speed, **({"mfu": speed / self._bound} if self._bound else {})}

    @contextmanager
    def paused(self, *, evaluating: bool = False) -> Iterator[None]:
        """Leave the block's time out of laps and steps; count it as that of an evaluation, if it is one."""
        before = self._clock()
        yield
        spent = self._clock() - before
        self._mark, self._last = self._mark + spent, self._last + spent
        if evaluating:
            self.eval_seconds = spent
            self._state.eval_seconds += spent

    def note(self, terms: dict[str, float], speed: dict[str, float], left: int = 0) -> str:
        """Return a line with losses, speed and memory; with `left` steps and once it is known, also the time left.

        The speed is that of the last steps if it is known, because that of a few steps changes with the machine's load.
        """
        parts = [f"{name.removeprefix('loss/')} {value:.4g}" for name, value in terms.items()]
        shown = parts[:1] + ([f"({', '.join(parts[1:])})"] if parts[2:] else [])
        each = self.step_seconds
        rate = speed["tokens_per_second"] if each is None else self._step_tokens / each
        shown += [f" {rate:,.0f} tokens/s", f" {size(memory_in_use())}"]
        shown += [f" mfu {speed['mfu']:.0%}"] if "mfu" in speed else []
        shown += [f" eta {duration(left * each)}"] if left and each is not None else []
        return " ".join(shown)


@dataclass(frozen=True)
class TimeLimit:
    """The time that a command may take (`--max-minutes`), and how many steps fit into what is left of it.

    Attributes:
        seconds: the limit.
        used: returns the seconds since the command began, with those of interrupted attempts.
        eval_every: steps from one evaluation to the next; None if there is only the last one.
        parameters: of the model. Their number decides how long the end takes, in which the model is saved.
    """

    seconds: float
    used: Callable[[], float]
    eval_every: int | None
    parameters: int

    def steps(self, each: float, evaluation: float) -> int:
        """Return how many more steps fit.

        Args:
            each: seconds of a step.
            evaluation: seconds of an evaluation. The last one is always kept free.
        """
        saving = 16 * self.parameters / _SAVED_PER_SECOND  # a checkpoint with AdamW's moments, and the model
        ending = evaluation + saving + min(_ENDING + 0.01 * self.seconds, 0.2 * self.seconds)
        between = evaluation / self.eval_every if self.eval_every else 0.0
        return max(0, int((self.seconds - self.used() - ending) / (each + between)))


def layer_operations(shape: GPT2Config, length: int) -> int:
    """Return the operations per token of a layer's forward pass: two per weight, and those of causal attention."""
    width: int = shape.n_embd
    inner: int = shape.n_inner or 4 * width
    return 2 * (4 * width * width + 2 * width * inner) + 2 * length * width


def step_operations(
    student: GPT2Config,
    teacher: Shape | GPT2Config | None,
    weights: LossWeights,
    length: int,
    cached: float = 0.0,
    predicted: float = 0.0,
) -> int:
    """Return the operations per token of one training step.

    The student's forward pass counts three times, because the backward pass costs twice as much (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1). The teacher's forward pass counts once, with all its layers. Causal attention counts
    half of the T x T products; some other programs count all of them, and so report a slightly higher MFU. Element-wise
    operations are not counted.

    Args:
        length: of the blocks.
        cached: share of the blocks for which a cache holds the teacher's final states; its layers do not run for these.
        predicted: share of the blocks for which it holds the predictions; no logits are computed for these, either.
    """
    teacher = Shape.of_gpt2(teacher) if isinstance(teacher, GPT2Config) else teacher
    total: int = 3 * student.n_layer * layer_operations(student, length)
    total += 6 * student.n_embd * student.vocab_size if weights.predicts else 0
    if teacher is not None:
        total += round((1 - cached) * teacher.operations(length))
        total += round((1 - predicted) * 2 * teacher.last_width * teacher.vocabulary) if weights.compares else 0
    if teacher is not None and weights.attention:
        total += student.n_layer * length * (3 * student.n_embd + teacher.width)
    return total


def step_seconds(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    blocks: Blocks,
    sequences: int,
    size: int,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
    prepare: Callable[[StepData, list[int], int], StepData] | None = None,
) -> list[float]:
    """Take some steps and return the seconds of each. The first ones are slower than the rest.

    Args:
        module, optimizer: as Accelerate prepared them; without an optimizer, no weight changes.
        blocks: used in their order, and from the first one again after the last.
        sequences: blocks in a global batch.
        size: blocks in a process's micro-batch.
        steps: how many to take.
        clock: returns the time in seconds.
        prepare: returns what a step uses in the place of what was read for it, the numbers of its blocks and its own.
    """
    seconds = []
    for step in range(steps):
        started = clock()
        rows = [index % len(blocks) for index in range(step * sequences, (step + 1) * sequences)]
        data = read_step(accelerator, module, blocks, rows, size)
        gradients(accelerator, module, blocks, rows, size, data if prepare is None else prepare(data, rows, step))
        if optimizer is not None:
            optimizer.step()
        module.zero_grad(set_to_none=True)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return seconds


@torch.no_grad()
def evaluation_seconds(
    accelerator: Accelerator,
    module: nn.Module,
    blocks: Blocks,
    size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Estimate the seconds of `evaluate` from those of one batch, after one that warms up."""
    if not len(blocks):
        return 0.0
    was_training = module.training
    module.eval()
    rows, marks = range(min(size, len(blocks))), list[float]()
    for _ in range(2):
        batch = blocks.batch(rows).to(accelerator.device)
        module(batch.input_ids, documents=batch.documents)[0].sum().item()
        marks.append(clock())
    module.train(was_training)
    return (marks[1] - marks[0]) * len(blocks) / (len(rows) * int(accelerator.num_processes))
