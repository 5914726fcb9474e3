"""The figures of `ppl`: one row for each model and task, and the differences between models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool

from tinygpt2.config.evaluation import Convention
from tinygpt2.evaluation.conventions import TokenizedTask, headline_loss
from tinygpt2.evaluation.fidelity import Fidelity
from tinygpt2.evaluation.scoring import Scores, perplexity_of
from tinygpt2.evaluation.tasks import Task
from tinygpt2.utils.files import absolute


@dataclass(frozen=True)
class PplRow:
    """One model on one task.

    Attributes:
        model, task, convention: the model, the task and the convention of perplexity.
        perplexity: per `unit`, which depends on the convention.
        loss: mean loss of the `tokens` targets, in nats per token.
        stderr: standard error of `loss` over windows; None for a single window.
        bits_per_character, bits_per_byte, byte_perplexity, word_perplexity: the total loss of all targets, divided by
            the `characters`, `bytes` or `words` of the whole text. They compare models with different vocabularies.
            (With `hf`, the first token of a window is not a target, but its characters count.)
        accuracy: share of the questions whose right answer has the largest probability, or of LAMBADA's last words that
            the model predicted; None if not measured.
        accuracy_stderr: its standard error over the questions or passages.
        accuracy_norm, accuracy_bytes: the same, if the logarithm of each answer's probability is divided by its
            characters or bytes; None where lm-evaluation-harness does not do so.
        accuracy_without_stop_words: the same for last words, if the model must not answer with a stop word.
        unit, units: the unit of perplexity, and how many of them the text has.
        tokens: number of targets.
        words, characters, bytes: sizes of the text.
        stride: tokens from one window's start to the next; None if every passage is one window.
        seconds: time that the forward passes took.
        tokens_per_second: targets per second, including those of candidates that do not count.
        parameters: number of the model's parameters.
        source: where the text came from.
        fidelity: how close the predictions are to those of --reference; None without it.
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
    accuracy_stderr: float | None = None
    accuracy_norm: float | None = None
    accuracy_norm_stderr: float | None = None
    accuracy_bytes: float | None = None
    accuracy_bytes_stderr: float | None = None
    fidelity: Fidelity | None = None


@dataclass(frozen=True)
class Paired:
    """Difference of two models on one task, a - b.

    Attributes:
        difference, stderr: of the losses in nats per token, with the standard error over windows. None if the models'
            windows have different targets: then their losses do not compare.
        bits_per_byte, bits_per_byte_stderr: of the bits per byte, which compare models with different tokens, too, with
            the standard error over `parts`. None if the models' tokens do not have the same lines.
        over: which parts of the text these are: windows if both predict the same tokens, else lines, or texts (the last
            words or right answers of a task that has them).
        parts: their number.
    """

    a: str
    b: str
    task: str
    difference: float | None
    stderr: float | None
    bits_per_byte: float | None = None
    bits_per_byte_stderr: float | None = None
    over: Literal["window", "line", "text"] | None = None
    parts: int | None = None


@dataclass(frozen=True)
class PplResult:
    """The figures of every model on every task, and the differences of every pair of models."""

    results: list[PplRow]
    paired: list[Paired]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return each path or name with as few of its last parts as tell it from the others.

    a/gpt2 and b/student become gpt2 and student; a/gpt2 and b/gpt2 stay.
    """
    paths = {name: Path(name).parts for name in names}
    counts = dict.fromkeys(paths, 1)
    while True:
        short = {name: str(Path(*parts[-counts[name] :])) for name, parts in paths.items()}
        texts = list(short.values())
        alike = [name for name in paths if texts.count(short[name]) > 1]
        if not alike:
            return short
        longer = [name for name in alike if counts[name] < len(paths[name])]
        if not longer:
            return {name: name for name in paths}
        for name in longer:
            counts[name] += 1


def make_row(
    model: str,
    parameters: int,
    task: Task,
    convention: Convention,
    tokenized: TokenizedTask,
    scores: Scores,
    seconds: float,
    predicted: int,
) -> PplRow:
    """Compute all figures of one model on one task.

    Args:
        scores: the scores that the figures use, from `counted`.
        seconds: time for all forward passes.
        predicted: tokens predicted in that time, including those of candidates that do not count.
    """
    total, size = float(scores.sums.sum()), max(tokenized.bytes, 1)
    filtered = scores.filtered if convention == "gpt2-paper" else None
    shares = {"": scores.greedy, "_norm": None, "_bytes": None}
    if scores.by_length is not None:
        shares |= {"_norm": scores.by_length[0], "_bytes": scores.by_length[1]}
    accuracies = {f"accuracy{part}{end}": value for part, hits in shares.items() for end, value in _share(hits).items()}
    return PplRow(
        model=absolute(model),
        task=task.name,
        convention=convention,
        perplexity=perplexity_of(headline_loss(tokenized, scores, convention)),
        loss=scores.loss,
        stderr=scores.stderr,
        bits_per_character=total / math.log(2) / max(tokenized.characters, 1),
        bits_per_byte=total / math.log(2) / size,
        byte_perplexity=perplexity_of(total / size),
        word_perplexity=perplexity_of(total / max(tokenized.words, 1)),
        accuracy_without_stop_words=None if filtered is None else float(filtered.mean()),
        unit=tokenized.unit,
        units=scores.targets if tokenized.unit == "token" else tokenized.units,
        tokens=scores.targets,
        words=tokenized.words,
        characters=tokenized.characters,
        bytes=tokenized.bytes,
        stride=tokenized.stride,
        seconds=seconds,
        tokens_per_second=predicted / seconds,
        parameters=parameters,
        source=absolute(task.source),
        **accuracies,  # type: ignore[arg-type]
    )


def make_pair(
    a: str, b: str, task: str, left: tuple[TokenizedTask, Scores], right: tuple[TokenizedTask, Scores]
) -> Paired:
    """Compute the difference of two models on one task.

    Args:
        a, b: the models.
        left, right: the task in the tokens of each of them, and its scores from `counted`.
    """
    (one, ours), (other, theirs) = left, right
    named, size = (absolute(a), absolute(b), task), max(one.bytes, 1)
    if one.same_targets(other):
        tokens = Scores(ours.sums - theirs.sums, ours.counts)
        bits = _bits(tokens, size)
        return Paired(*named, tokens.loss, tokens.stderr, *bits, "window", len(tokens.sums))
    sums = [scores.sums if one.stride is None else scores.by_line for scores in (ours, theirs)]
    if any(found is None or len(found) != len(one.parts) for found in sums) or not one.parts.sum():
        return Paired(*named, None, None)
    lines = Scores(sums[0] - sums[1], one.parts)  # type: ignore[operator]
    bits = _bits(lines, size)
    return Paired(*named, None, None, *bits, "text" if one.stride is None else "line", len(one.parts))


def _bits(scores: Scores, size: int) -> tuple[float, float | None]:
    """Return mean and standard error of scores in bits per byte of a text of `size` bytes."""
    factor = scores.targets / size / math.log(2)
    return scores.loss * factor, None if scores.stderr is None else scores.stderr * factor


def _share(hits: Bool[np.ndarray, " Q"] | None) -> dict[str, float | None]:
    """Return the share of hits and, under `_stderr`, its standard error: from the sample's variance, as the harness."""
    if hits is None:
        return {"": None, "_stderr": None}
    error = float(hits.std(ddof=1) / math.sqrt(len(hits))) if len(hits) > 1 else None
    return {"": float(hits.mean()), "_stderr": error}
