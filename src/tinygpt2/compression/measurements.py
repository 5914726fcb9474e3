"""What is measured of a teacher before it is cut, once for all cuts of it."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.compression.calibration import Batches
from tinygpt2.compression.rotation import StreamMoments, stream_moments
from tinygpt2.compression.selection import Moments, projection_moments, removal_order


class Measurements:
    """The measurements of a teacher on calibration texts, each of which is taken when it is first needed.

    The moments of a block stay in memory: 8 bytes for each pair of inner units (113 MB a block for GPT-2 small).

    Args:
        teacher: on the device to measure on.
        batches: calibration texts.
    """

    def __init__(self, teacher: GPT2LMHeadModel, batches: Batches) -> None:
        self.teacher, self.batches = teacher, batches
        self._stream: dict[bool, StreamMoments] = {}
        self._projections: dict[int, tuple[Moments, Moments, Moments]] = {}
        self._orders: dict[int, Int[Tensor, " F"]] = {}

    def stream(self, *, tied: bool) -> StreamMoments:
        """Return the moments of the residual stream; see `stream_moments`."""
        if tied not in self._stream:
            self._stream[tied] = stream_moments(self.teacher, self.batches, tied=tied)
        return self._stream[tied]

    def projections(self, layers: Sequence[int]) -> list[tuple[Moments, Moments, Moments]]:
        """Return the moments of what the projections of some blocks read; see `projection_moments`."""
        missing = [layer for layer in layers if layer not in self._projections]
        if missing:
            found = projection_moments(self.teacher, self.batches, missing)
            self._projections |= dict(zip(missing, found, strict=True))
        return [self._projections[layer] for layer in layers]

    def unit_order(self, layer: int) -> Int[Tensor, " F"]:
        """Return the inner units of a block in the order in which they are removed, for a stream of the old width.

        It takes seconds to find, and comes close to the choice that `least_missed` makes for a narrower stream.
        """
        if layer not in self._orders:
            ((_, _, units),) = self.projections([layer])
            weight = self.teacher.transformer.h[layer].mlp.c_proj.weight
            self._orders[layer] = removal_order(units.covariance, weight.detach().cpu().double(), 1)
        return self._orders[layer]
