"""Report progress: with a live bar on a terminal, with plain lines elsewhere.

The library itself reports nothing. The command line calls `show()` once; from then on every `track()` reports on
stderr. stdout is only for results.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from tinygpt2.utils.terminal import open_console, printable

if TYPE_CHECKING:
    from rich.progress import Progress

_mode: Literal["silent", "plain", "live"] = "silent"


def show() -> None:
    """Report progress on stderr from now on. If there are several processes, only the first one reports."""
    global _mode
    if os.environ.get("RANK", "0") != "0":
        return
    _mode = "live" if sys.stderr.isatty() else "plain"


def shown() -> bool:
    """Return whether progress is reported."""
    return _mode != "silent"


def say(message: str) -> None:
    """Print one line on stderr if progress is reported."""
    if _mode != "silent":
        print(printable(message, sys.stderr), file=sys.stderr, flush=True)


class ProgressStage:
    """One stage of work. Call `advance` when some of it is done; a live bar shows its `note`."""

    def __init__(self, bar: Progress | None, description: str, total: int | None) -> None:
        self._bar = bar
        self._id = bar.add_task(description, total=total, note="") if bar else None

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Report that `amount` more units are done. `note` replaces the text next to the bar."""
        if self._bar is not None and self._id is not None:
            self._bar.advance(self._id, amount)
            if note is not None:
                self._bar.update(self._id, note=note)

    def line(self, message: str) -> None:
        """Print a plain line if there is no live bar."""
        if self._bar is None:
            say(message)


@contextmanager
def track(description: str, total: int | None) -> Iterator[ProgressStage]:
    """Report a stage of work while the block runs. `total` is its number of units, or None if it is unknown."""
    if _mode != "live":
        say(description)
        yield ProgressStage(None, description, total)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    with Progress(*columns, console=open_console(stderr=True), refresh_per_second=4) as bar:
        yield ProgressStage(bar, printable(description, sys.stderr), total)
