"""Losses of given tokens under a model: windows batched, logits in chunks, each process its share.

Nothing of size N x V is held: only the positions that predict a target go through the output matrix, a chunk of them
at a time, and the softmax takes a few rows of a chunk, which stay in a CPU's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.config.common import Precision
from tinygpt2.models.lm_head import head_operand, target_losses
from tinygpt2.runtime.devices import DTYPES


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a text; those from `start + first` on are its targets."""

    start: int
    stop: int
    first: int = 1

    @property
    def targets(self) -> int:
        """How many tokens are scored."""
        return self.stop - self.start - self.first


def windows(count: int, size: int, stride: int, *, full: bool = False) -> Iterator[Window]:
    """Yield the windows over a text of `count` tokens such that every token with context is a target once.

    Args:
        count: tokens in the text.
        size: tokens in a window, at least 2.
        stride: tokens from one window's start to the next, 1 to `size`.
        full: let the last window begin early enough to be a whole one.
    """
    scored = 0
    for start in range(0, count, stride):
        stop = min(start + size, count)
        begin = max(0, stop - size) if full else start
        first = max(scored - begin, 1)
        if begin + first < stop:
            yield Window(begin, stop, first)
        scored = stop
        if stop == count:
            return


@dataclass(frozen=True)
class Scores:
    """Per window: the summed loss of its targets (nats), how many there are, and whether all were predicted.

    Attributes:
        greedy: every target is its model's likeliest token.
        filtered: the same, if the first target may be none of the ruled-out tokens.
    """

    sums: Float[np.ndarray, " W"]
    counts: Int[np.ndarray, " W"]
    greedy: Bool[np.ndarray, " W"] | None = None
    filtered: Bool[np.ndarray, " W"] | None = None

    @property
    def targets(self) -> int:
        """Number of tokens that were predicted."""
        return int(self.counts.sum())

    @property
    def loss(self) -> float:
        """Mean loss per target, in nats."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def stderr(self) -> float | None:
        """Standard error of `loss` over windows (ratio estimator); None for a single window."""
        windows = len(self.sums)
        if windows < 2:
            return None
        residuals = self.sums - self.loss * self.counts
        return float(np.sqrt(windows / (windows - 1) * (residuals**2).sum()) / self.counts.sum())


def perplexity_of(loss: float) -> float:
    """Return the perplexity of a loss in nats; infinite where a float cannot hold it."""
    return math.inf if loss >= 700 else math.exp(loss)


class Scorer:
    """A model made ready to score: on its device, in its precision, in evaluation mode.

    Args:
        model: float32 weights; they are converted in place. In a short type the output matrix is kept a second time,
            without its mean row: see `head_operand`.
    """

    def __init__(self, model: GPT2LMHeadModel, precision: Precision, device: torch.device) -> None:
        dtype = DTYPES[precision]
        model.to(device).eval()
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            self.head = head_operand(model.lm_head.weight)
        self.model = model.to(dtype)

    def __call__(
        self,
        tokens: Integer[np.ndarray, " N"],
        spans: Sequence[Window],
        budget: int,
        advance: Callable[[int, str], None] = lambda windows, note: None,
        ruled_out: Bool[Tensor, " V"] | None = None,
    ) -> Scores:
        """Score windows, those of one length together; every process takes its share and returns the whole.

        Args:
            tokens: the text's token ids.
            spans: its windows.
            budget: tokens in a forward pass; a longer window is alone in its own.
            advance: told how many windows were done, and the perplexity so far.
            ruled_out: also look which targets were predicted, with and without these tokens.
        """
        state = PartialState(cpu=not torch.cuda.is_available())
        found = np.zeros((3, len(spans)))
        total, targets, done = 0.0, 0, 0
        for batch in list(_batches(spans, budget))[state.process_index :: state.num_processes]:
            part = [spans[index] for index in batch]
            input_ids, wanted = _padded(tokens, part, self.head.device)
            losses, hits = target_losses(self.model, self.head, input_ids, wanted, ruled_out)
            owner = torch.repeat_interleave(torch.tensor([span.targets for span in part])).to(losses.device)
            sums = torch.zeros(len(part), dtype=torch.float64, device=losses.device)
            found[0, batch] = sums.index_add_(0, owner, losses.double()).cpu().numpy()
            if hits is not None:
                found[1:, batch] = _all_hit(hits.cpu(), [span.targets for span in part])
            total, targets = total + float(losses.sum()), targets + len(losses)
            windows = min(len(part) * state.num_processes, len(spans) - done)
            done += windows
            advance(windows, f"perplexity {perplexity_of(total / targets):,.4g}")
        if state.num_processes > 1:
            found = reduce(torch.from_numpy(found).to(state.device), "sum").cpu().numpy()
        counts = np.array([span.targets for span in spans])
        if ruled_out is None:
            return Scores(found[0], counts)
        return Scores(found[0], counts, found[1] > 0, found[2] > 0)


def _batches(spans: Sequence[Window], budget: int) -> Iterator[list[int]]:
    """Yield the numbers of windows that go together, the longest first, so that little of a batch is padding."""
    lengths = [span.stop - span.start for span in spans]
    batch: list[int] = []
    for index in sorted(range(len(spans)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _padded(
    tokens: Integer[np.ndarray, " N"], spans: Sequence[Window], device: torch.device
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B P"]]:
    """Return windows side by side, and which positions predict their targets; causal attention hides the padding."""
    longest = max(span.stop - span.start for span in spans)
    ids = np.zeros((len(spans), longest), np.int64)
    wanted = np.zeros((len(spans), longest - 1), bool)
    for row, span in enumerate(spans):
        length = span.stop - span.start
        ids[row, :length] = tokens[span.start : span.stop]
        wanted[row, span.first - 1 : length - 1] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(wanted).to(device)


def _all_hit(hits: Bool[Tensor, "N 2"], counts: Iterable[int]) -> Bool[np.ndarray, "2 B"]:
    """Say for each window whether its targets were predicted; the filter holds for the first of them alone."""
    found = []
    for part in torch.split(hits, list(counts)):
        rest = bool(part[1:, 0].all())
        found.append([bool(part[0, 0]) and rest, bool(part[0, 1]) and rest])
    return np.array(found, dtype=bool).T
