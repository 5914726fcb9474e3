"""Report what happens meanwhile: with bars on a terminal, with plain lines elsewhere.

The library itself reports nothing. The command line calls `show()` once; from then on everything here is written to
stderr. stdout is only for results.

    say      a note that a person may want to know; --quiet hides it, and so does `without_notes`
    warn     something that may need an action
    detail   what was decided and why, with --verbose
    track    a stage of work that may take long
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeVar

from tinygpt2.utils.terminal import printable

if TYPE_CHECKING:
    from rich.progress import Progress, Task, TaskID

Level = Literal["quiet", "normal", "verbose"]
T = TypeVar("T")

_mode: Literal["silent", "plain", "live"] = "silent"
_level: Level = "normal"
_bars: Progress | None = None  # of the stages that are running, the outer ones first
_told: set[str] = set()
_notes = True
_clock = time.monotonic

_EVERY = 30.0  # seconds from one line to the next where there is no terminal
_PAUSE = 0.1  # seconds from one update of a stage to the next


def show(level: Level = "normal") -> None:
    """Report on stderr from now on. If there are several processes, only the first one reports."""
    global _mode, _level
    if os.environ.get("RANK", "0") != "0":
        return
    _level = level
    _told.clear()
    _mode = "live" if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") else "plain"


def shown() -> bool:
    """Return whether notes and progress are reported."""
    return _mode != "silent" and _level != "quiet"


def say(message: str) -> None:
    """Print a note on stderr, unless --quiet was given or the library runs on its own."""
    if shown() and _notes:
        _print(message)


@contextmanager
def without_notes() -> Iterator[None]:
    """Hide the notes and plain lines of a command that another one runs many times. Bars and warnings remain."""
    global _notes
    before, _notes = _notes, False
    try:
        yield
    finally:
        _notes = before


def warn(message: str) -> None:
    """Print a warning on stderr, also with --quiet."""
    if _mode != "silent":
        _print(f"warning: {message}")


def detail(message: str) -> None:
    """Print on stderr what was decided and why, once, if --verbose was given."""
    if shown() and _level == "verbose" and message not in _told:
        _told.add(message)
        _print(message)


def _print(message: str) -> None:
    print(printable(message, sys.stderr), file=sys.stderr, flush=True)


class ProgressStage:
    """A stage of work that is running. Its methods may be called from any thread; without bars they do nothing."""

    def __init__(
        self,
        bars: Progress | None = None,
        description: str = "",
        total: int | None = None,
        unit: str = "",
        done: int = 0,
    ) -> None:
        self._bars, self._waiting, self._updated, self._lock = bars, 0, _clock(), threading.Lock()
        self._id: TaskID | None = None
        if bars is not None:
            name = printable(description, sys.stderr)
            self._id = bars.add_task(name, total=total, completed=done, note="", unit=unit)

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Report that `amount` more units are done. `note` replaces the text next to the bar."""
        if self._bars is None or self._id is None:
            return
        with self._lock:
            self._waiting += amount
            if note is None and _clock() - self._updated < _PAUSE:
                return
            self._flush()
            if note is not None:
                self._bars.update(self._id, note=note)

    def expect(self, total: int) -> None:
        """Report how many units there are, if this was not known at the beginning."""
        if self._bars is not None and self._id is not None:
            self._bars.update(self._id, total=total)

    def then(self, description: str) -> None:
        """Go on with work that cannot be counted."""
        if self._bars is None or self._id is None:
            return
        with self._lock:
            self._waiting = 0
            self._bars.remove_task(self._id)
            self._id = self._bars.add_task(description, total=None, unit="", note="")
        self.line(description)

    def line(self, message: str) -> None:
        """Print a plain line if there is no live bar."""
        if _mode == "plain":
            say(message)

    def report(self) -> None:
        """Print how far the work is, as a plain line."""
        from tinygpt2.utils.bars import state

        task = self._task()
        if task is not None:
            self.line(f"{task.description}: {state(task)}")

    def end(self, *, remove: bool) -> None:
        """Show the final count, or remove the bar."""
        if self._bars is None or self._id is None:
            return
        with self._lock:
            self._flush()
            if remove:
                self._bars.remove_task(self._id)

    def _flush(self) -> None:
        assert self._bars is not None
        assert self._id is not None
        if self._waiting:
            self._bars.advance(self._id, self._waiting)
        self._waiting, self._updated = 0, _clock()

    def _task(self) -> Task | None:
        if self._bars is None or self._id is None:
            return None
        with self._lock:
            self._flush()
        return next((task for task in self._bars.tasks if task.id == self._id), None)


@contextmanager
def track(
    description: str,
    total: int | None = None,
    unit: str = "",
    *,
    done: int = 0,
    announce: bool = True,
    lines: bool = True,
) -> Iterator[ProgressStage]:
    """Report a stage of work while the block runs.

    On a terminal this is a bar with count, rate and time left; the bar of a stage inside another one disappears at its
    end. Elsewhere it is a line at the beginning and one every 30 seconds.

    Args:
        description: what is being done.
        total: the number of its units, or None if it is unknown.
        unit: what is counted, in the plural, such as `tokens`; `bytes` are shown as kB, MB and so on. Without it, no
            rate is shown.
        done: units that an earlier run has done.
        announce: whether a stage that ends within 30 seconds leaves a trace.
        lines: whether to print a line every 30 seconds where there is no terminal; if not, the block prints its own.
    """
    if not shown():
        yield ProgressStage()
        return
    from tinygpt2.utils.bars import amount

    outer = _bars is not None
    with _shared_bars(transient=not announce) as bars:
        stage = ProgressStage(bars, description, total, unit, done)
        if announce:
            stage.line(f"{description}: {amount(total, unit)}" if total and unit else description)
        try:
            with _repeated(stage.report, lines and _mode == "plain"):
                yield stage
        finally:
            stage.end(remove=outer)


def follow(items: Sequence[T], description: str, unit: str = "", *, announce: bool = True) -> Iterator[T]:
    """Yield items, and report how many of them are done; see `track`."""
    with track(description, len(items), unit, announce=announce) as stage:
        for item in items:
            yield item
            stage.advance()


@contextmanager
def _repeated(report: Callable[[], None], wanted: bool) -> Iterator[None]:
    """Call a function every 30 seconds while the block runs, also if the block waits for a library."""
    if not wanted:
        yield
        return
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(_EVERY):
            report()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _shared_bars(*, transient: bool) -> Iterator[Progress]:
    """Yield the bars that are on the screen, or new ones. Without a terminal, they only measure."""
    global _bars
    if _bars is not None:
        yield _bars
        return
    from tinygpt2.utils.bars import make_bars

    _bars = make_bars(_clock, live=_mode == "live", transient=transient)
    try:
        with _bars:
            yield _bars
    finally:
        _bars = None
