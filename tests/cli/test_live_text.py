"""Texts while they are generated: words are not broken, models stand side by side, samples are told apart."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from rich.console import Console

from tinygpt2.cli.output import live_text
from tinygpt2.cli.output.live_text import OneByOne, SideBySide, WordWrap, fits_side_by_side, render_generate
from tinygpt2.decoding.generation import GenerateResult, Generation

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps for a while.\n\n  Indented\ttab.\n"


def terminal(width: int = 40, **how: object) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, highlight=False, **how)


def shown(console: Console) -> str:
    return console.file.getvalue()


def wrapped(text: str, width: int, step: int) -> str:
    lines = WordWrap(lambda: width)
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    return "".join(part for piece in [*pieces, "\n"] for part, _ in lines.feed(piece))


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("width", [12, 20, 79])
def test_lines_break_between_words(width: int, step: int) -> None:
    lines = wrapped(TEXT, width, step).splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(lines).split() == TEXT.split()
    assert wrapped(TEXT, width, step) == wrapped(TEXT, width, 2)


def test_a_word_is_shown_when_it_is_complete_and_a_chinese_character_at_once() -> None:
    lines = WordWrap(lambda: 20)

    def fed(piece: str) -> str:
        return "".join(part for part, _ in lines.feed(piece))

    assert [fed("Once up"), fed("on a"), fed(" 却说"), fed("孔明"), fed("\n")] == [
        "Once",
        " upon",
        " a 却说",
        "孔明",
        "\n",
    ]
    text = wrapped("却说孔明" * 20, 15, 1)
    assert max(map(cell_len, text.splitlines())) == 14


def test_a_word_longer_than_a_line_is_broken_at_its_end() -> None:
    assert wrapped("a " + "x" * 25, 10, 1).splitlines() == ["a", "x" * 10, "x" * 10, "x" * 5]


def test_styles_of_one_word() -> None:
    lines = WordWrap(lambda: 20)
    parts = [*lines.feed("Once up", "bold"), *lines.feed("on\n")]
    assert [part for part in parts if part[0].strip()] == [("Once", "bold"), ("up", "bold"), ("on", "")]


def test_one_text_below_the_other() -> None:
    console = terminal()
    view = OneByOne({"/r/a": "a", "/r/b": "b"}, console, headed=True)
    for model in ("/r/a", "/r/b"):
        show = view.begin(model, "Once upon")
        for piece in (" a time there was a king", " and a queen", "\n"):
            show(piece)
        view.finish(Generation(model, "Once upon", "", 30, 0.5))
    text = shown(console)
    assert text.index("a ─") < text.index("30 tokens, 60 tokens/s") < text.index("b ─")
    assert "Once upon a time there was a king and a\nqueen\n" in text
    assert max(map(len, text.splitlines())) <= 40


def test_models_side_by_side() -> None:
    console = terminal(90)
    view = SideBySide({"/r/a": "teacher", "/r/b": "student"}, console)
    for model, piece in (("/r/a", " in the first column"), ("/r/b", " in the second column")):
        show = view.begin(model, "Once")
        show(piece)
        show("\n")
        view.finish(Generation(model, "Once", piece, 4, 0.1))
    lines = [line for line in shown(console).splitlines() if "first column" in line and "second column" in line]
    assert lines
    assert lines[-1].index("Once in the second") > 40
    view.begin("/r/a", "Next")
    view.close()
    view.close()  # at the end of an interrupted text, and then once more


def test_where_there_is_room_for_columns() -> None:
    assert fits_side_by_side(terminal(80), 2)
    assert not fits_side_by_side(terminal(80), 3)
    assert not fits_side_by_side(terminal(70), 2)
    assert not fits_side_by_side(terminal(200), 1)
    assert not fits_side_by_side(Console(file=io.StringIO(), width=200), 2)
    assert not fits_side_by_side(terminal(200, _environ={"TERM": "dumb"}), 2)


def texts(models: int, samples: int) -> GenerateResult:
    return GenerateResult(
        [Generation(f"/r/m{model}", "Once", f" text {sample} of {model}", 5, 0.5)
         for model in range(models) for sample in range(samples)]
    )  # fmt: skip


def test_samples_are_told_apart() -> None:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    render_generate(texts(1, 2), console)
    lines = shown(console).splitlines()
    assert [line for line in lines if "─" in line] == [
        line for line in lines if "m0, text" in line and "of 2, 5 tokens, 10 tokens/s" in line
    ]
    assert sum("─" in line for line in lines) == 2
    assert {len(line) for line in lines if "─" in line} == {80}  # no rule is as wide as a pipe may be
    wide = terminal(100)
    render_generate(texts(2, 2), wide)
    assert any("Once text 1 of 0" in line and "Once text 1 of 1" in line for line in shown(wide).splitlines())


def test_generate_in_a_pipe_draws_short_rules(cli: Callable, teacher: object) -> None:
    outcome = cli("generate", "--model", teacher, "--prompt", "the cat", "--num-samples", 2, "--max-new-tokens", 4)
    assert outcome.out.count("text 1 of 2") == outcome.out.count("text 2 of 2") == 1
    assert max(len(line) for line in outcome.out.splitlines() if "─" in line) == 80


def test_what_models_write_cannot_control_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_text.sys.stdout, "isatty", lambda: True, raising=False)
    console = terminal(100)
    view = OneByOne({"m": "m\x1b[2J"}, console, headed=True)
    view.begin("m", "a\x1b]0;x\x07")("b\x9b31m\n")
    assert sys.stdout.isatty()
    assert "\x1b]0" not in shown(console)
    assert "\x9b" not in shown(console)
    assert "\x1b[2J" not in shown(console)
