"""How varied, repetitive and long texts are, counted on their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Written(NamedTuple):
    """What a model wrote.

    Attributes:
        tokens: without prompt and end of text.
        ended: whether the model ended it with an end of text.
    """

    tokens: list[int]
    ended: bool


@dataclass(frozen=True)
class TextStatistics:
    """Statistics of texts. A figure is None if there is nothing to count it on.

    Attributes:
        texts, tokens: the number of texts, and of their tokens.
        distinct_1, distinct_2, distinct_3: share of different n-grams among all n-grams of all texts.
            Source: Li et al. 2016, arXiv:1510.03055, section 5.2. More texts give lower shares: compare equal numbers.
        repeated_4: share of 4-grams that occurred in the same text before.
            Source: Welleck et al. 2019, arXiv:1908.04319, section 6.
        length: mean number of tokens.
        length_to_end: mean number of tokens of the texts that ended.
        ended: share of texts that ended.
    """

    texts: int
    tokens: int
    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    repeated_4: float | None
    length: float | None
    length_to_end: float | None
    ended: float | None


def text_statistics(texts: Sequence[Written]) -> TextStatistics:
    """Return the statistics of some texts."""
    rows, whole = [text.tokens for text in texts], [len(text.tokens) for text in texts if text.ended]
    one, two, three = (_share(len({*_grams(rows, n)}), len(_grams(rows, n))) for n in (1, 2, 3))
    every = sum(len(_grams([row], 4)) for row in rows)
    different = sum(len({*_grams([row], 4)}) for row in rows)
    tokens = sum(map(len, rows))
    return TextStatistics(
        len(rows),
        tokens,
        one,
        two,
        three,
        _share(every - different, every),
        _share(tokens, len(rows)),
        _share(sum(whole), len(whole)),
        _share(len(whole), len(rows)),
    )


def _grams(rows: Sequence[Sequence[int]], n: int) -> list[tuple[int, ...]]:
    return [gram for row in rows for gram in zip(*(row[start:] for start in range(n)), strict=False)]


def _share(part: int, of: int) -> float | None:
    return part / of if of else None
