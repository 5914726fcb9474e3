"""Which positions of a batch an objective reads. The host knows them, so no GPU is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tinygpt2.data.batches.batch import to_device
from tinygpt2.utils.types import Array


class Positions:
    """Some positions of the rows of a batch.

    Attributes:
        index: their numbers, if all rows are counted through (N).
    """

    index: Int[Tensor, " N"]

    def of(self, x: Shaped[Tensor, "B T ..."]) -> Shaped[Tensor, "N ..."]:
        """Return the values of these positions, one after another."""
        return x.flatten(0, 1).index_select(0, self.index)


class RealTokens(Positions):
    """Where the real tokens of padded blocks are.

    Args:
        lengths: number of real tokens in each of the B rows.
        length: T, the number of positions in a row.

    Attributes:
        mask: whether a position holds a real token (B, T).
    """

    def __init__(self, lengths: Sequence[int], length: int, device: torch.device) -> None:
        count, before = sum(lengths), [0, *accumulate(length - own for own in lengths)]  # padding in the rows before
        # The only copy from the host: so small that no GPU is waited for.
        known, shift = torch.tensor([list(lengths), before[:-1]]).to(device, non_blocking=True)
        self.mask = torch.arange(length, device=device) < known[:, None]
        self.index = torch.arange(count, device=device) + shift.repeat_interleave(known, output_size=count)


class Predicting(Positions):
    """The positions that predict a target which counts: those before it.

    Args:
        counted: which tokens count as targets (B, T); the first of a row never does.
        length: the number of positions in a row of the values to choose from: T, or T - 1 without the last one.
    """

    def __init__(self, counted: Array, length: int, device: torch.device) -> None:
        rows, places = np.nonzero(counted[:, 1:])
        self.index = to_device(torch.from_numpy(rows * length + places), device)


def kept(x: Shaped[Tensor, "B T ..."], positions: Positions | None) -> Shaped[Tensor, "N ..."]:
    """Return the values of some positions, one after another; of all, if they are None."""
    return x.flatten(0, 1) if positions is None else positions.of(x)
