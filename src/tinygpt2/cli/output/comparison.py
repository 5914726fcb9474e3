"""What `ppl` prints: a table of models and tasks that fits the window, CSV, or Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tinygpt2.cli.output.tables import Column, print_note, print_table, short_path, total_width
from tinygpt2.config.evaluation import CONVENTION_NOTES, FIDELITY_NOTE, OTHER_TOKENS_NOTE
from tinygpt2.utils.units import number, percent, short_count

if TYPE_CHECKING:
    from rich.console import Console

    from tinygpt2.evaluation.fidelity import Fidelity
    from tinygpt2.evaluation.results import PplResult, PplRow

_LONGEST_NAME = 14  # characters of a model's name in the heading of a column
_NOT_COMPARABLE = "n/a"
_ABOVE = ("", ", stderr", ", bits per byte", ", bits per byte, stderr")  # columns of CSV

_SHARED: dict[str, Callable[[PplRow], str]] = {
    "per": lambda row: row.unit,
    "targets": lambda row: number(row.tokens),
    "stride": lambda row: number(row.stride),
}
"""Figures that the caption tells if all rows agree; else they are columns."""

_FIGURES: list[tuple[str, int, Callable[[PplRow], str]]] = [
    ("accuracy", 0, lambda row: percent(row.accuracy, row.accuracy_stderr)),
    ("normalised", 1, lambda row: percent(row.accuracy_norm, row.accuracy_norm_stderr)),
    ("acc. (no stop words)", 6, lambda row: percent(row.accuracy_without_stop_words)),
    ("bits/byte", 4, lambda row: _digits(row.bits_per_byte)),
    ("loss", 5, lambda row: _with_error(f"{row.loss:.4f}", row.stderr)),
    ("tokens/s", 7, lambda row: number(row.tokens_per_second)),
    ("word ppl", 8, lambda row: _digits(row.word_perplexity)),
    ("bits/char", 9, lambda row: _digits(row.bits_per_character)),
]
"""Headings, ranks and texts of the columns after the comparison with the first model."""


_FIDELITY: list[tuple[str, int, Callable[[Fidelity], str]]] = [
    ("KL", 0, lambda one: _with_error(f"{one.kl:.4f}", one.stderr)),
    ("median", 4, lambda one: f"{one.kl_median:.4f}"),
    ("99 %", 3, lambda one: f"{one.kl_p99:.3f}"),
    ("reverse KL", 6, lambda one: "-" if one.reverse_kl is None else f"{one.reverse_kl:.4f}"),
    ("same top", 1, lambda one: percent(one.same_top, one.same_top_stderr)),
    ("acceptance", 2, lambda one: percent(one.acceptance, one.acceptance_stderr)),
    ("loss above", 5, lambda one: _with_error(f"{one.loss_difference:+.4f}", one.loss_difference_stderr)),
    ("calibration", 7, lambda one: f"{one.calibration_error:.2%}"),
]
"""Headings, ranks and texts of the columns that compare with the reference."""

_OTHER_TOKENS: list[tuple[str, int, Callable[[Fidelity], str]]] = [
    ("compared", 1, lambda one: f"{one.compared}, {one.share:.1%}"),
    ("in lumps", 2, lambda one: f"{one.lumped:.2%}" if one.compared == "events" else "-"),
    ("left out", 5, lambda one: f"{one.left_out:.2%}" if one.compared == "events" else "-"),
]
"""The same of what is compared if a model's tokens are not the reference's."""


class Comparison:
    """The rows of `ppl` by task, with short names, and the differences of every pair of models."""

    def __init__(self, result: PplResult) -> None:
        from tinygpt2.evaluation.results import short_names

        self.tasks = short_names([row.task for row in result.results])
        self.models = short_names([row.model for row in result.results])
        order = list(self.tasks)
        self.rows = sorted(result.results, key=lambda row: order.index(row.task))
        self.first = next(iter(self.models))
        self._pairs = {(pair.task, pair.a, pair.b): pair for pair in result.paired}
        # losses per token cannot be compared if some models predict different tokens; bits per byte can
        self.in_bits = any(one.difference is None and one.bits_per_byte is not None for one in result.paired)
        self.unit = "bits per byte" if self.in_bits else "nats per token"

    def difference(
        self, task: str, model: str, other: str, *, in_bits: bool = False
    ) -> tuple[float | None, float | None] | None:
        """Return the loss of `model` minus that of `other`, and its standard error; None for one and the same model.

        Both are None if they cannot be compared.

        Args:
            in_bits: in bits per byte instead of nats per token.
        """
        if model == other:
            return None
        sign, pair = 1, self._pairs.get((task, model, other))
        if pair is None:
            sign, pair = -1, self._pairs[task, other, model]
        value, error = (pair.bits_per_byte, pair.bits_per_byte_stderr) if in_bits else (pair.difference, pair.stderr)
        return None if value is None else sign * value, error

    def shown_difference(self, task: str, model: str, other: str) -> str:
        """Return a difference as a text."""
        found = self.difference(task, model, other, in_bits=self.in_bits)
        if found is None:
            return ""
        return _NOT_COMPARABLE if found[0] is None else _with_error(f"{found[0]:+.4f}", found[1])

    @property
    def above(self) -> str:
        """The heading of the differences from the first model."""
        name = self.models[self.first]
        return f"above {name}" if len(name) <= _LONGEST_NAME else "above the first"

    def parts(self) -> list[list[PplRow]]:
        """Return the rows of each table: for one model all of them, for several models those of each task."""
        if len(self.models) == 1:
            return [self.rows]
        return [[row for row in self.rows if row.task == task] for task in self.tasks]

    def columns(self, rows: Sequence[PplRow]) -> list[Column]:
        """Return every column of a table that is not the same in all its rows."""
        columns = []
        if len({row.task for row in rows}) > 1:
            columns.append(Column("task", [self.tasks[row.task] for row in rows], left=True))
        if len(self.models) > 1:
            columns.append(Column("model", [self.models[row.model] for row in rows], left=True))
        columns.append(Column("perplexity", [_digits(row.perplexity) for row in rows]))
        differing = {name: texts for name, text in _SHARED.items() if len(set(texts := _texts(rows, text))) > 1}
        if "per" in differing:
            columns.append(Column("per", differing["per"], 1))
        figures = [Column(name, _texts(rows, text), rank) for name, rank, text in _FIGURES]
        if len(self.models) > 1:
            above = [self.shown_difference(row.task, row.model, self.first) or "-" for row in rows]
            figures[2:2] = [Column(self.above, above, 2), Column("parameters", self._parameters(rows), 3)]
        columns += [column for column in figures if set(column.cells) != {"-"}]
        columns += [Column(name, texts, 10) for name, texts in differing.items() if name != "per"]
        return columns

    def _parameters(self, rows: Sequence[PplRow]) -> list[str]:
        """Return the number of each row's parameters, and its share of the first model's."""
        whole = next(row.parameters for row in rows if row.model == self.first)
        return [f"{short_count(row.parameters)} {row.parameters / whole:>4.0%}" for row in rows]

    def caption(self, rows: Sequence[PplRow]) -> str:
        """Return what all rows of a table share."""
        row, shared = rows[0], {name for name, text in _SHARED.items() if len(set(_texts(rows, text))) == 1}
        what = "perplexity" + (f" per {row.unit}" if "per" in shared else "")
        if len(self.models) == 1:
            what += f" of {self.models[self.first]} ({short_count(row.parameters)} parameters)"
        if len({row.task for row in rows}) == 1:
            what += f" on {self.tasks[row.task]}"
        facts = [f"{row.tokens:,} targets"] if "targets" in shared else []
        facts += [f"convention {row.convention}"]
        facts += [f"stride {row.stride:,}"] if "stride" in shared and row.stride is not None else []
        return ", ".join([what, *facts])

    def fidelity(self, rows: Sequence[PplRow]) -> tuple[str, list[Column]] | None:
        """Return caption and columns of the comparison with the reference; None if there is none."""
        from tinygpt2.evaluation.results import short_names

        compared = [row.fidelity for row in rows if row.fidelity is not None]
        if not compared:
            return None
        reference = compared[0].reference
        caption = f"fidelity to {self.models.get(reference) or short_names([reference])[reference]}"
        columns = [Column("model", [self.models[row.model] for row in rows], left=True)]
        if len({row.task for row in rows}) > 1:
            columns.insert(0, Column("task", [self.tasks[row.task] for row in rows], left=True))
        else:
            caption += f" on {self.tasks[rows[0].task]}"
            if len(counts := {one.tokens for one in compared}) == 1:
                caption += f", {counts.pop():,} targets"
        if len(errors := {one.reference_calibration_error for one in compared}) == 1:
            caption += f", its own calibration error {errors.pop():.2%}"
        shown = [*_FIDELITY, *(_OTHER_TOKENS if any(one.compared != "tokens" for one in compared) else [])]
        columns += [Column(name, [text(one) for one in compared], rank) for name, rank, text in shown]
        return caption, [column for column in columns if set(column.cells) != {"-"}]

    def notes(self) -> list[str]:
        """Return the lines below the table: what its columns mean, the convention, and the texts."""
        lines = []
        if any(row.fidelity is not None for row in self.rows):
            lines.append(FIDELITY_NOTE)
        if any(row.fidelity is not None and row.fidelity.compared != "tokens" for row in self.rows):
            lines.append(OTHER_TOKENS_NOTE)
        if len(self.models) > 1:
            than = "" if self.above.endswith(first := self.models[self.first]) else f" from {first}"
            what = (
                f"in bits per byte ± standard error over {self._parts()}"
                if self.in_bits
                else "in nats per token ± standard error"
            )
            lines.append(f"{self.above}: difference of the losses{than} {what}")
        if any(pair.difference is None and pair.bits_per_byte is None for pair in self._pairs.values()):
            lines.append(
                f"{_NOT_COMPARABLE}: the models predict different tokens, so their losses cannot be compared; "
                "bits per byte can"
            )
        if any(row.accuracy_norm is not None for row in self.rows):
            lines.append("normalised: accuracy by the log-probability of each answer per character")
        convention = self.rows[0].convention
        lines.append(f"convention {convention}: {CONVENTION_NOTES[convention]}")
        for row in {row.task: row for row in self.rows}.values():
            lines.append(
                f"{self.tasks[row.task]}: {row.words:,} words, {row.characters:,} characters, {row.bytes:,} bytes, "
                f"from {short_path(row.source)}"
            )
        return lines

    def _parts(self) -> str:
        """Return what the standard errors of differences in bits per byte are over."""
        found = {one.over for one in self._pairs.values() if one.over is not None}
        named = [f"{over}s" + (" where both predict the same tokens" if over == "window" else "") for over in found]
        return " or ".join(sorted(named))

    def matrix(self, task: str) -> list[Column]:
        """Return the differences of all pairs of models on a task, each once: the row's loss minus the column's."""
        models = list(self.models)
        rows, columns = models[1:], models[:-1]
        cells = [
            [self.shown_difference(task, row, column) if models.index(column) < models.index(row) else ""
             for row in rows]
            for column in columns
        ]  # fmt: skip
        named = [Column(self.models[column], texts) for column, texts in zip(columns, cells, strict=True)]
        return [Column("", [self.models[row] for row in rows], left=True), *named]


def render_ppl(result: PplResult, console: Console) -> None:
    """Print the table of `ppl` in the width of the window, and notes below it."""
    comparison = Comparison(result)
    left_out: list[str] = []
    for rows in comparison.parts():
        print_note(comparison.caption(rows), console, style="bold")
        left_out += [column.heading for column in print_table(comparison.columns(rows), console)]
        console.print()
        if (fidelity := comparison.fidelity(rows)) is not None:
            print_note(fidelity[0], console, style="bold")
            left_out += [column.heading for column in print_table(fidelity[1], console)]
            console.print()
    if left_out:
        print_note(f"not shown at this width: {', '.join(dict.fromkeys(left_out))}", console, "dim", indent="  ")
    for line in comparison.notes():
        print_note(line, console, indent="  ")
    matrices = {task: comparison.matrix(task) for task in comparison.tasks}
    if len(comparison.models) > 2 and all(total_width(one) <= console.width for one in matrices.values()):
        for task, matrix in matrices.items():
            where = f" on {comparison.tasks[task]}" if len(matrices) > 1 else ""
            console.print()
            print_note(
                f"loss of the row's model minus the column's{where}, in {comparison.unit}", console, style="bold"
            )
            print_table(matrix, console)


def as_csv(result: PplResult) -> str:
    """Return all figures of `ppl` as CSV, in full precision. The columns have the names of the JSON keys.

    With several models, four more columns for each say how far the loss is above that model's, in nats per token and in
    bits per byte, each with its standard error.
    """
    comparison = Comparison(result)
    others = comparison.models if len(comparison.models) > 1 else {}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = [_flat(row) for row in result.results]
    writer.writerow([*figures[0], *(f"above {name}{part}" for name in others.values() for part in _ABOVE)])
    for row, values in zip(result.results, figures, strict=True):
        differences = [
            comparison.difference(row.task, row.model, other, in_bits=in_bits) or (None, None)
            for other in others
            for in_bits in (False, True)
        ]
        writer.writerow([*values.values(), *(part for pair in differences for part in pair)])
    return text.getvalue()


def _flat(row: PplRow) -> dict[str, Any]:
    """Return the figures of a row by name; those of its fidelity are called `fidelity.kl` and so on."""
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    if (fidelity := values.pop("fidelity")) is not None:
        own = {field.name: getattr(fidelity, field.name) for field in dataclasses.fields(fidelity)}
        values |= {f"fidelity.{name}": value for name, value in own.items() if not isinstance(value, list)}
    return values


def as_markdown(result: PplResult) -> str:
    """Return the table of `ppl` with all its columns, and the notes below it, in Markdown."""
    comparison = Comparison(result)
    text = _markdown_table(comparison.columns(comparison.rows)) + f"\n{comparison.caption(comparison.rows)}\n"
    if (fidelity := comparison.fidelity(comparison.rows)) is not None:
        text += f"\n{_markdown_table(fidelity[1])}\n{fidelity[0]}\n"
    return text + "".join(f"\n{line}\n" for line in comparison.notes())


def _markdown_table(columns: Sequence[Column]) -> str:
    marks = ["---" if column.left else "---:" for column in columns]
    rows = zip(*(column.cells for column in columns), strict=True)
    lines = [[column.heading for column in columns], marks, *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _texts(rows: Sequence[PplRow], text: Callable[[PplRow], str]) -> list[str]:
    return [text(row) for row in rows]


def _digits(value: float) -> str:
    """Return a number with four digits or more, so that the numbers of a column line up."""
    return number(value) if value >= 1000 else f"{value:#.4g}".removesuffix(".")


def _with_error(value: str, error: Any) -> str:
    return value if error is None else f"{value} ± {error:.4f}"
