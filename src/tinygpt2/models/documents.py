"""Attention inside each document of a block, without a T x T matrix.

On a GPU in 16 bits it is torch's attention for sequences of various lengths. Elsewhere documents of similar length are
put side by side, padded at their ends, which no earlier token sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


class Documents:
    """Where the documents of a batch of blocks are.

    Args:
        lengths: of the documents in each of the B blocks; those of a block add up to T.

    Attributes:
        lengths: as the argument.
        positions: the position of each token in its document (B, T).
        longest: the length of the longest document.
        ends: where each document begins if all blocks are one sequence, and where the last one ends (n + 1).
    """

    def __init__(self, lengths: Sequence[Sequence[int]], device: torch.device) -> None:
        every = [length for row in lengths for length in row]
        self.lengths, self.longest, self._device = lengths, max(every), device
        starts = [0, *accumulate(every)]
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], every)
        self.positions = self._sent(positions).view(len(lengths), -1)
        self.ends = self._sent(np.array(starts, np.int32))
        self._groups, self._inverse = self._grouped(np.array(every), np.array(starts[:-1]))

    def _sent(self, values: np.ndarray[Any, Any]) -> Tensor:
        """Return a tensor on the device, which is not waited for."""
        host, pinned = torch.from_numpy(values), self._device.type == "cuda"
        return (host.pin_memory() if pinned else host).to(self._device, non_blocking=pinned)

    def _grouped(self, every: np.ndarray[Any, Any], starts: np.ndarray[Any, Any]) -> tuple[list[Tensor], Tensor]:
        """Return the tokens of documents of similar length as tables, and where in them each token is.

        A document may be padded by up to half of its length; padding repeats its last token.
        """
        groups, inverse, before = [], np.empty(int(every.sum()), np.int64), 0
        steps = np.ceil(2 * np.log2(every))  # lengths within a factor of the square root of 2
        for step in np.unique(steps):
            chosen = np.flatnonzero(steps == step)
            length = int(every[chosen].max())
            columns = np.arange(length)
            index = starts[chosen, None] + np.minimum(columns, every[chosen, None] - 1)
            real = columns < every[chosen, None]
            inverse[index[real]] = before + np.flatnonzero(real)
            before += index.size
            groups.append(self._sent(index))
        return groups, self._sent(inverse)

    def apart(self, x: Shaped[Tensor, "B T ..."]) -> Iterable[Shaped[Tensor, "n L ..."]]:
        """Yield the documents as padded batches, those of similar length in one."""
        flat = x.flatten(0, 1)
        for index in self._groups:
            yield flat[index]

    def together(self, parts: Iterable[Shaped[Tensor, "n L ..."]], size: int) -> Shaped[Tensor, "B T ..."]:
        """Return the blocks whose documents are given as `apart` yields them.

        Args:
            size: B, the number of blocks.
        """
        flat = torch.cat([part.flatten(0, 1) for part in parts])
        return flat.index_select(0, self._inverse).view(size, -1, *flat.shape[1:])

    def attend(
        self,
        query: Float[Tensor, "B H T K"],
        key: Float[Tensor, "B H T K"],
        value: Float[Tensor, "B H T K"],
        scale: float,
        dropout: float,
    ) -> Float[Tensor, "B H T K"]:
        """Return causal attention inside each document."""
        sides = [x.transpose(1, 2) for x in (query, key, value)]
        short = query.dtype in (torch.float16, torch.bfloat16)
        kernel = varlen_kernel() if short and query.device.type == "cuda" else None
        if kernel is not None and not dropout:
            flat = [x.flatten(0, 1) for x in sides]
            ends = self.ends, self.ends, self.longest, self.longest
            mixed: Tensor = kernel(*flat, *ends, scale=scale, window_size=(-1, 0))
            return mixed.view(sides[0].shape).transpose(1, 2)
        parts = []
        for group in zip(*map(self.apart, sides), strict=True):
            q, k, v = (x.transpose(1, 2) for x in group)
            found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
            parts.append(found.transpose(1, 2))
        return self.together(parts, len(query)).transpose(1, 2)


@cache
def varlen_kernel() -> Callable[..., Any] | None:
    """Return torch's attention for sequences of various lengths, or None if this version has none with a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size"} <= set(known) else None


def without_last(lengths: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the lengths of the documents of blocks without their last token."""
    return [[*row[:-1], row[-1] - 1] if row[-1] > 1 else list(row[:-1]) for row in lengths]
