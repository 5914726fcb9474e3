"""Web pages of results: one file that needs no network, readable on a phone and in dark rooms.

Texts come from other people's files and from models, so every text is escaped. The page's own style and script are
report.css and report.js in this folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote

from tinygpt2.utils.charts import Chart
from tinygpt2.utils.files import write_text
from tinygpt2.utils.svg import svg_chart

REPORT = "report.html"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page under this title.

    Args:
        path: of the file.
        parts: what the other functions of this module return.
    """
    resources = files("tinygpt2.utils")
    style, script = ((resources / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{"".join(parts)}</main>
<script>
{script}</script>
</body>
</html>
"""
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))  # a model can write half of a character


def paragraphs(*texts: str) -> str:
    """Return paragraphs of text."""
    return "".join(f"<p>{escape(text)}</p>\n" for text in texts if text)


def chart_section(heading: str, charts: Sequence[Chart]) -> str:
    """Return charts beside each other, or below each other on a narrow screen. Without charts there is no section."""
    name = re.sub(r"\W+", "-", heading.lower())
    figures = "\n".join(svg_chart(chart, f"{name}-{number}") for number, chart in enumerate(charts, 1))
    return _section(heading, f'<div class="charts">{figures}</div>') if charts else ""


def table_section(heading: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *notes: str) -> str:
    """Return a table whose first column names the rows, and sentences below it."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in headings)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in rows
    )
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    return _section(heading, _scrolling(heading, table) + paragraphs(*notes)) if rows else ""


def text_section(heading: str, prompt: str, texts: Mapping[str, str]) -> str:
    """Return texts that continue a prompt, side by side, each under the name of its model."""
    cards = "\n".join(
        f'<article><h3>{escape(name)}</h3><p class="text"><b>{escape(prompt)}</b>{escape(text)}</p></article>'
        for name, text in ((name, _closed_up(text)) for name, text in texts.items())
    )
    return _section(heading, f'<div class="texts">{cards}</div>')


def link_section(heading: str, links: Mapping[str, str]) -> str:
    """Return a list of links to other files, by their names: paths that are relative to the page."""
    items = "".join(f'<li><a href="{escape(quote(path))}">{escape(name)}</a></li>' for name, path in links.items())
    return _section(heading, f"<ul>{items}</ul>") if items else ""


def settings_section(heading: str, values: Mapping[str, Any], *, closed: bool = True) -> str:
    """Return names and values; `closed` hides them until the heading is clicked. Values that are None are left out."""
    shown = {name: _setting(value) for name, value in values.items() if value not in (None, [], "")}
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>\n' for name, text in shown.items()
    )
    table = _scrolling(heading, f'<table class="settings"><tbody>\n{rows}</tbody></table>')
    if not rows:
        return ""
    if not closed:
        return _section(heading, table)
    return f"<section><details><summary><h2>{escape(heading)}</h2></summary>\n{table}</details></section>\n"


def without_folders(text: str) -> str:
    """Return the last part of a text that is an absolute path, and any other text unchanged.

    A page may be shared, so it does not tell how the folders of a machine are called.
    """
    kinds = (PurePosixPath(text), PureWindowsPath(text))
    return next((path.name for path in kinds if path.is_absolute() and path.name), text)


def _closed_up(text: str) -> str:
    """Return a text with at most one empty line at a place."""
    return re.sub(r"\n(\s*\n)+", "\n\n", text).rstrip()


def _setting(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return without_folders(str(value))


def _scrolling(label: str, table: str) -> str:
    """Put a table in a box of its own that scrolls, also with the keyboard, if the table is wider than the page."""
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">{table}</div>\n'


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}</section>\n"
