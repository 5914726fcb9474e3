"""Print results for people or as one JSON object on standard output, and errors on standard error."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tinygpt2.cli.curves import render_runs, render_show
from tinygpt2.config.evaluation import CONVENTION_NOTES
from tinygpt2.errors import TinyGPT2Error
from tinygpt2.utils.terminal import json_line, open_console, printable

if TYPE_CHECKING:
    from rich.console import Console

    from tinygpt2.evaluation.results import PplResult, PplRow


PIPED_WIDTH = 400  # columns; wide enough that tables in files and pipes are not wrapped


LABELS = {
    "layers": "blocks kept, from 0", "peak_memory_bytes": "peak memory", "memory_bytes": "memory",
    "memory_available_bytes": "memory available", "disk_bytes": "disk space", "disk_free_bytes": "disk space free",
    "test_bytes": "held-out text",
}  # fmt: skip
"""Names of fields for people, where they differ from the field's own."""


def print_result(result: Any, *, as_json: bool) -> None:
    """Print the result of a command, a dataclass."""
    if as_json:
        print_json(to_json(result))
    else:
        render = RENDER.get(type(result).__name__, _render_fields)
        render(result, open_console(width=None if sys.stdout.isatty() else PIPED_WIDTH))
    sys.stdout.flush()


def print_error(error: TinyGPT2Error, *, as_json: bool) -> None:
    """Print an expected failure: its message and, if there is one, its hint.

    With --json the error goes to standard output as one JSON object.
    """
    if as_json:
        body = {"code": error.exit_code, "message": error.message, "hint": error.hint}
        print_json({"error": body})
        sys.stdout.flush()
    else:
        stderr = open_console(stderr=True, soft_wrap=True)
        stderr.print(f"error: {error.message}", markup=False, style="red" if error.exit_code != 130 else "yellow")
        if error.hint:
            stderr.print(f"hint: {error.hint}", markup=False)


def print_json(value: Any) -> None:
    """Print a value of JSON's types as one line."""
    sys.stdout.write(json_line(json.dumps(value, ensure_ascii=False, allow_nan=False), sys.stdout) + "\n")


def to_json(value: Any) -> Any:
    """Return a result in JSON's types. NaN and infinite values become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in _fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _fields(result: Any) -> list[dataclasses.Field[Any]]:
    """Return a result's fields, without the optional ones that are None, because they were not requested."""
    every = dataclasses.fields(result)
    return [field for field in every if field.default is not None or getattr(result, field.name) is not None]


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(count: int) -> str:
    """Return a number of bytes with the unit that suits it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def _render_fields(result: Any, console: Console) -> None:
    for field in _fields(result):
        value = getattr(result, field.name)
        if dataclasses.is_dataclass(value):
            value = ", ".join(f"{part.name} {_number(getattr(value, part.name))}" for part in dataclasses.fields(value))
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {_number(item)}" for key, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        name = LABELS.get(field.name, field.name.replace("_", " "))
        if field.name.endswith("_bytes"):
            value = _size(value)
        console.print(f"{name:<28} {value if isinstance(value, str) else _number(value)}", markup=False)


def _table(columns: list[str], rows: list[list[Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(_number(value), sys.stdout)) for value in row))
    return table


PPL_COLUMNS = {
    "model": "model", "task": "task", "perplexity": "perplexity", "unit": "per", "loss": "loss", "stderr": "stderr",
    "bits_per_character": "bits/char", "bits_per_byte": "bits/byte", "word_perplexity": "word ppl",
    "accuracy": "accuracy", "accuracy_without_stop_words": "acc. (no stop words)", "tokens": "targets",
    "stride": "stride", "tokens_per_second": "tokens/s",
}  # fmt: skip
"""Columns of the table that `ppl` prints: attributes of `PplRow` and their headings."""


def as_csv(result: PplResult) -> str:
    """Return all figures of `ppl` as CSV, in full precision. The columns have the names of the JSON keys."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [field.name for field in dataclasses.fields(result.results[0])]
    writer.writerow(keys)
    writer.writerows([getattr(row, key) for key in keys] for row in result.results)
    return text.getvalue()


def as_markdown(result: PplResult) -> str:
    """Return the table of `ppl` and the notes below it in Markdown."""
    headings, rows = _ppl_table(result.results)
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *([_number(cell) for cell in row] for row in rows)]
    table = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
    return table + "".join(f"\n{line}\n" for line in _ppl_notes(result))


def _render_ppl(result: PplResult, console: Console) -> None:
    console.print(_table(*_ppl_table(result.results)))
    for line in _ppl_notes(result):
        console.print(line, markup=False)


def _ppl_table(rows: Sequence[PplRow]) -> tuple[list[str], list[list[Any]]]:
    """Return headings and cells, without columns that are empty in all rows."""
    keys = [key for key in PPL_COLUMNS if any(getattr(row, key) is not None for row in rows)]
    return [PPL_COLUMNS[key] for key in keys], [[getattr(row, key) for key in keys] for row in rows]


def _ppl_notes(result: PplResult) -> list[str]:
    """Return the lines below the table: the convention, the texts, and the differences of every pair of models."""
    convention = result.results[0].convention
    lines = [f"convention {convention}: {CONVENTION_NOTES[convention]}"]
    for row in {row.task: row for row in result.results}.values():
        lines.append(
            f"{row.task}: {row.words:,} words, {row.characters:,} characters, {row.bytes:,} bytes, from {row.source}"
        )
    for pair in result.paired:
        if pair.difference is None:
            lines.append(
                f"{pair.task}: {pair.a} and {pair.b} predict different tokens, so their losses cannot be compared"
            )
        else:
            error = f" ± {pair.stderr:.4f}" if pair.stderr is not None else ""
            lines.append(f"{pair.task}: loss of {pair.a} - {pair.b} = {pair.difference:+.4f}{error} nats per token")
    return lines


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


def _render_cut(result: Any, console: Console) -> None:
    _render_fields(dataclasses.replace(result, importance=None), console)
    if (importance := result.importance) is None:
        return
    console.print(f"\nincrease of the loss ({importance.loss:.4f} nats per token) without each block:", markup=False)
    blocks = range(len(importance.influence))
    rows = [
        [f"round {number}, block {one.removed} removed", *(one.costs.get(block) for block in blocks)]
        for number, one in enumerate(importance.rounds, 1)
    ]
    console.print(_table(["block", *map(str, blocks)], [*rows, ["block influence", *importance.influence]]))


def _render_presets(result: Any, console: Console) -> None:
    headings = ["name", "parameters", "layers", "heads", "width", "positions"]
    rows = [[p.name, p.parameters, p.n_layer, p.n_head, p.n_embd, p.n_positions] for p in result.presets]
    console.print(_table(headings, rows))
    for preset in result.presets:
        console.print(f"{preset.name}: {preset.source}", markup=False)


def _render_verify(result: Any, console: Console) -> None:
    console.print(f"{result.path}: {result.kind}, {'ok' if result.ok else 'faulty'}", markup=False)
    for line in [*result.problems, *(f"note: {note}" for note in result.notes)]:
        console.print(f"- {line}", markup=False)
    if (agreement := result.reference) is not None:
        text = "the same greedy text" if agreement.same_greedy_text else "a different greedy text"
        console.print(
            f"compared with the reference: logits differ by at most {agreement.logits:.2g} "
            f"(largest logit {agreement.largest_logit:.3g}), hidden states by at most {agreement.states:.2g} "
            f"(largest value {agreement.largest_state:.3g}), {text} over {agreement.greedy_tokens} tokens",
            markup=False,
        )
    if result.copies is not None:
        lines = _copied_blocks(result.copies) if result.copies else ["no tensor is an exact copy of a teacher's tensor"]
        for line in lines:
            console.print(line, markup=False)


def _copied_blocks(copies: dict[str, str]) -> Iterator[str]:
    """Yield a line for each part of a student that has exact copies of tensors of a part of the teacher."""
    parts: dict[str, list[str]] = {}
    for name, origin in copies.items():
        here, there = (re.sub(r"transformer\.h\.(\d+)\..*", r"block \1", key) for key in (name, origin))
        parts.setdefault(here, []).append(there)
    for here, origins in parts.items():
        for there in dict.fromkeys(origins):
            count = f" ({origins.count(there)} tensors)" if here.startswith("block") else ""
            yield f"{here} is a copy of the teacher's {there}{count}"


def _render_push(result: Any, console: Console) -> None:
    console.print(_table(["file", "size"], [[file.path, _size(file.bytes)] for file in result.files]))
    what = "would be uploaded" if result.dry_run else "uploaded"
    total = _size(sum(file.bytes for file in result.files))
    console.print(f"\n{what} to {result.url}: {len(result.files)} files, {total}", markup=False, soft_wrap=True)


def _render_budget(result: Any, console: Console) -> None:
    headings = [
        "student",
        "parameters",
        "tokens/s",
        "steps",
        "tokens",
        "passes",
        "tokens per parameter",
        "learning rate",
        "evaluation s",
    ]
    rows = [
        [one.student, one.parameters, one.tokens_per_second, one.steps, one.tokens, one.passes,
         one.tokens / one.parameters, one.learning_rate, one.evaluation_seconds]
        for one in result.candidates
    ]  # fmt: skip
    console.print(_table(headings, rows))
    console.print(f"\nchosen for {result.minutes:g} minutes: {result.chosen}", markup=False)
    for command in result.commands:
        console.print(command, markup=False, soft_wrap=True)


def _render_quickstart(result: Any, console: Console) -> None:
    console.print(result.summary, markup=False)


RENDER: dict[str, Callable[[Any, Console], None]] = {
    "PplResult": _render_ppl,
    "TaskList": _render_tasks,
    "TruncateStudentResult": _render_cut,
    "PresetList": _render_presets,
    "GenerateResult": _render_generate,
    "PushResult": _render_push,
    "VerifyResult": _render_verify,
    "QuickstartResult": _render_quickstart,
    "BudgetPlan": _render_budget,
    "RunList": render_runs,
    "ShowResult": render_show,
}
