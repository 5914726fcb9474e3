"""Figures of several models beside each other: in rows and pairs, as CSV, as Markdown, as a picture."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tinygpt2.config.models import Convention
from tinygpt2.evaluation.conventions import SAYS
from tinygpt2.training.metrics import figure_of, save_figure


@dataclass(frozen=True)
class PplRow:
    """One model on one task.

    Attributes:
        model, task, convention: what was measured, and how.
        perplexity: per `unit`, which the convention chooses.
        loss: nats per token, over `tokens` targets; `stderr` is its standard error over windows.
        bits_per_character, bits_per_byte, byte_perplexity, word_perplexity: the total loss of all targets, spread over
            the whole text's `characters`, `bytes` and `words`, for models with different vocabularies (by `hf` the
            first token of a window is no target, though its characters count).
        accuracy: share of LAMBADA's last words, or of CBT's answers, that were right.
        accuracy_without_stop_words: of last words, if the model may answer with no stop word.
        unit, units: what perplexity is per, and how many of them the text has.
        stride: tokens from one window's start to the next; None where every passage is a window of its own.
        parameters: of the model.
        source: where the text came from.
    """

    model: str
    task: str
    convention: Convention
    perplexity: float
    loss: float
    stderr: float | None
    bits_per_character: float
    bits_per_byte: float
    byte_perplexity: float
    word_perplexity: float
    accuracy: float | None
    accuracy_without_stop_words: float | None
    unit: str
    units: int
    tokens: int
    words: int
    characters: int
    bytes: int
    stride: int | None
    seconds: float
    tokens_per_second: float
    parameters: int
    source: str


@dataclass(frozen=True)
class Paired:
    """Difference of two models' losses on one task (a - b, nats per token), window by window.

    Both are None where the models' windows hold different targets, so that losses do not compare.
    """

    a: str
    b: str
    task: str
    difference: float | None
    stderr: float | None


@dataclass(frozen=True)
class PplResult:
    """Every model on every task, and every pair of models."""

    results: list[PplRow]
    paired: list[Paired]


COLUMNS = {
    "model": "model", "task": "task", "perplexity": "perplexity", "unit": "per", "loss": "loss", "stderr": "stderr",
    "bits_per_character": "bits/char", "bits_per_byte": "bits/byte", "word_perplexity": "word ppl",
    "accuracy": "accuracy", "accuracy_without_stop_words": "acc. (no stop words)", "tokens": "targets",
    "stride": "stride", "tokens_per_second": "tokens/s",
}  # fmt: skip
"""A table's columns for people: attributes of `PplRow` and their headings."""


def table(rows: Sequence[PplRow]) -> tuple[list[str], list[list[Any]]]:
    """Return headings and cells for people; a column that no row fills is left out."""
    keys = [key for key in COLUMNS if any(getattr(row, key) is not None for row in rows)]
    return [COLUMNS[key] for key in keys], [[getattr(row, key) for key in keys] for row in rows]


def remarks(result: PplResult) -> list[str]:
    """Return what a reader of the table has to know besides: the convention, the texts, and how models differ."""
    convention = result.results[0].convention
    lines = [f"convention {convention}: {SAYS[convention]}"]
    for row in {row.task: row for row in result.results}.values():
        lines.append(
            f"{row.task}: {row.words:,} words, {row.characters:,} characters, {row.bytes:,} bytes, from {row.source}"
        )
    for pair in result.paired:
        if pair.difference is None:
            lines.append(f"{pair.task}: {pair.a} and {pair.b} have different targets: no difference")
        else:
            error = f" ± {pair.stderr:.4f}" if pair.stderr is not None else ""
            lines.append(f"{pair.task}: loss of {pair.a} - {pair.b} = {pair.difference:+.4f}{error} nats per token")
    return lines


def as_csv(rows: Sequence[PplRow]) -> str:
    """Return every figure of every row, in full precision, under the names that the JSON has."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [field.name for field in fields(rows[0])]
    writer.writerow(keys)
    writer.writerows([getattr(row, key) for key in keys] for row in rows)
    return text.getvalue()


def as_markdown(headings: list[str], cells: list[list[str]]) -> str:
    """Return a table in Markdown, the first column to the left and the others to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *cells]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return names without the directories that all of them share."""
    paths = [name for name in names if Path(name).is_absolute()]
    if len(set(paths)) < 2:
        return {name: Path(name).name or name for name in names}
    shared = os.path.commonpath(paths)
    return {name: os.path.relpath(name, shared) if name in paths else name for name in names}


def plot_comparison(rows: Sequence[PplRow], path: Path) -> None:
    """Draw perplexity against parameters and against measured tokens/s, one line for each task, as a PNG."""
    figure, axes = figure_of(2)
    names, tasks = short_names([row.model for row in rows]), short_names([row.task for row in rows])
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        for axis, key in zip(axes, ("parameters", "tokens_per_second"), strict=True):
            points = sorted((getattr(row, key), row.perplexity, names[row.model]) for row in of_task)
            axis.plot(
                [x for x, _, _ in points],
                [y for _, y, _ in points],
                marker="o",
                label=f"{tasks[task]} (per {of_task[0].unit})",
            )
            for x, y, name in points:
                axis.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    for axis, label in zip(axes, ("parameters", "tokens/s, measured here"), strict=True):
        axis.set(xlabel=label, ylabel="perplexity", xscale="log", yscale="log")
        axis.margins(x=0.2)
        axis.legend()
    figure.suptitle(f"zero-shot perplexity, convention {rows[0].convention}")
    save_figure(figure, path)
