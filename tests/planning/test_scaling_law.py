"""The law of losses: laws that are known, noise, and what cannot be predicted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinygpt2.planning.scaling_law import Law


def true(tokens: float, floor: float = 3.0, factor: float = 300.0, exponent: float = 0.4) -> float:
    return floor + factor / tokens**exponent


LENGTHS = [250_000, 500_000, 1_000_000]


@pytest.mark.parametrize("exponent", [0.2, 0.4, 0.7])
def test_a_known_law_lies_within_the_error(exponent: float) -> None:
    """Three exact lengths, and runs of 2 to 16 times the longest: two standard errors hold the truth."""
    factor = 2.0 * 1_000_000**exponent
    law = Law(LENGTHS, [true(n, 3.0, factor, exponent) for n in LENGTHS])
    errors = []
    for times in (2, 4, 16):
        found = law.at(times * 1_000_000)
        assert abs(found.loss - true(times * 1_000_000, 3.0, factor, exponent)) <= 2 * found.error
        errors.append(found.error)
    assert errors == sorted(errors)  # the farther, the less certain
    assert law.at(750_000).loss == pytest.approx(true(750_000, 3.0, factor, exponent), abs=0.02)


def test_the_error_covers_noisy_runs_as_often_as_it_should() -> None:
    random, inside = np.random.default_rng(0), 0
    for _ in range(200):
        law = Law(LENGTHS, [true(n) + random.normal(0, 0.01) for n in LENGTHS])
        found = law.at(4_000_000)
        inside += abs(found.loss - true(4_000_000) - random.normal(0, 0.01)) <= 2 * found.error
    assert inside >= 190


def test_the_mean_of_exponents_is_that_of_a_plain_computation() -> None:
    losses = [5.1, 4.6, 4.3]
    weights, means = [], []
    for exponent in np.linspace(0.05, 1.0, 96):
        x = np.array([[1.0, n ** -float(exponent)] for n in (0.25, 0.5, 1.0)])
        (floor, factor), *_ = np.linalg.lstsq(x, np.array(losses), rcond=None)
        if floor >= 0 and factor > 0:
            weights.append(math.exp(-sum((x @ [floor, factor] - losses) ** 2) / (2 * 0.01**2)))
            means.append(floor + factor * 3.0 ** -float(exponent))
    expected = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    assert Law(LENGTHS, losses).at(3_000_000).loss == pytest.approx(expected, rel=1e-9)


def test_tokens_for_a_loss() -> None:
    law = Law(LENGTHS, [true(n) for n in LENGTHS])
    found = law.tokens_for(law.at(3_000_000).loss)
    assert found == pytest.approx(3_000_000, rel=1e-6)
    assert law.tokens_for(1.0) is None


@pytest.mark.parametrize(
    ("tokens", "losses", "message"),
    [
        ([1000, 2000], [5.0, 4.0], "three lengths"),
        ([1000, 2000, 4000], [4.0, 4.5, 5.0], "do not fall"),
        ([1000, 2000, 4000], [5.0, math.nan, 4.0], "not finite"),
    ],
)
def test_what_cannot_be_predicted(tokens: list[int], losses: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Law(tokens, losses)


def test_leaving_one_length_out() -> None:
    tokens = [*LENGTHS, 2_000_000, 4_000_000]
    for left in tokens:
        kept = [n for n in tokens if n != left]
        assert Law(kept, [true(n) for n in kept]).at(left).loss == pytest.approx(true(left), abs=0.03)
