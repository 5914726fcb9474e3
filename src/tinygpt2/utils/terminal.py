"""Text for a terminal: it cannot move the cursor or set the title, and a missing character never ends a command.

Names, prompts, generated text and error messages come from other people's files. On a terminal, their control
characters are shown as U+FFFD. In files and pipes they are left as they are.
"""

from __future__ import annotations

import re
import sys
from typing import IO, TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 except tab and newline, DEL, C1


def printable(text: str, stream: IO[str]) -> str:
    """Return a text with U+FFFD in place of control characters if `stream` is a terminal, otherwise unchanged."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text) if stream.isatty() else text


def json_line(text: str, stream: TextIO) -> str:
    """Return JSON with escapes for control characters, and for all that is not ASCII if `stream` may lack it."""
    utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
    unsafe = re.compile(r"[\x7f-\x9f\ud800-\udfff]" if utf8 else r"[^\x20-\x7e]")
    return unsafe.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))


def tolerate_encodings() -> None:
    """Let standard output and error write a replacement for characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def open_console(*, stderr: bool = False, **options: Any) -> Console:
    """Return a console that prints `printable` text. Text for files and pipes is written as it is, without wrapping."""
    from rich.console import Console

    class PlainConsole(Console):
        def print(self, *objects: Any, sep: str = " ", end: str = "\n", **how: Any) -> None:
            if objects and all(isinstance(part, str) for part in objects):
                text = printable(sep.join(objects), self.file)
                if not self.file.isatty():
                    self.file.write(text + end)
                    return
                objects = (text,)
            super().print(*objects, sep=sep, end=end, **how)

        def rule(self, title: Any = "", **how: Any) -> None:
            super().rule(printable(title, self.file) if isinstance(title, str) else title, **how)

    return PlainConsole(stderr=stderr, highlight=False, emoji=False, **options)
