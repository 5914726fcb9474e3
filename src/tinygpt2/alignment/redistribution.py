"""A teacher's predictions as those of the tokens of a student whose tokenizer is the teacher's cut by rank.

Where one of the teacher's tokens begins, the probability of a student's token is the sum over all of the teacher's
tokens whose first piece it is. Inside one of the teacher's tokens, the tokens that agree with the pieces that were read
and go on remain; their probabilities, divided by their sum, give the next piece. Both are exact: a text's tokens of the
student are the pieces of the teacher's tokens, one after another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tinygpt2.alignment.blocks import AlignedBlocks
from tinygpt2.alignment.decomposition import Decomposition
from tinygpt2.models.lm_head import Head, operand_rows, rows_at_once, scoring_chunk, wide

NEVER = -1e30  # the logarithm of no probability; finite, so that differences are finite, too


class Redistribution:
    """Makes the logarithms of a student's tokens' probabilities out of a teacher's last hidden states.

    Args:
        decomposition: what the teacher's tokens consist of.
        size: V, the number of the student's tokens.
        device: of the teacher.
    """

    def __init__(self, decomposition: Decomposition, size: int, device: torch.device) -> None:
        one = decomposition
        arrays = one.reachable, one.first, one.inner_starts, one.inner_tokens, one.inner_pieces
        self._reachable, self._first, self._starts, self._tokens, self._pieces = (
            torch.from_numpy(array).to(device) for array in arrays
        )
        self.size, self._width = size, operand_rows(size, device.type)

    def head(self, head: Head, states: Float[Tensor, "S D"]) -> RedistributedHead:
        """Return what makes the student's logits of the records of a batch; see `AlignedHead`."""
        return RedistributedHead(self, head, states)

    def __call__(self, logits: Float[Tensor, "n R"], records: Int[Tensor, "n 3"]) -> Float[Tensor, "n W"]:
        """Return the logarithms of the probabilities; only the first V columns count.

        Where the teacher predicts nothing, the next token of the data has all of the probability. Forward KL is then
        the cross-entropy.

        Args:
            logits: of the teacher's own tokens.
            records: see `AlignedBlocks`.
        """
        state, node, token = records.unbind(-1)
        if len(self._reachable) < logits.shape[1]:
            logits = columns(logits, self._reachable)
        p = logits.to(wide(logits)).softmax(-1)
        sums = p.new_zeros(len(p), self._width)
        rows = torch.arange(len(p), device=p.device)
        known = state >= 0
        add_columns(sums, self._first, p * (known & (node == 0))[:, None])
        self._inside(sums, p, rows[known & (node > 0)], node)
        sums[rows, token] = sums[rows, token].where(known, 1.0)
        return sums.log_().clamp_(min=NEVER)

    def _inside(self, sums: Tensor, p: Tensor, rows: Tensor, node: Tensor) -> None:
        """Set the probabilities of the rows that are inside one of the teacher's tokens."""
        if not len(rows):
            return
        starts = self._starts[node[rows] - 1]
        sizes = self._starts[node[rows]] - starts
        row = rows.repeat_interleave(sizes)
        entry = torch.arange(len(row), device=p.device) + (starts - sizes.cumsum(0) + sizes).repeat_interleave(sizes)
        parts = p[row, self._tokens[entry]].clamp(min=torch.finfo(p.dtype).tiny)
        whole = p.new_zeros(len(p)).index_add_(0, row, parts)
        sums.index_put_((row, self._pieces[entry]), parts / whole[row], accumulate=True)


def columns(values: Float[Tensor, "n A"], chosen: Int[Tensor, " B"]) -> Float[Tensor, "n B"]:
    """Return some columns of a matrix, in the order asked for."""
    if values.device.type == "cpu":  # ten times as fast as indexing
        return values.gather(1, chosen.expand(len(values), -1))
    return values.index_select(1, chosen)


def add_columns(sums: Float[Tensor, "n A"], chosen: Int[Tensor, " B"], values: Float[Tensor, "n B"]) -> None:
    """Add each column of the values to one of the sums'."""
    if sums.device.type == "cpu":  # index_add_ would go through the columns one by one
        sums.scatter_add_(1, chosen.expand(len(values), -1), values)
    else:
        sums.index_add_(1, chosen, values)


class AlignedHead(ABC):
    """Makes a student's logits out of records, as a `Head` does out of states.

    Args:
        size: V, the number of the student's tokens.
        head, states: the teacher's head, and its last hidden states of one batch.
    """

    def __init__(self, size: int, head: Head, states: Float[Tensor, "S D"]) -> None:
        self.size, self._head, self._states = size, head, states

    def logits(self, records: Int[Tensor, "N 3"]) -> Float[Tensor, "N W"]:
        """Return the logarithms of the probabilities; only the first V columns count."""
        return self._all(records, None)

    def given(self, records: Int[Tensor, "N 3"], student: Float[Tensor, "N W"]) -> Float[Tensor, "N W"]:
        """Return what stands for the teacher's logits beside the student's."""
        return self._all(records, student)

    def _all(self, records: Tensor, student: Tensor | None) -> Tensor:
        """Make products for many positions at a time, and the rest for as many as fit into a CPU's cache."""
        head, device, found = self._head, records.device.type, []
        largest = max(head.size, self.size)
        chunk, rows = scoring_chunk(largest, device), rows_at_once(largest, device)
        for start in range(0, len(records), chunk):
            read = records[start : start + chunk]
            logits = head.logits(self._states[read[:, 0].clamp(min=0)])[:, : head.size]
            own = student if student is None else student[start : start + chunk]
            for inner in range(0, len(read), rows):
                part = slice(inner, inner + rows)
                made = self._part(logits[part], read[part], own if own is None else own[part])
                if own is not None:  # where neither teacher nor data says what follows, nothing is learned
                    silent = (read[part, 0] < 0) & (read[part, 2] < 0)
                    made = torch.where(silent[:, None], own[part], made)
                found.append(made)
        return torch.cat(found)

    @abstractmethod
    def _part(
        self, logits: Float[Tensor, "n R"], records: Int[Tensor, "n 3"], student: Float[Tensor, "n W"] | None
    ) -> Float[Tensor, "n W"]:
        """Return `given` of some positions, or `logits` of them if the student's are None.

        Args:
            logits: of the teacher's own tokens.
        """

    def losses(self, records: Int[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Return the losses of next tokens, in nats; those that the teacher does not predict mean nothing."""
        parts = records.split(256)  # type: ignore[no-untyped-call]
        logits = [self.logits(part).gather(1, part[:, 2:].clamp(min=0))[:, 0] for part in parts]
        return -torch.cat(logits)

    def figures(self, blocks: AlignedBlocks) -> dict[str, Tensor]:
        """Return the metrics of a batch, by their names.

        Args:
            blocks: of the batch.
        """
        return {"teacher/absent": blocks.absent}


class RedistributedHead(AlignedHead):
    """Makes the logits of a student whose tokenizer is the teacher's cut by rank.

    Args:
        redistribution: moves the predictions.
        head, states: see `AlignedHead`.
    """

    def __init__(self, redistribution: Redistribution, head: Head, states: Float[Tensor, "S D"]) -> None:
        super().__init__(redistribution.size, head, states)
        self._redistribution = redistribution

    def _part(self, logits: Tensor, records: Tensor, student: Tensor | None) -> Tensor:
        return self._redistribution(logits, records)
