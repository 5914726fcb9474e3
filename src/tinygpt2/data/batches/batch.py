"""A batch of blocks: tokens, how many of them are real, and which of them the loss counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from tinygpt2.utils.types import Array

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


class Batch(NamedTuple):
    """A batch of blocks.

    Attributes:
        input_ids: the tokens (B, T).
        lengths: the number of real tokens in each block, which padding follows. None if there is no padding. They stay
            on the host, because reading them from a GPU would wait for it.
        counted: which tokens count as targets (B, T), as an array of the host; the first token of a block never does.
            None if all real tokens but the first do.
        documents: the lengths of the documents in each block, which no token sees beyond its own; they add up to T, as
            padding belongs to the last one. None if a token sees all tokens before it.
        own_text: which blocks are text that a model sampled (B,), as an array of the host. None if none is.
        drawn: the log-probabilities with which the tokens of sampled text were drawn (B, T), float32, as an array of
            the host. None if they are those of the models as they are now.
    """

    input_ids: Int[Tensor, "B T"]
    lengths: list[int] | None
    counted: Array | None = None
    documents: list[list[int]] | None = None
    own_text: Array | None = None
    drawn: Array | None = None

    def to(self, device: Any) -> Batch:
        """Return the batch with its tokens on another device."""
        return self._replace(input_ids=to_device(self.input_ids, device))

    def part(self, start: int, stop: int) -> Batch:
        """Return some of the blocks; if none of them is padded, without lengths."""
        ids, lengths = self.input_ids[start:stop], self.lengths and self.lengths[start:stop]
        counted = None if self.counted is None else self.counted[start:stop]
        documents = self.documents and self.documents[start:stop]
        own_text = None if self.own_text is None else self.own_text[start:stop]
        drawn = None if self.drawn is None else self.drawn[start:stop]
        shorter = lengths if lengths and min(lengths) < ids.shape[1] else None
        return Batch(ids, shorter, counted, documents, own_text, drawn)

    def answers(self, block: int) -> Iterator[tuple[int, int, int]]:
        """Yield where each run of counted tokens in a block of pairs begins and ends, after where its pair begins."""
        begins, counted = 0, cast("Array", self.counted)[block].astype(np.int8)
        for length in cast("list[list[int]]", self.documents)[block]:
            edges = np.flatnonzero(np.diff(counted[begins : begins + length], prepend=0, append=0)) + begins
            for first, stop in edges.reshape(-1, 2).tolist():
                yield begins, first, stop
            begins += length

    @property
    def real_lengths(self) -> list[int]:
        """The number of real tokens in each block, also if there is no padding."""
        size, length = self.input_ids.shape
        return self.lengths or [length] * size

    @property
    def targets(self) -> list[int]:
        """The number of targets that count in each block."""
        if self.counted is not None:
            return [int(count) for count in self.counted[:, 1:].sum(1)]
        return [max(0, length - 1) for length in self.real_lengths]


def to_device(host: Tensor, device: Any) -> Tensor:
    """Return a tensor on a device. A GPU is not waited for: it copies the tensor from memory that cannot be paged."""
    import torch

    pinned = torch.device(device).type == "cuda"
    return (host.pin_memory() if pinned and not host.is_pinned() else host).to(device, non_blocking=pinned)
