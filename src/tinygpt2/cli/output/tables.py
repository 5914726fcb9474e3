"""Tables and notes that fit the window: the least important columns go first, and words are never broken."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt2.utils.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 200  # most columns of a line in files and pipes
_GAP = 2  # columns between two columns of a table


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        cells: its texts, from top to bottom.
        rank: 0 if it is always shown; else the columns with the largest rank are left out first.
        left: whether it is aligned to the left.
    """

    heading: str
    cells: list[str]
    rank: int = 0
    left: bool = False

    @property
    def width(self) -> int:
        """The columns of the window that its widest text takes."""
        from rich.cells import cell_len

        return max(map(cell_len, (self.heading, *self.cells)))


def total_width(columns: Sequence[Column]) -> int:
    """Return the width of a table."""
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def fitted(columns: Sequence[Column], width: int) -> list[Column]:
    """Return the columns that fit into `width`: without the least important ones."""
    kept = list(columns)
    while total_width(kept) > width and (most := max(column.rank for column in kept)) > 0:
        kept.remove(next(column for column in reversed(kept) if column.rank == most))
    return kept


def print_table(columns: Sequence[Column], console: Console) -> list[Column]:
    """Print the columns that fit, and return those that are left out.

    In a window that is too narrow for the columns that are always shown, the first one is broken into lines.
    """
    from rich.table import Table
    from rich.text import Text

    kept = fitted(columns, console.width)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for index, column in enumerate(kept):
        table.add_column(
            Text(printable(column.heading, sys.stdout)), justify="left" if column.left else "right",
            overflow="fold", no_wrap=index > 0,
        )  # fmt: skip
    for row in zip(*(column.cells for column in kept), strict=True):
        table.add_row(*(Text(printable(cell, sys.stdout)) for cell in row))
    if not console.is_terminal:  # in files and pipes, a table is never cut
        console.width = max(console.width, total_width(kept))
    console.print(table)
    return [column for column in columns if column not in kept]


def print_note(text: str, console: Console, style: str = "", indent: str = "") -> None:
    """Print a text, broken into lines between words."""
    lines = textwrap.wrap(
        text, min(console.width, PIPED_WIDTH), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    for line in lines or [""]:
        console.print(line, markup=False, style=style, soft_wrap=True)


def short_path(value: Any) -> str:
    """Return a path below the working directory as seen from there, and any other text unchanged."""
    here, text = Path.cwd(), str(value)
    return str(Path(text).relative_to(here)) if text.startswith(f"{here}{os.sep}") else text
