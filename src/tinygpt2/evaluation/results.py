"""Figures of several models beside each other: in rows and pairs, as CSV, as Markdown, as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinygpt2.config.evaluation import Convention


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


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return names without the directories that all of them share."""
    paths = [name for name in names if Path(name).is_absolute()]
    if len(set(paths)) < 2:
        return {name: Path(name).name or name for name in names}
    shared = os.path.commonpath(paths)
    return {name: os.path.relpath(name, shared) if name in paths else name for name in names}
