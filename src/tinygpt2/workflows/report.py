"""report.html of a training run, from the files that the run has written. It needs no torch."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from tinygpt2.training.state import RUN_FILE
from tinygpt2.utils.html_report import REPORT, chart_section, paragraphs, settings_section, write_page
from tinygpt2.workflows.curves import run_charts, run_options
from tinygpt2.workflows.runs import RunStatus, run_status


def write_run_report(out: Path) -> Path:
    """Write OUT/report.html: curves, the figures of the model card, and all settings. Return its path."""
    status = run_status(out)
    name = Path(status.path).name
    parts = [
        paragraphs(_lead(status)),
        chart_section("Curves", run_charts(out)),
        settings_section("Figures", card_figures(out), closed=False),
        settings_section(f"Settings ({RUN_FILE})", run_options(out)),
    ]
    write_page(out / REPORT, f"{status.command}: {name}", parts)
    return out / REPORT


def _lead(status: RunStatus) -> str:
    """Return a sentence that says how far the run is and how good its model is."""
    said = progress_of(status)
    if status.perplexity is not None:
        said += f" Held-out perplexity: {status.perplexity:,.2f}."
    return f"{said} {status.problem or ''}".strip()


def progress_of(status: RunStatus) -> str:
    """Return a sentence about a run's state and its steps."""
    of = f" of {status.total_steps:,}" if status.total_steps else ""
    if status.state == "done":
        return f"Done after {status.step:,} steps and {status.tokens:,} tokens."
    verb = {"running": "Running, at", "maybe running": "Perhaps running, at", "failed": "Failed at"}
    return f"{verb.get(status.state, 'Interrupted at')} step {status.step:,}{of}."


def card_figures(out: Path) -> dict[str, str]:
    """Return the figures in the tables of a model card; empty if the model is not saved yet."""
    card = out / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines if re.fullmatch(r"\|.*\|", line.strip())]
    cells = [[unescape(cell.replace("\\|", "|")).replace("`", "").strip() for cell in row] for row in rows]
    cells = [row for row in cells if row[0] and not re.fullmatch(r"[-: ]+", row[0])]
    held_out = [row for row in cells if len(row) == 3][1:]  # after the heading: a model, its loss and its perplexity
    figures = {row[0]: row[1] for row in cells if len(row) == 2}
    return figures | {f"held-out loss, perplexity: {name}": f"{loss}, {value}" for name, loss, value in held_out}
