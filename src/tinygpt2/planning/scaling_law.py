"""The held-out loss of a run, predicted from shorter runs of the same model on the same data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinygpt2.utils.types import Array

NOISE = 0.01  # nats: how far apart two seeds of one run are, about (docs/recipes.md: 4.523 and 4.536)
FARTHEST = 64.0  # times the longest run that is known
_EXPONENTS = np.linspace(0.05, 1.0, 96)


@dataclass(frozen=True)
class Forecast:
    """A loss that was predicted, in nats per token, and its standard error."""

    loss: float
    error: float


class Law:
    """loss = E + A / tokens^a, averaged over all exponents a by how well they fit.

    For each exponent, E and A are fitted by least squares. What is predicted is the mean over the exponents, weighted
    by the likelihood of the losses that are known, whose error is `NOISE`. Its error has three parts: E and A are not
    known exactly, the exponents differ, and the new run has the same noise. Few and short runs thus give a large error.

    Args:
        tokens, losses: of the runs, at least three of different lengths; each with a schedule of its own that ends.

    Raises:
        ValueError: there are fewer than three lengths, or no falling law fits the losses.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, equation 2, for one model.
    """

    def __init__(self, tokens: Sequence[int], losses: Sequence[float]) -> None:
        if len(set(tokens)) < 3:
            raise ValueError("a law needs runs of three lengths")
        if not all(map(math.isfinite, losses)):
            raise ValueError("a loss is not finite")
        self._longest = max(tokens)
        scaled, known = np.array(tokens) / self._longest, np.array(losses)
        self._fits: list[tuple[float, Array, Array]] = []  # exponent, (E, A), covariance
        misfits = []
        for exponent in _EXPONENTS:
            x = np.stack([np.ones_like(scaled), scaled**-exponent], 1)
            inverse = np.linalg.inv(x.T @ x)
            found = inverse @ x.T @ known
            if found[0] >= 0 and found[1] > 0:
                self._fits.append((float(exponent), found, NOISE**2 * inverse))
                misfits.append(float(((x @ found - known) ** 2).sum()) / (2 * NOISE**2))
        if not self._fits:
            raise ValueError("the losses do not fall with the tokens")
        shares = np.exp(min(misfits) - np.array(misfits))
        self._shares = shares / shares.sum()

    def at(self, tokens: float) -> Forecast:
        """Return the forecast for a run of so many tokens."""
        rows = [np.array([1.0, (tokens / self._longest) ** -exponent]) for exponent, _, _ in self._fits]
        means = np.array([row @ fit for row, (_, fit, _) in zip(rows, self._fits, strict=True)])
        own = np.array([row @ spread @ row for row, (_, _, spread) in zip(rows, self._fits, strict=True)])
        mean = float(self._shares @ means)
        variance = float(self._shares @ (own + (means - mean) ** 2)) + NOISE**2
        return Forecast(mean, math.sqrt(variance))

    def tokens_for(self, loss: float) -> float | None:
        """Return after how many tokens the predicted loss is this one; None if that is too far away to be predicted."""
        low, high = 1.0, FARTHEST * self._longest
        if self.at(high).loss > loss:
            return None
        for _ in range(100):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.at(middle).loss <= loss else (middle, high)
        return high
