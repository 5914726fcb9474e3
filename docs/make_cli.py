"""Write docs/cli.md, the command reference, from the program itself; `--check` only compares.

python docs/make_cli.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from typer.testing import CliRunner

from tinygpt2.cli.app import COMMANDS, app

PAGE = Path(__file__).with_name("cli.md")


def render() -> str:
    """Return the page: the program's help, then each command's."""
    runner = CliRunner()
    parts = ["# Command reference\n\nMade by `python docs/make_cli.py` from the program's own help.\n"]
    for words in ([], *([name] for name, *_ in COMMANDS)):
        help_text = runner.invoke(app, [*words, "--help"], prog_name="tinygpt2").output
        title = " ".join(["tinygpt2", *words])
        parts.append(f"## {title}\n\n```text\n{help_text.strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is out of date: run python docs/make_cli.py")
    else:
        PAGE.write_text(text, encoding="utf-8")
