"""The help: what it lists under which headings, in a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import sys
from collections.abc import Callable

import pytest

from tinygpt2.cli.commands import COMMANDS
from tinygpt2.cli.help import COMMON, REQUIRED
from tinygpt2.config.base import extra, flag_name

LONGEST, MOST_LINES, ONE_SCREEN = 200, 90, 46


def listed(text: str) -> set[str]:
    """The long names that stand at the beginning of a line, or after a short one."""
    return set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_in_a_pipe_is_short_and_plain(cli: Callable, command: object) -> None:
    short, everything = (cli(command.name, flag).out for flag in ("-h", "--help-all"))
    assert short == cli(command.name, "--help").out
    assert short.count("\n") <= MOST_LINES
    for text in (short, everything):
        assert max(map(len, text.splitlines())) <= LONGEST
        assert text.isascii()
        assert "\x1b" not in text
        for example in command.examples:
            assert f"\n  tinygpt2 {example}\n" in text
    last = short.rstrip().splitlines()[-1]
    assert last.endswith(f"tinygpt2 {command.name} --help-all shows every option.") == bool(command.short), last
    options = {flag_name(key) for key, field in command.config.options().items() if not extra(field, "positional")}
    assert options <= listed(everything)
    assert all(option in short for option in ("--config PATH", "--print-config", "--json", "--version"))
    assert set(command.short) <= set(command.config.options())
    assert {flag_name(key) for key in command.short} <= listed(short)
    if not command.short:
        assert options <= listed(short)


def test_required_options_come_first_then_the_common_ones(cli: Callable) -> None:
    text = cli("distill", "--help").out
    headings = re.findall(r"^([A-Z].*):$", text, re.MULTILINE)
    assert headings == [REQUIRED, COMMON, "Objectives", "Examples"]
    required = text.split(f"{REQUIRED}:")[1].split(f"{COMMON}:")[0]
    assert listed(required) == {"--out", "--teacher", "--student", "--data"}
    assert required.count("[required") == 4
    everything = re.findall(r"^([A-Z].*):$", cli("distill", "--help-all").out, re.MULTILINE)
    assert everything[:2] == [REQUIRED, COMMON]
    assert {"Objectives", "Optimisation", "Length of training"} < set(everything)


def test_a_command_shows_its_own_defaults_and_kinds_of_values(cli: Callable) -> None:
    own = {name: " ".join(cli(name, "--help-all").out.split()) for name in ("pretrain", "distill", "ppl", "presets")}
    assert "distill" not in own["pretrain"]
    assert "from the student's width" in own["distill"]
    assert "Passes over the training blocks. [default 1]" in own["pretrain"]
    for name, parts in {
        "pretrain": ["--max-steps N ", "--learning-rate X ", "-o, --out PATH ", "-m, --model PATH|ID ",
                     "--freeze PATTERN... ", "--model-config PRESET|PATH ", "--precision auto|fp32|bf16|fp16 "],
        "distill": ["--layer-map uniform|last|first|N,... ", "--recipe RECIPE|PATH ", "--student PATH|ID|PRESET "],
        "ppl": ["--task TASK|PATH... ", "-m, --model PATH|ID... "],
    }.items():  # fmt: skip
        for part in parts:
            assert part in own[name], part
    assert not [name for name, text in own.items() if re.search(r"\b(INTEGER|NUMBER)\b", text)]


def test_a_switch_that_is_off_shows_no_negative_form_and_accepts_it(cli: Callable) -> None:
    assert "--no-" not in cli("pretrain", "--help-all").out
    assert "--append-eos / --no-append-eos" in cli("pregenerate", "--help-all").out
    base = ("pretrain", "--model", "m", "--data", "d", "--out", "o", "--print-config")
    assert cli(*base, "--no-validate-only").out == cli(*base).out


def test_short_forms_mean_the_long_ones(cli: Callable) -> None:
    assert cli("-V").out == cli("--version").out == cli("ppl", "-V").out
    assert cli("-h").out == cli("--help").out
    long, short = ("--model", "--out"), ("-m", "-o")
    printed = [cli("finetune", m, "m", o, "o", "--data", "d", "--print-config").out for m, o in (long, short)]
    assert printed[0] == printed[1] != ""


def on_a_terminal(*arguments: str, columns: int) -> str:
    """What a command shows on a terminal of this width."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm", "COLUMNS": str(columns), "LINES": "50"})
        os.execv(sys.executable, [sys.executable, "-m", "tinygpt2", *arguments])
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # the end of a terminal
        pass
    os.close(terminal)
    os.waitpid(pid, 0)
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).replace("\r\n", "\n")


def test_help_on_a_terminal_has_panels_and_fits_the_screen() -> None:
    text = on_a_terminal("distill", "--help", columns=80)
    lines = text.splitlines()
    for heading in (REQUIRED, COMMON, "Objectives"):
        assert any(line.startswith(f"╭─ {heading} ─") for line in lines)
    assert max(len(line) for line in lines if line[:1] in "╭│╰") == 80
    assert sum(-(-max(len(line), 1) // 80) for line in lines) <= ONE_SCREEN
    for example in next(command for command in COMMANDS if command.name == "distill").examples:
        assert f"  tinygpt2 {example}" in lines
