"""Bars of progress that fit the window of a terminal, and the same facts in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column, Table
from rich.text import Text

from tinygpt2.utils.terminal import open_console
from tinygpt2.utils.units import short_count, size

_WINDOW = 300.0  # seconds over which rates are averaged


def make_bars(clock: Callable[[], float], *, live: bool, transient: bool) -> Progress:
    """Return bars on stderr; the columns follow the width of the window. If they are not `live`, they only measure.

    Each task has two fields: `unit`, the plural of what is counted, and `note`, a text beside the bar.
    """
    console = open_console(stderr=True)

    class Bars(Progress):
        def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
            shown = list(tasks)
            self.columns = _columns(console.width, any(task.fields["note"] for task in shown))
            return super().make_tasks_table(shown)

    return Bars(
        console=console, refresh_per_second=4, speed_estimate_period=_WINDOW, transient=transient,
        redirect_stdout=False, get_time=clock, disable=not live,
    )  # fmt: skip


class _Cell(ProgressColumn):
    """A column that shows a text of one line, which is cut if it `shrinks` to fit the window."""

    def __init__(self, text: Callable[[Task], str], style: str = "", *, shrinks: bool = False) -> None:
        super().__init__(Column(no_wrap=not shrinks))
        self._text, self._style = text, style

    def render(self, task: Task) -> Text:
        return Text(self._text(task), self._style, no_wrap=True, overflow="ellipsis")


@lru_cache(maxsize=2)
def _columns(width: int, noted: bool) -> tuple[ProgressColumn, ...]:
    """Return the columns that fit a window: names and notes are shortened, rates left out if there are notes."""
    bar = 28 if width >= 110 else 16 if width >= 80 else 10
    columns: list[ProgressColumn] = [_Cell(lambda task: task.description, shrinks=True)]
    columns += [BarColumn(bar, table_column=Column(no_wrap=True))] if width >= 50 else []
    columns += [_Cell(_count, "progress.download")]
    columns += [_Cell(_rate, "progress.data.speed")] if width >= (100 if noted else 70) else []
    columns += [_Cell(_time, "progress.remaining")]
    columns += [_Cell(lambda task: task.fields["note"], "dim", shrinks=True)] if width >= 70 else []
    return tuple(columns)


def state(task: Task) -> str:
    """Return how far a stage is: count, rate, time left and note."""
    done, unit = int(task.completed), task.fields["unit"]
    count = ""
    if task.total:
        count = f"{amount(done, unit, bare=unit != 'bytes')} of {amount(int(task.total), unit)}"
    elif done:
        count = amount(done, unit)
    return ", ".join(part for part in (count, _rate(task), _time(task), task.fields["note"]) if part)


def _count(task: Task) -> str:
    done, unit = int(task.completed), task.fields["unit"]
    if task.total is None:
        return amount(done, unit, bare=True) if done else ""
    return f"{amount(done, unit, bare=True)}/{amount(int(task.total), unit, bare=True)}"


def _rate(task: Task) -> str:
    speed, unit = task.finished_speed or task.speed, task.fields["unit"]
    if not speed or not unit:
        return ""
    if unit == "bytes":
        return f"{amount(int(speed), unit)}/s"
    if speed < 1:
        return f"{1 / speed:.3g} s/{unit.removesuffix('es' if unit.endswith('ches') else 's')}"
    return f"{speed:.2g} {unit}/s" if speed < 10 else f"{speed:,.0f} {unit}/s"


def _time(task: Task) -> str:
    """Return the time left or, if it is not known or nothing is left, the time that has passed."""
    left = task.time_remaining
    if task.total is not None and not task.finished:
        return "" if left is None else f"{_clock_time(left)} left"
    passed = task.finished_time if task.finished else task.elapsed
    return _clock_time(passed or 0)


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def amount(value: int, unit: str, *, bare: bool = False) -> str:
    """Return a number with its unit: 9,288 tokens, 12.3k tokens, 283k tokens, 12.3 MB."""
    if unit == "bytes":
        return size(value)
    text = short_count(value) if unit == "tokens" and value >= 10_000 else f"{value:,}"
    return text if bare or not unit else f"{text} {unit}"
