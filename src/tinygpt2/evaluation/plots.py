"""A plot that compares the perplexity of several models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinygpt2.evaluation.results import PplRow, short_names
from tinygpt2.utils.plotting import figure_of, save_figure


def plot_comparison(rows: Sequence[PplRow], path: Path) -> None:
    """Plot perplexity against parameters and against measured tokens/s, one line for each task, as a PNG."""
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
