"""Progress: plain lines with a clock of the test's own, bars in windows of several widths, and silence."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable

import pytest
from rich.console import Console

from tinygpt2.utils import bars, progress


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Report in plain lines, by this clock."""
    made = Clock()
    monkeypatch.setattr(progress, "_clock", made)
    monkeypatch.setattr(progress, "_mode", "plain")
    monkeypatch.setattr(progress, "_level", "normal")
    monkeypatch.setattr(progress, "_told", set())
    return made


def test_the_library_is_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_mode", "silent")
    with progress.track("work", 3, "steps") as stage:
        stage.advance(1, "note")
        stage.expect(7)
        stage.then("more")
        stage.line("line")
        stage.report()
    assert list(progress.follow([1, 2], "work")) == [1, 2]
    progress.say("a")
    progress.warn("b")
    progress.detail("c")
    assert capsys.readouterr() == ("", "")


def test_lines_say_count_rate_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.track("read", 100_000_000, "bytes", done=20_000_000) as stage:
        for second in range(1, 31):
            clock.now = float(second)
            stage.advance(1_000_000)
        stage.report()
    with progress.track("score", 300_000, "tokens") as stage:
        stage.advance(500, "perplexity 9")
        clock.now += 30
        stage.advance(15_000, "perplexity 8.2")
        stage.report()
    with progress.track("fit", 6, "layers") as stage:
        clock.now += 7
        stage.advance()
        clock.now += 7
        stage.advance()
        stage.report()
    with progress.track("measure", 6, "batches") as stage:
        for _ in range(2):
            clock.now += 7
            stage.advance()
        stage.report()
    assert capsys.readouterr().err.splitlines() == [
        "read: 100 MB",
        "read: 50.0 MB of 100 MB, 1.0 MB/s, 0:50 left",
        "score: 300k tokens",
        "score: 15.5k of 300k tokens, 500 tokens/s, 9:29 left, perplexity 8.2",
        "fit: 6 layers",
        "fit: 2 of 6 layers, 7 s/layer, 0:28 left",
        "measure: 6 batches",
        "measure: 2 of 6 batches, 7 s/batch, 0:28 left",
    ]


def test_what_an_earlier_run_has_done_does_not_count_as_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.track("run", 500, "steps", done=400) as stage:
        clock.now = 12.0  # the first step is slow
        stage.advance()
        stage.report()
        clock.now = 13.0
        stage.advance()
        stage.report()
    assert capsys.readouterr().err.splitlines()[1:] == [
        "run: 401 of 500 steps",
        "run: 402 of 500 steps, 1 steps/s, 1:38 left",
    ]


def test_work_that_cannot_be_counted_says_how_long_it_takes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.track("read the text", 1000, "bytes") as stage:
        stage.advance(1000)
        stage.then("compute the merges")
        clock.now = 3725.0
        stage.report()
    assert capsys.readouterr().err.splitlines() == [
        "read the text: 1.0 kB", "compute the merges", "compute the merges: 1:02:05",
    ]  # fmt: skip


def test_a_line_comes_also_while_the_work_waits_for_a_library(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()
    monkeypatch.setattr(progress, "_EVERY", 0.001)
    monkeypatch.setattr(progress.ProgressStage, "report", lambda self: told.set())
    with progress.track("short", 3, "steps", lines=False):
        assert not [thread for thread in threading.enumerate() if "_repeated" in str(thread)]
    assert not told.is_set()
    with progress.track("long", 3, "steps"):
        assert told.wait(30)


def test_a_stage_that_is_not_announced_leaves_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.follow(range(3), "quick", "steps", announce=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("level", "told"),
    [("quiet", ["warning: b"]), ("normal", ["a", "warning: b", "work"]), ("verbose", ["a", "warning: b", "c", "work"])],
)
def test_levels(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str, told: list[str]
) -> None:
    monkeypatch.setattr(progress, "_level", level)
    progress.say("a")
    progress.warn("b")
    progress.detail("c")
    progress.detail("c")
    with progress.track("work"):
        pass
    assert capsys.readouterr().err.splitlines() == told


def test_show_follows_stderr_and_the_rank(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    progress.show("verbose")
    assert (progress._mode, progress._level) == ("plain", "verbose")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    progress.show()
    assert progress._mode == "plain"
    monkeypatch.setenv("TERM", "xterm")
    progress.show()
    assert progress._mode == "live"
    monkeypatch.setattr(progress, "_mode", "silent")
    monkeypatch.setenv("RANK", "1")
    progress.show()
    assert not progress.shown()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Callable[[int], io.StringIO]:
    """Give a function that opens a terminal of some width; what is drawn on it is in the returned stream."""

    def open_(width: int) -> io.StringIO:
        stream = io.StringIO()
        console = Console(file=stream, width=width, height=20, force_terminal=True, color_system=None)
        monkeypatch.setattr(bars, "open_console", lambda **_: console)
        monkeypatch.setattr(progress, "_mode", "live")
        bars._columns.cache_clear()
        return stream

    return open_


NAME = "2 of 7: a-model-with-a-very-long-name/checkpoints/step-100000 on wikitext-103-raw"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("note", ["", "perplexity 432.1", "0.05934 (attention 0.01, hidden 0.02)  1,234 tokens/s"])
def test_bar_count_and_time_left_stay_in_every_window(
    screen: Callable[[int], io.StringIO], clock: Clock, width: int, note: str
) -> None:
    stream = screen(width)
    with progress.track(NAME, 300_000, "tokens") as stage:
        stage.advance(1000, note)
        clock.now = 10.0
        stage.advance(99_000, note)
        table = progress._bars.make_tasks_table(progress._bars.tasks)
        progress._bars.console.print(table)
    drawn = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").splitlines()
    (line,) = [line for line in drawn if "left" in line][-1:]
    assert len(line.rstrip()) <= width
    assert "100k/300k" in line
    assert "0:21 left" in line
    assert "━━" in line
    assert line.startswith("2 of 7: a")
    assert (note in line) or width < 200
    assert ("tokens/s" in line) == ((width >= 70 and not note) or width >= 100) or "1,234" in note


def test_an_inner_bar_disappears_and_notes_stay(screen: Callable[[int], io.StringIO], clock: Clock) -> None:
    screen(80)
    with progress.track("all of them", 4, "steps") as outer:
        shared = progress._bars
        with progress.track("first", 2, "steps") as inner:
            inner.advance(2)
            outer.advance(2)
            assert progress._bars is shared
            assert [task.description for task in shared.tasks] == ["all of them", "first"]
        assert [task.description for task in shared.tasks] == ["all of them"]
    assert progress._bars is None


def test_a_stage_that_fails_takes_its_bar_along(screen: Callable[[int], io.StringIO], clock: Clock) -> None:
    screen(80)
    with pytest.raises(KeyboardInterrupt), progress.track("work", 3):
        raise KeyboardInterrupt
    assert progress._bars is None
    with pytest.raises(ZeroDivisionError):
        _ = [1 / item for item in progress.follow([0], "work")]
    assert progress._bars is None
