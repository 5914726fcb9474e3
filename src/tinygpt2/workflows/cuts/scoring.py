"""How good a student is: its loss beside its teacher's, and what it is worth as its teacher's draft."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GPT2LMHeadModel

from tinygpt2.compression.calibration import Batches, mean_loss
from tinygpt2.config.compression import Purpose
from tinygpt2.models.activations import collect_activations
from tinygpt2.models.lm_head import rows_at_once
from tinygpt2.runtime.devices import current_device
from tinygpt2.workflows.cuts.texts import Pieces, SharedText

NATS, BITS = "nats per token", "bits per byte"  # the units of losses
_DRAFTED = 16  # tokens that a draft may propose at a time


@dataclass(frozen=True)
class CutScore:
    """How good a student is on texts that it was not fitted on.

    Attributes:
        loss: what it has more than the teacher on the same text: nats per token, or with --vocab-sizes bits per byte.
        acceptance: with --for draft, the mean of sum(min(p, q)), the share of drafted tokens that the teacher accepts.
        speedup: with --for draft, how many times as fast the teacher is expected to decode with this draft.
    """

    loss: float
    acceptance: float | None = None
    speedup: float | None = None

    @property
    def rank(self) -> float:
        """What the best student has least of."""
        return self.loss if self.speedup is None else -self.speedup


def expected_speedup(acceptance: float, cost: float) -> float:
    """Return how many times as fast speculative decoding is, at the best number of drafted tokens (up to 16).

    Args:
        acceptance: probability that a drafted token is accepted, taken as independent of the others.
        cost: the draft's time for a token, divided by the teacher's. The teacher reads all drafted tokens in the time
            for one.

    Source: Leviathan et al. 2023, arXiv:2211.17192, theorem 3.8.
    """

    def speedup(drafted: int) -> float:
        tokens = sum(acceptance**accepted for accepted in range(drafted + 1))
        return tokens / (drafted * cost + 1)

    return max(map(speedup, range(_DRAFTED + 1)))


class Judge:
    """Scores students of a teacher.

    Args:
        batches: the texts to score on.
        teacher_milliseconds: the teacher's time for a token; only for drafts.
    """

    def __init__(
        self, teacher: GPT2LMHeadModel, batches: Batches, purpose: Purpose, teacher_milliseconds: float
    ) -> None:
        self._teacher, self._batches, self._purpose = teacher, batches, purpose
        self._milliseconds = teacher_milliseconds
        self._losses: dict[int, float] = {}

    def score(self, student: GPT2LMHeadModel, milliseconds: float, every: int = 1) -> CutScore:
        """Score a student.

        Args:
            milliseconds: its time for a token.
            every: use every `every`-th batch of the texts.
        """
        batches = self._batches[::every]
        if every not in self._losses:
            self._losses[every] = mean_loss(self._teacher.to(current_device()), batches)
        loss = mean_loss(student.to(current_device()), batches) - self._losses[every]
        if self._purpose == "loss":
            return CutScore(loss)
        acceptance = accepted_share(self._teacher, student, batches)
        return CutScore(loss, acceptance, expected_speedup(acceptance, milliseconds / self._milliseconds))


class ByteJudge:
    """Scores students of a teacher that may have other tokens: by the bits for each byte of the same text.

    Args:
        text: what is predicted.
        usual, own: the teacher's vocabulary and the students'.
    """

    def __init__(self, text: SharedText, teacher: GPT2LMHeadModel, usual: Pieces, own: Pieces) -> None:
        self._text, self._teacher, self._usual, self._own = text, teacher, usual, own
        self._bits: dict[int, float] = {}

    def score(self, student: GPT2LMHeadModel, milliseconds: float, every: int = 1) -> CutScore:
        """Score a student; see `Judge.score`. Its time has no influence."""
        if every not in self._bits:
            self._bits[every] = self._text.bits_per_byte(self._teacher, self._usual, every)
        return CutScore(self._text.bits_per_byte(student, self._own, every) - self._bits[every])


@torch.no_grad()
def accepted_share(teacher: GPT2LMHeadModel, student: GPT2LMHeadModel, batches: Batches) -> float:
    """Return the mean of sum(min(p, q)) over all tokens, with the next-token distributions of teacher and student.

    Source: Leviathan et al. 2023, arXiv:2211.17192, section 3.2.
    """
    total, count = 0.0, 0
    for ids in batches:
        states = [_last_state(model, ids).flatten(0, 1) for model in (teacher, student)]
        rows = rows_at_once(student.config.vocab_size, ids.device.type)
        for p, q in zip(*(state.split(rows) for state in states), strict=True):  # type: ignore[no-untyped-call]
            logits = (p @ teacher.lm_head.weight.T, q @ student.lm_head.weight.T)
            total += float(torch.minimum(*(one.float().softmax(-1) for one in logits)).sum())
        count += ids.numel()
    return total / count


def _last_state(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    last = model.config.n_layer
    return collect_activations(model, ids, states=[last]).states[last]
