"""A teacher's predictions as those of the tokens of a student whose tokenizer is the teacher's cut by rank.

Where one of the teacher's tokens begins, the probability of a student's token is the sum over all of the teacher's
tokens whose first piece it is. Inside one of the teacher's tokens, the tokens that agree with the pieces that were read
and go on remain; their probabilities, divided by their sum, give the next piece. Both are exact: a text's tokens of the
student are the pieces of the teacher's tokens, one after another.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tinygpt2.alignment.blocks import AlignedBlocks
from tinygpt2.alignment.decomposition import Decomposition
from tinygpt2.models.lm_head import Head, operand_rows, scoring_chunk, wide

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
        self._size, self._width = size, operand_rows(size, device.type)

    def head(self, head: Head, states: Float[Tensor, "S D"]) -> AlignedHead:
        """Return what makes the student's logits of the records of a batch; see `AlignedHead`."""
        return AlignedHead(self, head, states)

    def __call__(self, head: Head, states: Float[Tensor, "S D"], records: Int[Tensor, "N 3"]) -> Float[Tensor, "N W"]:
        """Return the logarithms of the probabilities; only the first V columns count.

        Where the teacher predicts nothing, the next token of the data has all of the probability. Forward KL is then
        the cross-entropy.

        Args:
            head: the teacher's, of its own tokens.
            states: its last hidden states.
            records: see `AlignedBlocks`.
        """
        chunk = scoring_chunk(max(head.size, self._size), states.device.type)
        return torch.cat([self._part(head, states, part) for part in records.split(chunk)])  # type: ignore[no-untyped-call]

    def _part(self, head: Head, states: Tensor, records: Tensor) -> Tensor:
        state, node, token = records.unbind(-1)
        logits = head.logits(states[state.clamp(min=0)])[:, : head.size]
        if len(self._reachable) < head.size:
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


def add_columns(sums: Tensor, columns: Tensor, values: Tensor) -> None:
    """Add each column of the values to one of the sums'."""
    if sums.device.type == "cpu":  # index_add_ would go through the columns one by one
        sums.scatter_add_(1, columns.expand(len(values), -1), values)
    else:
        sums.index_add_(1, columns, values)


class AlignedHead:
    """Makes a student's logits out of records, as a `Head` does out of states.

    Args:
        redistribution, head, states: see `Redistribution`; the states are those of one batch.
    """

    def __init__(self, redistribution: Redistribution, head: Head, states: Float[Tensor, "S D"]) -> None:
        self._redistribution, self._head, self._states = redistribution, head, states

    def logits(self, records: Int[Tensor, "N 3"]) -> Float[Tensor, "N W"]:
        """Return the logarithms of the probabilities; only the first V columns count."""
        return self._redistribution(self._head, self._states, records)

    def given(self, records: Int[Tensor, "N 3"], student: Float[Tensor, "N W"]) -> Float[Tensor, "N W"]:
        """Return what stands for the teacher's logits beside the student's; here these do not matter."""
        return self.logits(records)

    def losses(self, records: Int[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Return the losses of next tokens, in nats; those that the teacher does not predict mean nothing."""
        logits = [self.logits(part).gather(1, part[:, 2:])[:, 0] for part in records.split(256)]  # type: ignore[no-untyped-call]
        return -torch.cat(logits)

    def figures(self, blocks: AlignedBlocks) -> dict[str, Tensor]:
        """Return the metrics of a batch, by their names.

        Args:
            blocks: of the batch.
        """
        return {"teacher/absent": blocks.absent}
