"""Draw charts as PNG files with matplotlib, if it is installed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tinygpt2.errors import one_line
from tinygpt2.utils.charts import Chart, short_number, ticks
from tinygpt2.utils.files import atomic_path
from tinygpt2.utils.progress import say, warn

COLOURS = ("#1f6fb4", "#c2410c", "#15803d", "#7e22ce", "#be185d", "#0e7490", "#854d0e", "#4b5563")
_MARKERS = "osD^vPX*"
_GREY = "#57606a"


@cache
def plots_available() -> bool:
    """Return whether pictures can be drawn. If they cannot, say once on stderr how to get what is missing."""
    if find_spec("matplotlib") is not None:
        return True
    say("pictures are skipped: pip install 'tinygpt2[plots]'")
    return False


@contextmanager
def plot_may_fail(path: str) -> Iterator[None]:
    """Warn if the block cannot write a picture: what it shows was measured, and is not lost with it."""
    try:
        yield
    except OSError as error:
        warn(f"--plot {path} was not written: {one_line(error)}")


def draw(charts: Sequence[Chart], path: Path, title: str = "", columns: int = 3) -> bool:
    """Draw charts beside and below each other as a PNG file; return whether there is one.

    If points are not joined, a legend below all charts names the series: a series has the same colour and marker in
    every chart. Without matplotlib nothing is drawn. If writing fails, no partial file is left.
    """
    if not charts:
        return False
    columns = min(columns, len(charts)) if len(charts) != 4 else 2
    rows = math.ceil(len(charts) / columns)
    size = (max(5.4 * columns, 6.4), 3.9 * rows + (0.4 if title else 0))
    return paint(path, size, partial(_draw_all, charts=charts, title=title, rows=rows, columns=columns))


def paint(path: Path, size: tuple[float, float], fill: Callable[[Any], None]) -> bool:
    """Let `fill` draw in an empty figure of this size (inches) and save it; return False without matplotlib."""
    if not plots_available():
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    with warnings.catch_warnings(), atomic_path(path) as temporary:
        warnings.simplefilter("ignore", UserWarning)  # of characters that the font lacks
        fill(figure)
        figure.savefig(temporary, dpi=110, format="png")
    return True


def _draw_all(figure: Any, charts: Sequence[Chart], title: str, rows: int, columns: int) -> None:
    names = list(dict.fromkeys(one.name for chart in charts for one in chart.series))
    handles: dict[str, Any] = {}
    for number, chart in enumerate(charts, 1):
        handles |= _draw(figure.add_subplot(rows, columns, number), chart, names)
    if not charts[0].joined:
        widest = max(map(len, names))
        fitting = max(1, int(13 * columns / (0.13 * widest + 1) / 2))
        shown = [_plain(name) for name in handles]
        columns = min(len(names), fitting)
        figure.legend(handles.values(), shown, loc="outside lower center", ncols=columns, fontsize=9)
    if title:
        figure.suptitle(_plain(title))


def _draw(axis: Any, chart: Chart, names: list[str]) -> dict[str, Any]:
    """Draw one chart; return what the legend shows for each series."""
    handles = {}
    for one in chart.series:
        number = [another.name for another in chart.series].index(one.name) if chart.joined else names.index(one.name)
        xs, ys = [x for x, _ in one.points], [y for _, y in one.points]
        errors = [error or 0.0 for error in one.errors] if any(one.errors) else None
        few = len(xs) <= 40
        handles[one.name] = axis.errorbar(
            xs,
            ys,
            yerr=errors,
            color=COLOURS[number % len(COLOURS)],
            marker=("." if few else None) if chart.joined else _MARKERS[number % len(_MARKERS)],
            linestyle="-" if chart.joined else "none",
            linewidth=1.4,
            markersize=6 if chart.joined else 9,
            markerfacecolor=None if chart.joined else "none",  # points at the same place can all be seen
            markeredgewidth=1 if chart.joined else 2,
            capsize=2,
            zorder=3 - number / 100,  # the first series lies above the others
        )
    for number, (name, value) in enumerate(chart.levels.items()):
        style = ("--", ":", "-.")[number % 3]
        handles[name] = axis.axhline(value, color=_GREY, linestyle=style, linewidth=1.4)
    axis.set_title(_plain(chart.title), fontsize=11)
    axis.set(xlabel=_plain(chart.x), ylabel=_plain(chart.y))
    for which, ends in (("x", chart.x_range()), ("y", chart.y_range())):
        scale, side = getattr(axis, f"set_{which}scale"), getattr(axis, f"{which}axis")
        scale("log" if chart.log else "linear")
        getattr(axis, f"set_{which}lim")(ends)
        marks = ticks(ends, log=chart.log)
        side.set_ticks(marks, [short_number(mark) for mark in marks])
        side.set_ticks([], minor=True)
    axis.grid(color="#d0d7de", linewidth=0.6)
    axis.set_axisbelow(True)
    for edge in ("top", "right"):
        axis.spines[edge].set_visible(False)
    if chart.joined and len(chart.names) > 1:
        axis.legend(handles.values(), [_plain(name) for name in handles], fontsize=9, framealpha=0.9)
    return handles


def _plain(text: str) -> str:
    """Return text that matplotlib shows as it is: no formula, and not hidden because it starts with an underscore."""
    text = text.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text
