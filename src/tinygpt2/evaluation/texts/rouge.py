"""ROUGE-L: how much of a reference a text repeats, in the same order.

It gives the figures of the package rouge-score without stemming.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def rouge_l(reference: str, text: str) -> float:
    """Return the F measure of the longest common subsequence of words; 0 if a side has no words.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3; tokens as in the package
    rouge-score: lower case, runs of a-z and 0-9.
    """
    expected, found = _words(reference), _words(text)
    common = _longest_common(expected, found)
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0  # of the row above, one to the left
        for place, other in enumerate(b, 1):
            above = row[place]
            row[place] = before + 1 if word == other else max(above, row[place - 1])
            before = above
    return row[-1]
