"""The model card that is saved with every model: a page for people, and metadata for the Hub."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tinygpt2.config.compression import TruncateStudentConfig
from tinygpt2.errors import one_line
from tinygpt2.utils.files import shared_text

TRANSFORMERS = (
    "transformers",
    "Plain `transformers` loads it: `GPT2LMHeadModel.from_pretrained(...)`, `AutoTokenizer.from_pretrained(...)`.",
)


@dataclass(frozen=True)
class HubMetadata:
    """What the Hub shows of a model beside its page.

    Attributes:
        base_model: ids on the Hub of the models that it was made from.
        datasets: ids on the Hub of the datasets that it was trained on.
        language: codes of the texts' languages.
        license: the Hub's identifier of its licence; None if nobody named one.
        perplexities: its perplexity per token, by the text that it was measured on.
    """

    base_model: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    language: list[str] = field(default_factory=list)
    license: str | None = None
    perplexities: dict[str, float] = field(default_factory=dict)


def cut_metadata(config: TruncateStudentConfig, commit: str | None, perplexity: float | None) -> HubMetadata:
    """Return the metadata of a student that was cut from a teacher.

    Args:
        commit: of a teacher from the Hub.
        perplexity: held-out, per token of the teacher. It is not the student's own if it has other tokens.
    """
    return HubMetadata(
        base_model=[] if commit is None else [config.teacher.partition("@")[0]],
        language=config.language,
        license=config.license,
        perplexities={} if perplexity is None or config.changes_tokens else {"held-out text": perplexity},
    )


def model_card(
    title: str,
    how: str,
    figures: Mapping[str, Any],
    command: str,
    metadata: HubMetadata | None = None,
    held_out: str = "",
    engine: tuple[str | None, str] = TRANSFORMERS,
    *,
    configured: bool = True,
) -> str:
    """Render a model card: what the model is, how it was made, what was measured, and the command that made it.

    People share the card, so absolute paths in it are shortened to their last names.

    Args:
        title: heading of the card.
        how: sentences that say how the model was made.
        figures: rows of the card's table.
        command: the command and its options, without `tinygpt2`.
        metadata: for the block at the beginning of the card, which the Hub reads.
        held_out: a table, see `held_out_table`; empty if nothing was measured.
        engine: the library that loads the model, by its name on the Hub, and a sentence that says how.
        configured: whether there is a config.yaml with the command's options.
    """
    library, loading = engine
    origin = "The following command made this model"
    if configured:
        origin += f""". In the folder where it ran, config.yaml holds all its options, for
`tinygpt2 {command.split()[0]} --config`"""
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in figures.items())
    shown = command.replace("\n", "\n    ")  # the lines of a code block are indented
    return f"""---
{_front_matter(title, library, metadata or HubMetadata())}
---

# {_text(title)}

{_text(how)}

{loading}

| | |
|---|---|
{rows}
{held_out}
{origin}:

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


def _front_matter(title: str, library: str | None, metadata: HubMetadata) -> str:
    """Return the metadata in the form that the Hub checks."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or "text",
            dataset_name=one_line(shared_text(name)),
            metric_type="perplexity",
            metric_name="perplexity per token",
            metric_value=round(value, 4),
        )
        for name, value in metadata.perplexities.items()
        if math.isfinite(value)
    ]
    return ModelCardData(
        base_model=metadata.base_model or None,
        datasets=metadata.datasets or None,
        language=metadata.language or None,
        license=metadata.license,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["gpt2", "tinygpt2"],
        model_name=one_line(title) or "model",
        eval_results=results or None,
    ).to_yaml()


def _text(value: object) -> str:
    """Return text that Markdown shows as it is, in one line, without this machine's folders."""
    return shared_text(one_line(value)).replace("<", "&lt;")


def _cell(value: object) -> str:
    """Return the text of a table's cell, which may hold Markdown."""
    return _text(value).replace("|", "\\|")
