"""`runs` and `show` on a terminal: the list of runs, and curves drawn with braille dots.

The curves are some 80 lines of code: a library for plots on terminals would be one more dependency for everybody.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt2.utils.charts import Chart, position, short_number, ticks
from tinygpt2.utils.terminal import printable
from tinygpt2.utils.units import duration

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = ("cyan", "yellow", "green", "magenta", "red", "blue")
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of a braille character: 4 rows of 2 dots
_ROWS, _WIDEST, _PIPED = 12, 100, 100
_LABEL = 9  # columns for the numbers of the y axis


def render_runs(result: Any, console: Console) -> None:
    """Print the list of runs."""
    from rich.table import Table
    from rich.text import Text

    if not result.runs:
        console.print("no training runs here", markup=False)
        return
    root = _common([Path(run.path) for run in result.runs])
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "command", "state", "loss", "perplexity", "age"):
        right = heading in ("loss", "perplexity", "age")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for run in result.runs:
        numbers = [short_number(value) if value is not None else "-" for value in (run.loss, run.perplexity)]
        name = str(Path(run.path).relative_to(root)) if Path(run.path) != root else Path(run.path).name
        cells = [name, run.command, state_of(run), *numbers, duration(_age(run.updated))]
        table.add_row(*(Text(printable(cell, sys.stdout)) for cell in cells))
    console.print(table)
    for run in result.runs:
        if run.problem:
            console.print(f"{Path(run.path).name} failed: {run.problem}", markup=False, soft_wrap=True)


def state_of(run: Any) -> str:
    """Say in a few words what a run does and how far it is."""
    steps = f"step {run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")
    if run.state == "done":
        return f"done, {run.step:,} steps"
    if run.state in ("running", "maybe running"):
        left = "" if run.seconds_left is None else f", {duration(run.seconds_left)} left"
        return f"{run.state.replace('maybe', 'maybe still')} on {run.host}/{run.process}, {steps}{left}"
    return f"{run.state} at {steps}"


def _saved(run: Any) -> str:
    """Say from which step a run that has not ended can go on."""
    if run.state == "done":
        return ""
    return f", saved at step {run.checkpoint:,}" if run.checkpoint is not None else ", nothing saved yet"


def _age(moment: str) -> float:
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())


def _common(paths: list[Path]) -> Path:
    """Return the directory that all runs are in."""
    root = paths[0].parent
    while not all(path.is_relative_to(root) for path in paths):
        root = root.parent
    return root


def render_show(result: Any, console: Console) -> None:
    """Print a run's state and draw its curves."""
    run = result.run
    perplexity = f", held-out perplexity {run.perplexity:,.2f}" if run.perplexity is not None else ""
    console.print(f"{run.command} {Path(run.path).name}: {state_of(run)}{_saved(run)}{perplexity}", markup=False)
    if run.problem:
        console.print(f"failed: {run.problem}", markup=False, soft_wrap=True)
    width = min(console.width, _WIDEST) if sys.stdout.isatty() else _PIPED
    for chart in result.curves:
        console.print()
        for line in drawn(chart, width):
            console.print(line, soft_wrap=True)
    written = [Path(path).name for path in (result.picture, result.report) if path]
    if written:
        console.print(f"\n{' and '.join(written)} written in {Path(run.path)}", markup=False, soft_wrap=True)


def drawn(chart: Chart, width: int) -> Iterator[Any]:
    """Yield the lines of a chart as rich texts: title, legend, curves with the numbers of the axes."""
    from rich.text import Text

    columns = width - _LABEL - 2
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(chart.names))]
    yield Text(f"{chart.title} ({chart.y})" if chart.title != chart.y else chart.title, style="bold")
    if len(chart.names) > 1:
        legend = Text()
        for name, colour in zip(chart.names, colours, strict=True):
            legend.append("- - " if name in chart.levels else "--- ", style=colour).append(f"{name}   ")
        yield legend
    cells, owners = _canvas(chart, columns)
    y_ends, x_ends = chart.y_range(), chart.x_range()
    marks = {
        _ROWS - 1 - min(_ROWS - 1, int(position(value, y_ends, log=chart.log) * _ROWS)): short_number(value)
        for value in ticks(y_ends, 4, log=chart.log)
    }
    for row in range(_ROWS):
        line = Text(f"{marks.get(row, ''):>{_LABEL}} ").append("┤" if row in marks else "│")
        for column in range(columns):
            mask = cells.get((row, column), 0)
            line.append(chr(0x2800 + mask) if mask else " ", style=colours[owners[row, column]] if mask else "")
        yield line
    below = [" "] * columns
    for value in ticks(x_ends, 5, log=chart.log):
        label = short_number(value)
        start = min(int(position(value, x_ends, log=chart.log) * columns), columns - len(label))
        if all(cell == " " for cell in below[max(0, start - 1) : start + len(label) + 1]):
            below[start : start + len(label)] = label
    yield Text(f"{'':>{_LABEL}} └{f' {chart.x}':─>{columns}}")
    yield Text(f"{'':>{_LABEL}}  {''.join(below).rstrip()}")


def _canvas(chart: Chart, columns: int) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """Return the braille dots of each character, and the number of the series or level that drew it last."""
    cells: dict[tuple[int, int], int] = {}
    owners: dict[tuple[int, int], int] = {}
    across, up = columns * 2 - 1, _ROWS * 4 - 1

    def dot(x: int, y: int, owner: int) -> None:
        row, column = (up - y) // 4, x // 2
        cells[row, column] = cells.get((row, column), 0) | _DOTS[(up - y) % 4][x % 2]
        owners[row, column] = owner

    x_ends, y_ends = chart.x_range(), chart.y_range()
    for number, value in enumerate(chart.levels.values(), len(chart.series)):
        height = round(position(value, y_ends, log=chart.log) * up)
        for x in range(across + 1):
            if x % 6 < 3:
                dot(x, height, number)
    for number, one in reversed(list(enumerate(chart.series))):  # the first series lies above the others
        places = [
            (round(position(x, x_ends, log=chart.log) * across), round(position(y, y_ends, log=chart.log) * up))
            for x, y in one.points
        ]
        for place in places[:1]:
            dot(*place, number)
        for (x0, y0), (x1, y1) in pairwise(places):
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            for step in range(steps + 1):
                dot(round(x0 + (x1 - x0) * step / steps), round(y0 + (y1 - y0) * step / steps), number)
    return cells, owners
