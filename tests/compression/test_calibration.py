"""What a cut is measured on, and the products that are summed over it."""

from __future__ import annotations

import pytest
import torch

from tinygpt2.compression.calibration import add_products, calibration_count
from tinygpt2.data.dataset import Blocks


@pytest.mark.parametrize(
    ("length", "asked", "expected"),
    [(128, None, 64), (512, None, 64), (1024, None, 32), (40_000, None, 1), (1024, 7, 7)],
)
def test_long_blocks_are_fewer(length: int, asked: int | None, expected: int) -> None:
    assert calibration_count(Blocks([], length), asked) == expected


@pytest.mark.parametrize("size", [3, 512, 700, 1100])
def test_products_are_those_of_whole_matrices(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    batches = [torch.randn(50, size, generator=generator) for _ in range(2)]
    total = torch.zeros(size, size, dtype=torch.float64)
    for rows in batches:
        add_products(total, rows)
    exact = sum((rows.double().T @ rows.double() for rows in batches), torch.zeros(size, size, dtype=torch.float64))
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(total, total.T, rtol=1e-6, atol=1e-5)
