"""Which of a student's tokens follow from a teacher's, and the predictions of both summed over these events.

At a common border, each of the teacher's tokens can lead to some of the student's tokens. The events are the connected
components of this graph. Where both models have a border, a text's next tokens are in the same event. So the teacher's
sum over an event is the probability that the student's next token is in it, and the KL over events is never above the
one over tokens: it is equal where each event has one of the student's tokens. Which token of an event comes next, the
student learns from the data.

The graph is counted: which pairs of tokens begin together in the blocks of a dataset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tinygpt2.alignment.blocks import AlignedBlocks
from tinygpt2.alignment.borders import ByteAligner, spelled
from tinygpt2.alignment.redistribution import NEVER, AlignedHead, add_columns, columns
from tinygpt2.data.dataset import Blocks
from tinygpt2.data.encoding import encode
from tinygpt2.errors import ModelError
from tinygpt2.models.lm_head import Head, operand_rows, wide
from tinygpt2.utils.progress import follow
from tinygpt2.utils.types import Array

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

COUNTED = 2**22  # tokens of the student whose borders are counted, at most
_AT_ONCE = 64  # blocks
_TOGETHER = 256  # texts of single tokens in one block


@dataclass(frozen=True)
class Graph:
    """The events of a teacher and a student.

    Attributes:
        reachable: the teacher's tokens that occur at common borders, in ascending order.
        theirs: the event of each of these.
        ours: the event of each of the student's tokens; `count` for those that never begin at a common border.
        count: number of events.
        lumped: the student's tokens that are in events with several of them, in ascending order.
    """

    reachable: Array
    theirs: Array
    ours: Array
    count: int
    lumped: Array

    @classmethod
    def of(cls, pairs: Array, size: int) -> Graph:
        """Find the connected components.

        Args:
            pairs: tokens of the teacher and of the student that begin together (P, 2).
            size: V, the number of the student's tokens.
        """
        reachable, left = np.unique(pairs[:, 0], return_inverse=True)
        used, right = np.unique(pairs[:, 1], return_inverse=True)
        parents = list(range(len(reachable) + len(used)))

        def root(node: int) -> int:
            while parents[node] != node:
                parents[node] = node = parents[parents[node]]
            return node

        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            parents[root(one)] = root(len(reachable) + other)
        roots, events = np.unique([root(node) for node in range(len(parents))], return_inverse=True)
        ours = np.full(size, len(roots), np.int64)
        ours[used] = events[len(reachable) :]
        several = np.bincount(ours, minlength=len(roots) + 1) > 1
        several[len(roots)] = False
        return cls(reachable, events[: len(reachable)], ours, len(roots), np.flatnonzero(several[ours]))


def counted_pairs(aligner: ByteAligner, blocks: Blocks) -> Array:
    """Return which tokens of teacher and student begin together in the blocks of a dataset (P, 2).

    Evenly spaced blocks are counted if there are more than `COUNTED` tokens.

    Raises:
        ModelError: none do.
    """
    chosen = blocks.spaced(max(1, COUNTED // blocks.sequence_length))
    found = set[tuple[int, int]]()
    for start in follow(range(0, len(chosen), _AT_ONCE), "count borders", "batches", announce=False):
        batch = chosen.batch(range(start, min(start + _AT_ONCE, len(chosen))))
        rows = batch.input_ids.cpu().numpy().astype(np.int64)
        sized = zip(rows, batch.real_lengths, strict=True)
        found |= pairs_of(aligner, ((row[:n], n < len(row)) for row, n in sized))
    if not found:
        raise ModelError(
            "the tokens of teacher and data never begin at the same place in the data, so --alignment finds nothing to "
            "learn",
            "use a teacher whose tokens keep the spaces of texts, or longer blocks",
        )
    return np.array(sorted(found), np.int64)


def pairs_of(aligner: ByteAligner, rows: Iterable[tuple[Array, bool]]) -> set[tuple[int, int]]:
    """Return which tokens of teacher and student begin together in some blocks.

    Args:
        rows: the student's tokens of each block, and whether its last word is complete.
    """
    found = set[tuple[int, int]]()
    for ids, whole in rows:
        one = aligner.borders(ids, whole=whole)
        pairs = one.tokens[one.theirs[one.sure]], ids[one.ours[one.sure]]
        found.update(zip(*(part.tolist() for part in pairs), strict=True))
    return found


def token_rows(whole: Tokenizer, small: Tokenizer) -> Iterator[tuple[Array, bool]]:
    """Yield rows for `pairs_of` of the text of each token alone, of both tokenizers.

    With them the graph knows every token that is a text, also those that no text at hand has. More pairs make larger
    events, never wrong ones. Without an end of text there are none.
    """
    end = small.eos_token_id
    pieces = {piece for one in (whole, small) for piece in spelled(one)[0] if piece}
    texts = [piece.decode() for piece in sorted(pieces) if _is_text(piece)] if end is not None else []
    for start in range(0, len(texts), _TOGETHER):
        made = encode(small, texts[start : start + _TOGETHER])
        yield np.array([end, *(token for ids in made for token in (*ids, end))], np.int64), True


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


class Events:
    """Sums the probabilities of a teacher's tokens, and shares the sums among a student's.

    Args:
        graph: the events.
        size: V, the number of the student's tokens.
        device: of the teacher.
    """

    def __init__(self, graph: Graph, size: int, device: torch.device) -> None:
        width, count = operand_rows(size, device.type), graph.count
        theirs, ours = torch.from_numpy(graph.theirs), torch.from_numpy(graph.ours)
        self.reachable, self._theirs = torch.from_numpy(graph.reachable).to(device), theirs.to(device)
        self.ours = F.pad(ours, (0, width - size), value=count).to(device)
        self.lumps = torch.from_numpy(np.unique(graph.ours[graph.lumped])).to(device)
        self.size, self.count = size, count

    def head(self, head: Head, states: Float[Tensor, "S D"]) -> EventHead:
        """Return what makes the student's logits of the records of a batch; see `AlignedHead`."""
        return EventHead(self, head, states)

    def probabilities(self, logits: Float[Tensor, "n R"]) -> tuple[Float[Tensor, "n E"], Float[Tensor, " n"]]:
        """Return the events' probabilities, with a zero for no event at the end, and what is left out.

        Args:
            logits: of the teacher's own tokens.
        """
        logits = logits.to(wide(logits))
        some = columns(logits, self.reachable)
        sums = some.new_zeros(len(some), self.count + 1)
        add_columns(sums, self._theirs, some.softmax(-1))
        return sums, 1 - (some.logsumexp(-1) - logits.logsumexp(-1)).exp()

    def shared(
        self, logs: Float[Tensor, "n E"], student: Float[Tensor, "n W"], token: Int[Tensor, "n 1"]
    ) -> Float[Tensor, "n W"]:
        """Return the logarithms of the probabilities of tokens that share those of their events.

        The data's next token has all of its event's probability. Other events are shared as the student shares them:
        each of its probabilities is multiplied by that of the event and divided by the student's own of the event.
        Forward KL between the result and the student is the KL over events, and the cross-entropy of the next token
        within its event, times the event's probability.

        Args:
            logs: logarithms of the events' probabilities, changed in place.
            student: logits.
            token: the data's next tokens; -1 where there is none, so that all events are shared as the student does.
        """
        own, some = student.to(logs.dtype), token >= 0
        token = token.clamp(min=0)
        index, event = self.ours.expand(len(own), -1), self.ours[token]
        whole = logs.gather(1, event)
        most = own.new_full(logs.shape, NEVER).scatter_reduce_(1, index, own, "amax")
        sums = torch.zeros_like(logs).scatter_add_(1, index, (own - most.gather(1, index)).exp_())
        logs -= most.add_(sums.log_())
        logs[:, self.count] = NEVER
        found = own + logs.gather(1, index)
        whole = whole.where(some, found.gather(1, token))
        return found.masked_fill_(self.ours == event.where(some, -1), NEVER).scatter_(1, token, whole)


class EventHead(AlignedHead):
    """Makes a student's logits out of records: the logarithms of the probabilities of its events.

    Beside the student's logits, the logarithms are those of `Events.shared`.

    Args:
        events: what the tokens of both lead to.
        head, states: see `AlignedHead`.
    """

    def __init__(self, events: Events, head: Head, states: Float[Tensor, "S D"]) -> None:
        super().__init__(events.size, head, states)
        self._events = events
        self._sums = torch.zeros(3, dtype=wide(states), device=states.device)  # lumped, left out, positions

    def figures(self, blocks: AlignedBlocks) -> dict[str, Tensor]:
        """Return the metrics of a batch whose predictions were compared; see `AlignedHead`."""
        lumped, left_out, count = self._sums
        count = count.clamp(min=1)
        return super().figures(blocks) | {"teacher/lumped": lumped / count, "teacher/left_out": left_out / count}

    def _part(self, logits: Tensor, records: Tensor, student: Tensor | None) -> Tensor:
        events, known = self._events, records[:, 0] >= 0
        p, left_out = events.probabilities(logits)
        if student is not None:
            lumped = p[:, events.lumps].sum(1)
            self._sums += torch.stack([(one * known).sum() for one in (lumped, left_out, known)])
        logs = p.log_().clamp_(min=NEVER).masked_fill_(~known[:, None], NEVER)
        token = records[:, 2:]
        found = columns(logs, events.ours) if student is None else events.shared(logs, student, token)
        token = token.clamp(min=0)
        return found.scatter_(1, token, found.gather(1, token).where(known[:, None], 0.0))
