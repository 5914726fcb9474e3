"""Charts as plain data. The same chart becomes a picture, a part of a web page, or a drawing on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

_MARGIN, _WIDE_MARGIN = 0.04, 0.1  # of an axis, on each side, without points; if they are not joined, they are large


@dataclass(frozen=True)
class Series:
    """Points that belong together, in the order in which a line joins them.

    Attributes:
        points: pairs of x and y.
        errors: the standard error of each y, or None where it is not known; empty if none is known.
    """

    name: str
    points: list[tuple[float, float]]
    errors: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """One pair of axes.

    Attributes:
        x, y: what the axes show, with the unit.
        levels: named values of y to which the series are compared, drawn as horizontal lines.
        joined: whether a line joins the points of each series.
        log: whether both axes are logarithmic; all values must then be positive.
    """

    title: str
    x: str
    y: str
    series: list[Series]
    levels: dict[str, float] = field(default_factory=dict)
    joined: bool = True
    log: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the series and of the levels, in the order of their colours."""
        return [*(one.name for one in self.series), *self.levels]

    def x_range(self) -> tuple[float, float]:
        """Return the ends of the x axis."""
        return self._ends([x for one in self.series for x, _ in one.points])

    def y_range(self) -> tuple[float, float]:
        """Return the ends of the y axis."""
        values = [y for one in self.series for _, y in one.points] + [*self.levels.values()]
        if not self.log:
            values += [y + way * e for s in self.series for (_, y), e in zip(s.points, s.errors, strict=False) if e
                       for way in (-1, 1)]  # fmt: skip
        return self._ends(values)

    def _ends(self, values: list[float]) -> tuple[float, float]:
        return _widened(values, _MARGIN if self.joined else _WIDE_MARGIN, log=self.log)


def _widened(values: list[float], margin: float, *, log: bool) -> tuple[float, float]:
    if not values:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        edge = (high / low) ** margin if high > low else 1.2
        return low / edge, high * edge
    edge = (high - low) * margin if high > low else abs(high) * 0.1 or 1.0
    return low - edge, high + edge


def position(value: float, ends: tuple[float, float], *, log: bool) -> float:
    """Return where a value lies between the ends of an axis: 0 at the lower one, 1 at the upper one."""
    if log:
        value, ends = math.log(value), (math.log(ends[0]), math.log(ends[1]))
    return (value - ends[0]) / (ends[1] - ends[0])


def ticks(ends: tuple[float, float], count: int = 5, *, log: bool = False) -> list[float]:
    """Return round numbers between the ends of an axis, about `count` of them."""
    low, high = ends
    if log and high / low > 6:
        found: list[float] = []
        for steps in ((1,), (1, 3), (1, 2, 5)):
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            every = [step * 10.0**power for power in powers for step in steps]
            fitting = [value for value in every if low <= value <= high]
            if len(fitting) <= count + 1:
                found = fitting
        if len(found) > 1:
            return found
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.99)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def short_number(value: float) -> str:
    """Return a number in a few characters: 4 digits, with k, M or B for thousands, millions and billions."""
    size = abs(value)
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= scale * 0.99995:
            return f"{value / (1e3 if unit == 'k' else scale):.4g}{unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[int]:
    """Return the numbers of at most `most` evenly spread points; the first and the last are always among them."""
    if len(points) <= most:
        return list(range(len(points)))
    return sorted({round(number * (len(points) - 1) / (most - 1)) for number in range(most)})
