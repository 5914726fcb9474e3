"""The order in which training reads the blocks of a dataset."""

from __future__ import annotations

import numpy as np


class Shuffle:
    """The endless order of the training blocks: one seeded permutation after another, one for each epoch.

    The block at any position can be computed directly, so a run restarts at any step without delay. The sequence of
    global batches does not depend on the number of processes.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, span: slice) -> list[int]:
        return [self._at(position) for position in range(span.start, span.stop)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self._count)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                np.random.default_rng((self._seed, epoch)).permutation(self._count),
            )
        return int(self._order[offset])
