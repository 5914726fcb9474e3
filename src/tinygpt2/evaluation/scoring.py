"""Losses of given tokens under a model. Windows are batched and shared among the processes.

The logits of all tokens (N x V) are never in memory at once. Only positions that predict a target are multiplied by the
output matrix, one chunk at a time. The softmax works on a few rows of a chunk, so that they stay in the CPU's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor
from transformers import PreTrainedModel

from tinygpt2.config.common import Precision
from tinygpt2.errors import MachineError, out_of_memory
from tinygpt2.evaluation.choices.branches import Tree, branch_states
from tinygpt2.models.lm_head import losses_of
from tinygpt2.models.teachers.loading import as_teacher
from tinygpt2.models.teachers.teacher import GPT2Teacher, Teacher
from tinygpt2.models.teachers.vocabularies import Reading
from tinygpt2.runtime.devices import DTYPES, current_device, float64_device


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a text. The tokens from `start + first` on are its targets."""

    start: int
    stop: int
    first: int = 1

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def targets(self) -> int:
        """Number of tokens that are scored."""
        return self.stop - self.start - self.first


def windows(count: int, size: int, stride: int, *, full: bool = False) -> Iterator[Window]:
    """Yield the windows over a text of `count` tokens, so that every token with context is a target exactly once.

    Args:
        count: tokens in the text.
        size: tokens in a window, at least 2.
        stride: tokens from one window's start to the next, 1 to `size`.
        full: let the last window begin earlier, so that it also has `size` tokens if the text is long enough.
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
    """Scores of each window.

    Attributes:
        sums: the summed loss of its targets, in nats.
        counts: the number of its targets.
        greedy: whether every target is the token to which the model gives the highest probability.
        filtered: the same, with the ruled-out tokens excluded from the predictions of the first target.
        by_length: of questions, whether the right candidate is the best by the loss per character and per byte.
        by_line: the summed loss of the targets of each line of a text, in nats.
    """

    sums: Float[np.ndarray, " W"]
    counts: Int[np.ndarray, " W"]
    greedy: Bool[np.ndarray, " W"] | None = None
    filtered: Bool[np.ndarray, " W"] | None = None
    by_length: Bool[np.ndarray, "2 W"] | None = None
    by_line: Float[np.ndarray, " L"] | None = None

    @property
    def targets(self) -> int:
        """Number of targets in all windows."""
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
    """Return the perplexity of a loss in nats; infinity if it is too large for a float."""
    return math.inf if loss >= 700 else math.exp(loss)


class Scorer:
    """A model that is ready to score: on its device, in its precision, in evaluation mode.

    Args:
        model: a model of any architecture with float32 weights, which are converted in place. With a 16-bit type a
            second copy of the output matrix is kept, without its mean row: see `head_operand`.
    """

    def __init__(self, model: PreTrainedModel | Teacher, precision: Precision, device: torch.device) -> None:
        dtype = DTYPES[precision]
        self.model = as_teacher(model).to(device).eval()
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            self.head = self.model.head()
        self.model.to(dtype)

    def begin_with(self, start: int | None) -> None:
        """Put a token before each window, if the model is not a GPT-2: those of GPT-2 begin without one."""
        if not isinstance(self.model, GPT2Teacher):
            self.model.read_as(Reading(start=start))

    def __call__(
        self,
        tokens: Integer[np.ndarray, " N"],
        spans: Sequence[Window],
        budget: int,
        advance: Callable[[int, str], None] = lambda targets, note: None,
        ruled_out: Bool[Tensor, " V"] | None = None,
        candidates: Int[np.ndarray, " Q"] | None = None,
        lines: Int[np.ndarray, " N1"] | None = None,
    ) -> Scores:
        """Score windows, in batches of similar length.

        Every process scores its share of the windows and returns the scores of all of them.

        Args:
            tokens: the text's token ids.
            spans: its windows.
            budget: tokens in one forward pass; a longer window is scored alone.
            advance: called with the number of targets that all processes have just scored, and a note with the
                perplexity so far.
            ruled_out: also check which targets were predicted, once with and once without these tokens allowed.
            candidates: how many of the windows, one after the other, are the candidates of each question. What they
                begin with goes through the model once.
            lines: for each of the text's tokens the number of its line, and lastly that of the last line. The losses
                of each line are summed, too.
        """
        state = PartialState(cpu=current_device().type == "cpu")
        found, everything = np.zeros((3, len(spans))), sum(span.targets for span in spans)
        by_line = np.zeros(0 if lines is None else int(lines[-1]) + 1)
        total, targets, done = 0.0, 0, 0
        if not isinstance(self.model, GPT2Teacher):  # others cannot read a tree: they read each candidate by itself
            candidates = None
        device = self.head.matrix.device
        groups, sequences = _sequences(tokens, spans, candidates)
        for batch in list(batches(list(map(len, sequences)), budget))[state.process_index :: state.num_processes]:
            indices = [index for number in batch for index in groups[number]]
            part = [spans[index] for index in indices]
            if candidates is None:
                input_ids, wanted = padded(tokens, part, device)
                losses, hits = self.model.losses(self.head, input_ids, wanted, ruled_out)
            else:
                trees = [sequence for number in batch if isinstance(sequence := sequences[number], Tree)]
                states, answers = branch_states(self.model.model, trees, device)
                losses, hits = losses_of(states, answers, self.head.logits, self.head.size, ruled_out)
            owner = torch.repeat_interleave(torch.tensor([span.targets for span in part])).to(losses.device)
            exact = losses.to(float64_device(losses.device)).double()
            sums = torch.zeros(len(part), dtype=torch.float64, device=exact.device)
            found[0, indices] = sums.index_add_(0, owner.to(exact.device), exact).cpu().numpy()
            if lines is not None:
                np.add.at(by_line, lines[_targets(part)], exact.cpu().numpy())
            if hits is not None:
                found[1:, indices] = _all_hit(hits.cpu(), [span.targets for span in part])
            total, targets = total + float(found[0, indices].sum()), targets + len(losses)
            just = min(len(losses) * state.num_processes, everything - done)  # the other processes do about as many
            done += just
            advance(just, f"perplexity {perplexity_of(total / targets):,.4g}")
        found, by_line = _of_all_processes(found, state), _of_all_processes(by_line, state)
        greedy, filtered = (None, None) if ruled_out is None else (found[1] > 0, found[2] > 0)
        counts = np.array([span.targets for span in spans])
        return Scores(found[0], counts, greedy, filtered, by_line=None if lines is None else by_line)


def _of_all_processes(sums: Float[np.ndarray, "*shape"], state: PartialState) -> Float[np.ndarray, "*shape"]:
    """Return the sums over all processes."""
    if state.num_processes == 1:
        return sums
    summed: Float[np.ndarray, "*shape"] = reduce(torch.from_numpy(sums).to(state.device), "sum").cpu().numpy()
    return summed


def _targets(spans: Sequence[Window]) -> Int[np.ndarray, " M"]:
    """Return the places of the windows' targets in the text."""
    return np.concatenate([np.arange(span.start + span.first, span.stop) for span in spans])


def _sequences(
    tokens: Integer[np.ndarray, " N"], spans: Sequence[Window], candidates: Int[np.ndarray, " Q"] | None
) -> tuple[list[range], list[Tree] | list[Window]]:
    """Return what goes through the model as one sequence each: windows, or trees of them; and the windows of each."""
    if candidates is None:
        return [range(index, index + 1) for index in range(len(spans))], list(spans)
    groups = [range(end - count, end) for end, count in zip(np.cumsum(candidates).tolist(), candidates, strict=True)]
    return groups, [
        Tree.of([tokens[span.start : span.stop] for span in part], [span.first for span in part])
        for part in (spans[group.start : group.stop] for group in groups)
    ]


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield the indices of the sequences of each batch, the longest ones first, so that there is little padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(
    tokens: Integer[np.ndarray, " N"], spans: Sequence[Window], device: torch.device
) -> tuple[Int[Tensor, "B T"], Int[Tensor, " M"]]:
    """Return a batch of windows, and the numbers of the positions that predict their targets: see `target_losses`.

    The padding is at the end, so causal attention keeps it from changing the losses.
    """
    longest = max(span.stop - span.start for span in spans)
    ids = np.zeros((len(spans), longest), np.int64)
    wanted = np.zeros((len(spans), longest - 1), bool)
    for row, span in enumerate(spans):
        length = span.stop - span.start
        ids[row, :length] = tokens[span.start : span.stop]
        wanted[row, span.first - 1 : length - 1] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(np.flatnonzero(wanted)).to(device)


def _all_hit(hits: Bool[Tensor, "N 2"], counts: Iterable[int]) -> Bool[np.ndarray, "2 B"]:
    """Return for each window whether all targets were predicted. Tokens are ruled out for the first target only."""
    found = []
    for part in torch.split(hits, list(counts)):
        rest = bool(part[1:, 0].all())
        found.append([bool(part[0, 0]) and rest, bool(part[0, 1]) and rest])
    return np.array(found, dtype=bool).T


@contextmanager
def enough_memory(task: str) -> Iterator[None]:
    """Raise a lack of memory as an error with a hint."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise MachineError(f"out of memory on {task}", "use a smaller --batch-size, or --precision bf16") from error
