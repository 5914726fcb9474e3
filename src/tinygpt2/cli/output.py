"""Results on standard output, for people or as one JSON object; errors on standard error."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tinygpt2 import comparison
from tinygpt2.errors import TinyGPT2Error

if TYPE_CHECKING:
    from rich.console import Console


PIPED_WIDTH = 400  # a table that goes to a file or a pipe is not folded


def print_result(result: Any, *, as_json: bool) -> None:
    """Print what a command returned, a dataclass."""
    if as_json:
        sys.stdout.write(json.dumps(to_json(result), ensure_ascii=False, allow_nan=False) + "\n")
    else:
        from rich.console import Console

        render = RENDER.get(type(result).__name__, _render_fields)
        console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
        render(result, console)
    sys.stdout.flush()


def print_error(error: TinyGPT2Error, *, as_json: bool) -> None:
    """Print an expected failure: what, where, and what helps."""
    if as_json:
        body = {"code": error.exit_code, "message": error.message, "hint": error.hint}
        sys.stdout.write(json.dumps({"error": body}, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    else:
        from rich.console import Console

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"error: {error.message}", markup=False, style="red" if error.exit_code != 130 else "yellow")
        if error.hint:
            console.print(f"hint: {error.hint}", markup=False)


def to_json(value: Any) -> Any:
    """Turn a result into JSON's types; numbers that are not finite become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _render_fields(result: Any, console: Console) -> None:
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if dataclasses.is_dataclass(value):
            value = ", ".join(f"{part.name} {_number(getattr(value, part.name))}" for part in dataclasses.fields(value))
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {_number(item)}" for key, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        name = field.name.removesuffix("_bytes").replace("_", " ")
        if field.name.endswith("_bytes"):
            value = f"{value / 1e9:.2f} GB"
        console.print(f"{name:<28} {value if isinstance(value, str) else _number(value)}", markup=False)


def _table(columns: list[str], rows: list[list[Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_number(value)) for value in row))
    return table


def _render_ppl(result: Any, console: Console) -> None:
    from tinygpt2.conventions import SAYS

    headings, cells = comparison.table(result.results)
    console.print(_table(headings, cells))
    convention = result.results[0].convention
    console.print(f"convention {convention}: {SAYS[convention]}", markup=False)
    for pair in result.paired:
        if pair.difference is None:
            console.print(f"{pair.task}: {pair.a} and {pair.b} have different targets: no difference", markup=False)
        else:
            error = f" ± {pair.stderr:.4f}" if pair.stderr is not None else ""
            console.print(
                f"{pair.task}: loss of {pair.a} - {pair.b} = {pair.difference:+.4f}{error} nats/token",
                markup=False,
            )


def ppl_as_text(result: Any, *, as_csv: bool) -> str:
    """Return the figures of `ppl` as CSV, or its table in Markdown."""
    if as_csv:
        return comparison.as_csv(result.results)
    headings, cells = comparison.table(result.results)
    return comparison.as_markdown(headings, [[_number(value) for value in row] for row in cells])


def _render_tasks(result: Any, console: Console) -> None:
    for task in result.tasks:
        console.print(task.name, style="bold", markup=False)
        for field in dataclasses.fields(task)[1:]:
            console.print(f"  {field.name.replace('_', ' '):<15} {getattr(task, field.name)}", markup=False)


def _render_generate(result: Any, console: Console) -> None:
    from rich.markup import escape

    for text in result.results:
        console.rule(escape(f"{text.model}  ({text.tokens} tokens, {text.seconds:.1f} s)"), align="left")
        console.print(text.prompt, markup=False, style="bold", end="", soft_wrap=True)
        console.print(text.text, markup=False, soft_wrap=True)


def _render_verify(result: Any, console: Console) -> None:
    console.print(f"{result.path}: {result.kind}, {'ok' if result.ok else 'faulty'}", markup=False)
    for line in [*result.problems, *(f"note: {note}" for note in result.notes)]:
        console.print(f"- {line}", markup=False)


def _render_quickstart(result: Any, console: Console) -> None:
    console.print(result.summary, markup=False)


RENDER: dict[str, Callable[[Any, Console], None]] = {
    "PplResult": _render_ppl,
    "TaskList": _render_tasks,
    "GenerateResult": _render_generate,
    "VerifyResult": _render_verify,
    "QuickstartResult": _render_quickstart,
}
