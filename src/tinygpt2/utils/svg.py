"""A chart as SVG for a web page: it can be read without scripts, and report.js shows the values under the pointer."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape

from tinygpt2.utils.charts import Chart, Series, position, short_number, thinned, ticks

WIDTH, HEIGHT = 560, 330  # units of the drawing, which is scaled to the page
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 16, 14, 58
_MOST = 400  # points of a series; more could not be told apart
COLOURS = 8  # as many as report.css has
_SHAPES = {
    "circle": "M0-5.5A5.5 5.5 0 1 1 0 5.5A5.5 5.5 0 1 1 0-5.5Z",
    "square": "M-5-5H5V5H-5Z",
    "diamond": "M0-7L7 0L0 7L-7 0Z",
    "triangle": "M0-6.5L6.5 5H-6.5Z",
}


def svg_chart(chart: Chart, identity: str) -> str:
    """Return a chart as an HTML figure with a heading, a legend and an SVG drawing.

    Args:
        identity: of the figure; no other figure of the page may have it.
    """
    x_ends, y_ends = chart.x_range(), chart.y_range()

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = position(x, x_ends, log=chart.log), position(y, y_ends, log=chart.log)
        return (
            round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 1),
            round(HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM), 1),
        )

    drawn, lines, shown = [], [], []
    for number, value in enumerate(chart.levels.values()):
        height = place(x_ends[0], value)[1]
        drawn.append(f'<path class="level dash{number % 3}" d="M{_LEFT} {height}H{WIDTH - _RIGHT}"/>')
    for number, one in enumerate(chart.series):
        kept = thinned(one.points, _MOST)
        places = [place(*one.points[index]) for index in kept]
        errors = [one.errors[index] if one.errors else None for index in kept]
        lines.append(_series(places, number, joined=chart.joined))
        lines += [
            f'<path class="line c{number % COLOURS}" d="M{x} {place(x_ends[0], one.points[index][1] - error)[1]}'
            f'V{place(x_ends[0], one.points[index][1] + error)[1]}"/>'
            for (x, _), index, error in zip(places, kept, errors, strict=True)
            if error and (not chart.log or one.points[index][1] > error)
        ]
        shown.append({"name": one.name, "colour": number % COLOURS, "points": [
            [*spot, _exact(one.points[index][0]), _exact(one.points[index][1]) + (f" ± {error:.2g}" if error else "")]
            for spot, index, error in zip(places, kept, errors, strict=True)
        ]})  # fmt: skip
    drawn += reversed(lines)  # the first series lies above the others
    values = {"x": chart.x, "y": chart.y, "joined": chart.joined, "series": shown,
              "levels": [[name, _exact(value)] for name, value in chart.levels.items()],
              "area": [_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM]}  # fmt: skip
    data = escape(json.dumps(values, ensure_ascii=False))
    return f"""<figure class="chart" id="{identity}" data-chart="{data}">
<figcaption>{escape(chart.title)}{_unit(chart)}</figcaption>
{_legend(chart)}
<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(_summary(chart))}">
{_axes(chart, place)}
{"".join(drawn)}
</svg><div class="tip" role="status" hidden></div></div>
</figure>"""


def _series(places: list[tuple[float, float]], number: int, *, joined: bool) -> str:
    colour = number % COLOURS
    if not joined:
        shape = list(_SHAPES.values())[number % len(_SHAPES)]
        return "".join(f'<path class="mark c{colour}" transform="translate({x} {y})" d="{shape}"/>' for x, y in places)
    line = "M" + "L".join(f"{x} {y}" for x, y in places) if places else ""
    dots = places if len(places) <= 40 else []
    return f'<path class="line c{colour}" d="{line}"/>' + "".join(
        f'<circle class="dot c{colour}" cx="{x}" cy="{y}" r="3"/>' for x, y in dots
    )


def _axes(chart: Chart, place: Callable[[float, float], tuple[float, float]]) -> str:
    x_ends, y_ends = chart.x_range(), chart.y_range()
    bottom, lines = HEIGHT - _BOTTOM, []
    for value in ticks(y_ends, log=chart.log):
        height = place(x_ends[0], value)[1]
        lines.append(f'<path class="grid" d="M{_LEFT} {height}H{WIDTH - _RIGHT}"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{height}" dy=".35em" text-anchor="end">{short_number(value)}</text>')
    for value in ticks(x_ends, log=chart.log):
        across = place(value, y_ends[0])[0]
        lines.append(f'<path class="grid" d="M{across} {_TOP}V{bottom}"/>')
        lines.append(f'<text x="{across}" y="{bottom + 20}" text-anchor="middle">{short_number(value)}</text>')
    center = (_LEFT + WIDTH - _RIGHT) / 2
    lines.append(f'<text x="{center}" y="{HEIGHT - 10}" text-anchor="middle">{escape(chart.x)}</text>')
    return "".join(lines)


def _unit(chart: Chart) -> str:
    """Return what the y axis shows; above the drawing, it can be read on a narrow screen."""
    return f"<span>{escape(chart.y)}</span>" if chart.y != chart.title else ""


def _legend(chart: Chart) -> str:
    if chart.joined and len(chart.names) < 2:
        return ""
    items = []
    for number, one in enumerate(chart.series):
        shape = "M-9 0H9" if chart.joined else list(_SHAPES.values())[number % len(_SHAPES)]
        items.append(
            (f'<path class="{"line" if chart.joined else "mark"} c{number % COLOURS}" d="{shape}"/>', one.name)
        )
    for number, name in enumerate(chart.levels):
        items.append((f'<path class="level dash{number % 3}" d="M-9 0H9"/>', name))
    keys = [
        f'<li><svg viewBox="-10 -8 20 16" aria-hidden="true">{mark}</svg>{escape(name)}</li>' for mark, name in items
    ]
    return f'<ul class="legend">{"".join(keys)}</ul>'


def _summary(chart: Chart) -> str:
    """Return a sentence for those who cannot see the drawing."""
    said = [f"{one.name}: {_course(chart, one)}" for one in chart.series if one.points]
    said += [f"{name}: {_exact(value)}" for name, value in chart.levels.items()]
    return f"{chart.title}; {chart.y} by {chart.x}. {'; '.join(said)}. Arrow keys read the points."


def _course(chart: Chart, one: Series) -> str:
    (x, first), (_, last) = one.points[0], one.points[-1]
    if not chart.joined or len(one.points) == 1:
        return f"{_exact(first)} at {_exact(x)}"
    return f"from {_exact(first)} to {_exact(last)}"


def _exact(value: float) -> str:
    """Return a value with the digits that matter."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return short_number(value) if abs(value) < 1e-3 else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.5g}"
