"""What the search for a target looks at and returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from tinygpt2.compression.sizes import Shape
from tinygpt2.compression.truncate import CutPerplexity
from tinygpt2.workflows.cuts.scoring import NATS, CutScore

_OF_A_DEPTH = 2  # finalists that may have the same number of layers, while others are left


@dataclass(frozen=True)
class CutCandidate:
    """A student that the search has looked at. Scores that it did not get are None.

    Attributes:
        bytes: of its weights in float32.
        milliseconds: for a token that it decodes; with --vocab-sizes, for as much text as one of the teacher's tokens.
        quick: its score after a fit on a quarter of the calibration texts, on a quarter of the texts to score on.
        fitted: after a fit on all of them.
        trained: after that and a short distillation.
    """

    n_layer: int
    n_embd: int
    n_head: int
    n_inner: int
    vocab_size: int
    parameters: int
    bytes: int
    milliseconds: float
    quick: CutScore
    fitted: CutScore | None = None
    trained: CutScore | None = None

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        return Shape(self.n_layer, self.n_embd, self.n_head, self.n_inner)


@dataclass(frozen=True)
class CutRounds:
    """The best shape cut in one round and in several, with distillation in between, after equally many steps.

    Attributes:
        rounds: how many there are if there are several.
        shapes: after each of these rounds.
        one, several: the scores.
    """

    rounds: int
    shapes: list[Shape]
    one: CutScore
    several: CutScore


@dataclass(frozen=True)
class CutVocabulary:
    """A vocabulary that the search for a target has looked at.

    Attributes:
        tokens_per_byte: on the text that students are scored on.
        length: tokens for the text of one of the teacher's tokens, mean. A candidate's milliseconds, divided by it,
            are those for one of its own tokens.
    """

    vocab_size: int
    tokens_per_byte: float
    length: float


@dataclass(frozen=True)
class CutBits:
    """Held-out bits per byte of a student and of its teacher, on the same bytes.

    Attributes:
        sequences: number of blocks of the test split.
    """

    student: float
    teacher: float
    sequences: int


@dataclass(frozen=True)
class CutSearchResult:
    """The result of `truncate-student` with a target.

    Attributes:
        layers: the teacher's blocks that were kept, counted from 0.
        target: the option that gave it.
        bytes: size of the weights (float32).
        milliseconds, teacher_milliseconds: for a token that is decoded; see `CutCandidate`.
        score: of the student.
        steps, tokens: of the distillation that the student has seen.
        candidates: all that were looked at, in the order of their last scores.
        rounds: None if the student has at least half of the teacher's parameters.
        perplexity: on the test split; None if it is empty, or with --vocab-sizes.
        unit: of all losses: nats per token, or with --vocab-sizes bits per byte.
        vocabularies: that were looked at; None without --vocab-sizes.
        bits_per_byte: on the test split; None if it is empty, or without --vocab-sizes.
    """

    model: str
    layers: list[int]
    parameters: int
    teacher_parameters: int
    n_embd: int
    n_head: int
    n_inner: int
    vocab_size: int
    target: str
    bytes: int
    milliseconds: float
    teacher_milliseconds: float
    score: CutScore
    steps: int
    tokens: int
    candidates: list[CutCandidate]
    seconds: float
    rounds: CutRounds | None = None
    perplexity: CutPerplexity | None = None
    unit: str = NATS
    vocabularies: list[CutVocabulary] | None = None
    bits_per_byte: CutBits | None = None


def best_of_each_vocabulary(ranked: Sequence[CutCandidate], count: int) -> list[CutCandidate]:
    """Return the best candidates, equally many of each vocabulary; see `best_of_each_depth`.

    A student that was only fitted has never read the tokens of a smaller vocabulary. So its loss says what it is worth
    beside students with the same one, and too much against it beside others. Vocabularies meet after the training.
    """
    groups: dict[int, list[CutCandidate]] = {}
    for one in ranked:
        groups.setdefault(one.vocab_size, []).append(one)
    turns = zip_longest(*(best_of_each_depth(group, count) for group in groups.values()))
    return [one for turn in turns for one in turn if one is not None][:count]


def best_of_each_depth(ranked: Sequence[CutCandidate], count: int) -> list[CutCandidate]:
    """Return the best candidates, at most two of each depth while there are others.

    After training, the order of depths can be another one.
    """
    first = [
        one for number, one in enumerate(ranked)
        if [other.n_layer for other in ranked[:number]].count(one.n_layer) < _OF_A_DEPTH
    ][:count]  # fmt: skip
    rest = [one for one in ranked if one not in first]
    return [*first, *rest[: count - len(first)]]
