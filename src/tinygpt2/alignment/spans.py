"""The likelihoods of the texts between common borders, by a teacher with any other tokenizer.

A span is the text from one common border to the next. Both models give it a likelihood: the product of the
probabilities of its tokens. Spans are what approximate likelihood matching compares: Minixhofer et al. 2025,
arXiv:2503.20083, section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tinygpt2.alignment.blocks import AlignedBlocks
from tinygpt2.alignment.borders import ByteAligner
from tinygpt2.alignment.redistribution import AlignedHead
from tinygpt2.models.lm_head import Head, losses_of
from tinygpt2.utils.types import Array

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer


class SpanAligner(ByteAligner):
    """Finds the spans of a student's blocks, too.

    In the records, the number of the teacher's tokens in a span is in the place of the node, for each of the student's
    tokens in it; 0 outside.

    Args:
        whole, small, limit: see `ByteAligner`.
        events: whether the common borders have states of their own. Otherwise the state that predicts the beginning of
            a span is that of each of its tokens, and no others have one.
    """

    def __init__(self, whole: Tokenizer, small: Tokenizer, limit: int | None, *, events: bool) -> None:
        super().__init__(whole, small, limit)
        self._events = events

    def _block(self, ids: Array, *, whole: bool) -> tuple[Array, Array, Array]:
        """See `BlockAligner`."""
        found = self.borders(ids, whole=whole)
        states, counts = np.full(len(ids), -1), np.zeros(len(ids), np.int64)
        for at, begin, (ours, theirs) in zip(found.ours, found.theirs, found.spans, strict=True):
            if theirs and begin and begin + theirs <= (self._limit or len(found.tokens)):
                states[at : at + ours], counts[at : at + ours] = begin - 1, theirs
        if self._events:
            states[:] = -1
            states[found.ours] = found.theirs - 1
        return found.tokens, states[1:], counts[1:]


class Spans(NamedTuple):
    """The spans of a batch, for N positions of the student.

    Attributes:
        numbers: of the span that each position's next token is part of.
        inside: whether it is part of one.
        teacher: the logarithm of each span's likelihood by the teacher, by the spans' numbers.
        used: which numbers are those of spans.
    """

    numbers: Int[Tensor, " N"]
    inside: Bool[Tensor, " N"]
    teacher: Float[Tensor, " S"]
    used: Bool[Tensor, " S"]


class SpanHead(AlignedHead):
    """Gives the likelihoods of the spans of a batch, and with events the student's logits out of records.

    Args:
        blocks: the batch.
        head, states: the teacher's head, and its last hidden states of the batch.
        temperatures: see `tinygpt2.objectives.span_losses`.
        events: makes logits; None if only spans are compared.
    """

    def __init__(
        self,
        blocks: AlignedBlocks,
        head: Head,
        states: Float[Tensor, "S D"],
        temperatures: list[float],
        events: AlignedHead | None,
    ) -> None:
        super().__init__(head.size if events is None else events.size, head, states)
        self._blocks, self.temperatures, self.events = blocks, temperatures, events
        self._counts = torch.zeros(2, device=states.device)  # the student's tokens in spans, and spans

    def spans(self, records: Int[Tensor, "N 3"]) -> Spans:
        """Return the spans of some records, which keep their order. Those that are there in parts are left out.

        A span's number is that of the teacher's state that predicts its beginning.
        """
        size, whole = len(self._states), self._blocks.records.flatten(0, 1)
        numbers, inside = _numbered(records)
        all_numbers, all_inside = _numbered(whole)
        there, wanted = (
            torch.zeros(size, dtype=torch.int64, device=one.device).index_add_(0, one, mask.long())
            for one, mask in ((numbers, inside), (all_numbers, all_inside))
        )
        used = (there > 0) & (there == wanted)
        inside = inside & used[numbers]
        lengths = torch.zeros_like(there).scatter_reduce_(0, all_numbers, whole[:, 1], "amax")
        places = torch.arange(size, device=records.device)
        begun = places.where(lengths > 0, 0).cummax(0).values
        own = places < begun + lengths[begun]
        targets = F.pad(self._blocks.ids[:, 1:], (0, 1)).flatten()
        losses, _ = losses_of(self._states.to(self._head.matrix.dtype), targets, self._head.logits, self._head.size)
        teacher = torch.zeros_like(losses).index_add_(0, begun, -losses.where(own, 0.0))
        self._counts += torch.stack([inside.sum(), used.sum()])
        return Spans(numbers, inside, teacher, used)

    def losses(self, records: Int[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Return the losses of next tokens: those of their events, or the mean over the tokens of each span."""
        if self.events is not None:
            return self.events.losses(records)
        spans = self.spans(records)
        sizes = torch.zeros_like(spans.teacher).index_add_(0, spans.numbers, spans.inside.to(spans.teacher))
        return -(spans.teacher / sizes.clamp(min=1))[spans.numbers].where(spans.inside, 0.0)

    def _part(self, logits: Tensor, records: Tensor, student: Tensor | None) -> Tensor:
        """See `AlignedHead`.

        Raises:
            ValueError: only spans are compared.
        """
        if self.events is None:
            raise ValueError("spans say nothing about single tokens")
        return self.events._part(logits, records, student)

    def figures(self, blocks: AlignedBlocks) -> dict[str, Tensor]:
        """Return the metrics of a batch whose spans were compared; see `AlignedHead`."""
        own = super().figures(blocks) if self.events is None else self.events.figures(blocks)
        tokens, count = self._counts
        return own | {"teacher/span_tokens": tokens / count.clamp(min=1)}


def _numbered(records: Int[Tensor, "N 3"]) -> tuple[Int[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return the number of each record's span, and whether it is in one.

    A span's first record has its state, and a later one has the same or none.
    """
    return records[:, 0].clamp(min=0).cummax(0).values, records[:, 1] > 0
