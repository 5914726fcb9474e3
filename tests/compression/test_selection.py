"""Heads and inner units chosen by what a refit leaves: the costs against plain least squares."""

from __future__ import annotations

import pytest
import torch

from tests.compression.test_heads import queries_keys_values
from tests.compression.test_rotation import IDS, lively
from tinygpt2.compression import selection
from tinygpt2.compression.selection import least_missed, projection_moments


def missed(x: torch.Tensor, target: torch.Tensor, columns: list[int]) -> float:
    """Return the squared error of the best fit of the target by some columns and a bias."""
    known = torch.cat([x[:, columns], torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    fit = known @ torch.linalg.lstsq(known, target).solution
    return float((target - fit).pow(2).sum())


@pytest.mark.parametrize("group", [1, 3])
def test_each_removal_is_the_one_that_costs_least_after_a_refit(group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ torch.randn(
        12, 12, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    left = list(range(12 // group))
    moments = torch.cov(x.T, correction=0)

    def columns(groups: list[int]) -> list[int]:
        return [group * one + k for one in groups for k in range(group)]

    while len(left) > 1:
        left.remove(min(left, key=lambda gone: missed(x, x @ weight, columns([g for g in left if g != gone]))))
        assert least_missed(moments, weight, len(left), group).tolist() == left


def test_many_units_are_removed_in_rounds_and_beat_the_most_active_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(900, 40, generator=generator, dtype=torch.float64) @ torch.randn(
        40, 300, generator=generator, dtype=torch.float64
    )
    x += 0.1 * torch.randn(900, 300, generator=generator, dtype=torch.float64)
    weight = torch.randn(300, 16, generator=generator, dtype=torch.float64)
    kept = least_missed(torch.cov(x.T, correction=0), weight, 60)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == 60
    active = x.abs().mean(0).topk(60).indices.tolist()
    assert missed(x, x @ weight, kept.tolist()) < missed(x, x @ weight, active)


def test_moments_are_covariances(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively()
    whole = list(projection_moments(model, [IDS[:2], IDS[2:]], [0, 2]))
    for layer, (_, heads, units) in zip((0, 2), whole, strict=True):
        mixed = queries_keys_values(model, layer)[1]
        torch.testing.assert_close(heads.covariance, torch.cov(mixed.T, correction=0))
        torch.testing.assert_close(heads.mean, mixed.mean(0))
        assert units.covariance.shape == (96, 96)
        assert bool((units.covariance.diagonal() > 0).all())
    monkeypatch.setattr(selection, "_NUMBERS", 1)  # one block in each pass
    for one, other in zip(whole, projection_moments(model, [IDS], [0, 2]), strict=True):
        for some, same in zip(one, other, strict=True):
            torch.testing.assert_close(some.covariance, same.covariance)
