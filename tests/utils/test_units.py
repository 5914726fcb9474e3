"""Numbers for people."""

from __future__ import annotations

import pytest

from tinygpt2.utils.units import duration, number, short_count, size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1234, "1.2 kB"), (12_400_000, "12.4 MB"), (99_970_000, "100 MB"),
     (548_105_171, "548 MB"), (999_600_000, "1.0 GB"), (3.2e9, "3.2 GB"), (5e15, "5,000 TB")],
)  # fmt: skip
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.25, "0.25 s"), (9.97, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (192, "3 min 12 s"),
     (3600, "1 h"), (7500, "2 h 5 min"), (86399.9, "1 day"), (273600, "3 days 4 h")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts_and_numbers() -> None:
    assert [short_count(count) for count in (12, 85_728, 6_900_000, 124_439_808, 1.5e9)] == [
        "12", "85.7k", "6.9M", "124M", "1.5B",
    ]  # fmt: skip
    assert [number(value) for value in (None, True, 12345, 0.00117234, 98.4449, 1234.5, "x")] == [
        "-", "yes", "12,345", "0.001172", "98.44", "1,234", "x",
    ]  # fmt: skip
