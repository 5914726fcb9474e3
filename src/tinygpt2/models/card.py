"""The model card that is saved with every model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinygpt2.errors import one_line


def model_card(title: str, how: str, figures: Mapping[str, Any], command: str, held_out: str = "") -> str:
    """Render a model card: what the model is, how it was made, what was measured, and the command that made it.

    Args:
        title: heading of the card.
        how: sentences that say how the model was made.
        figures: rows of the card's table.
        command: the command and its options, without `tinygpt2`.
        held_out: a table, see `held_out_table`; empty if nothing was measured.
    """
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in figures.items())
    shown = command.replace("\n", "\n    ")  # the lines of a code block are indented
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- tinygpt2
---

# {_text(title)}

{_text(how)}

Plain `transformers` loads it: `GPT2LMHeadModel.from_pretrained(...)`, `AutoTokenizer.from_pretrained(...)`.

| | |
|---|---|
{rows}
{held_out}
The following command made this model. config.yaml holds all its options, for `tinygpt2 {command.split()[0]} --config`:

    tinygpt2 {shown}
"""


def held_out_table(text: str, rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return the losses and perplexities of several models on a held-out text as a table for the model card.

    Args:
        text: what was held out.
        rows: `loss` (nats per token), `stderr` of the loss and `perplexity` by the model's name.
    """
    lines = [f"| held out: {_cell(text)} | loss (nats/token) | perplexity |", "|---|---|---|"]
    for name, one in rows.items():
        error = f" ± {one['stderr']:.4f}" if one.get("stderr") is not None else ""
        lines.append(f"| {_cell(name)} | {one['loss']:.4f}{error} | {one['perplexity']:.2f} |")
    return "\n" + "\n".join(lines) + "\n"


def _text(value: object) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return one_line(value).replace("<", "&lt;")


def _cell(value: object) -> str:
    """Return the text of a table's cell, which may hold Markdown."""
    return _text(value).replace("|", "\\|")
