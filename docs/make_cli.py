"""Write docs/cli.md, the command reference, from the program itself; `--check` only compares.

python docs/make_cli.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tinygpt2.cli.app import app
from tinygpt2.cli.help import EVERY_COMMAND, Section, sections

PAGE = Path(__file__).with_name("cli.md")
NAME = "tinygpt2"


def render() -> str:
    """Return the page: the commands, what every command takes, then each command's own options under their headings."""
    program: Any = typer.main.get_command(app)
    context = program.make_context(NAME, [], resilient_parsing=True)
    parts = [
        "# Command reference\n",
        "Made by `python docs/make_cli.py` from the program's own help. In the place of a value, words in small "
        "letters stand for themselves. The others say what kind of value is meant: N a whole number, X a number, ID a "
        "name on the Hugging Face Hub, PRESET a name that `tinygpt2 presets` lists. `...` means that the option may be "
        "repeated.\n",
        *_options(sections(program, context)),
    ]
    commands = [(name, command, command.make_context(name, [], parent=context, resilient_parsing=True))
                for name, command in program.commands.items()]  # fmt: skip
    _, command, inside = next(one for one in commands if one[0] == "distill")
    parts += _options([part for part in sections(command, inside) if part.heading == EVERY_COMMAND])
    for name, command, inside in commands:
        own = [part for part in sections(command, inside) if part.heading != EVERY_COMMAND]
        parts += [
            f"## {NAME} {name}\n",
            f"{command.help}\n",
            f"```text\n{command.get_usage(inside).removeprefix('Usage: ')}\n```\n",
            *_options(own, level="###"),
            f"```text\n{command.epilog}\n```\n",
        ]
    return "\n".join(parts)


def _options(found: list[Section], level: str = "##") -> Iterator[str]:
    """Yield each heading with a list of the names below it and their descriptions."""
    for part in found:
        yield f"{level} {part.heading}\n"
        rows = (f"- `{names}`: {_escaped(text)}" for names, text in part.rows)
        yield "\n".join(rows) + "\n"


def _escaped(text: str) -> str:
    """Return a description as Markdown: names in <| |> and patterns with * are no markup."""
    return text.replace("<", "\\<").replace("*", "\\*")


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is out of date: run python docs/make_cli.py")
    else:
        PAGE.write_text(text, encoding="utf-8")
