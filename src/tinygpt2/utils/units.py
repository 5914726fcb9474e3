"""Numbers for people: with as many digits as tell something, in the unit that fits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any


def number(value: Any) -> str:
    """Return a number with separators between thousands, or four digits of a fraction; `-` for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def percent(share: float | None, error: float | None = None) -> str:
    """Return a share with its standard error: 45.20%, or 45.20% ± 1.10%; `-` for None."""
    return "-" if share is None else f"{share:.2%}" + ("" if error is None else f" ± {error:.2%}")


def size(count: float) -> str:
    """Return a number of bytes: 512 bytes, 1.2 kB, 12.4 MB, 548 MB."""
    units = ((" kB", 1e3), (" MB", 1e6), (" GB", 1e9), (" TB", 1e12))
    return f"{count:.0f} bytes" if count < 1000 else _scaled(count, units)


def short_count(count: float) -> str:
    """Return a number such as that of a model's parameters: 812, 85.7k, 6.9M, 124M, 1.5B."""
    return f"{count:.0f}" if count < 1000 else _scaled(count, (("k", 1e3), ("M", 1e6), ("B", 1e9)))


def duration(seconds: float) -> str:
    """Return a time: 0.25 s, 42 s, 3 min 12 s, 2 h 5 min, 3 days 4 h."""
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    for (large, name), (small, rest) in pairwise(_TIMES):
        if whole >= large:
            many, few = whole // large, whole % large // small
            plural = "s" if name == "day" and many > 1 else ""
            return f"{many} {name}{plural}" + (f" {few} {rest}" if few else "")
    return f"{whole} s"


_TIMES = ((86400, "day"), (3600, "h"), (60, "min"), (1, "s"))


def _scaled(count: float, units: tuple[tuple[str, float], ...]) -> str:
    name, scale = next((unit for unit in units if count < 999.5 * unit[1]), units[-1])
    value = count / scale
    return f"{value:.1f}{name}" if value < 99.95 else f"{value:,.0f}{name}"
