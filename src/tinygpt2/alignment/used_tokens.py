"""Which tokens a dataset uses most, so that a smaller vocabulary keeps these.

A token is used wherever the merges of a text make it, whether it stays or goes on into a larger one. So each token is
used at least as often as those that are merged from it, and the most used ones can all be made.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from tinygpt2.alignment.rank_cut import RankCut, cut_by_rank, merged_pairs
from tinygpt2.data.dataset import Blocks
from tinygpt2.utils.progress import follow

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

COUNTED = 2**24  # tokens of a dataset, at most
_AT_ONCE = 256  # blocks


def cut_by_use(tokenizer: Tokenizer, size: int, rows: int, blocks: Blocks) -> RankCut:
    """Keep the tokens that a dataset uses most, with all bytes and special tokens: see `cut_by_rank`.

    Args:
        blocks: the dataset, in the tokenizer's tokens.
    """
    counts = token_counts(blocks, max(tokenizer.get_vocab().values()) + 1)
    return cut_by_rank(tokenizer, size, rows, by_use(tokenizer, counts))


def token_counts(blocks: Blocks, size: int) -> Int[np.ndarray, " V"]:
    """Count the tokens of a dataset, of evenly spaced blocks if there are more than `COUNTED`.

    Args:
        size: V, the number of tokens.
    """
    chosen, counts = blocks.spaced(max(1, COUNTED // blocks.sequence_length)), np.zeros(size, np.int64)
    for start in follow(range(0, len(chosen), _AT_ONCE), "count tokens", "batches", announce=False):
        batch = chosen.batch(range(start, min(start + _AT_ONCE, len(chosen))))
        rows = batch.input_ids.cpu().numpy()
        for row, length in zip(rows, batch.real_lengths, strict=True):
            counts += np.bincount(row[:length], minlength=size)
    return counts


def by_use(tokenizer: Tokenizer, counts: Int[np.ndarray, " V"]) -> list[int]:
    """Return the tokens that merges make, the most used first, and of equally used ones those of earlier merges.

    Args:
        counts: how often each token occurs.
    """
    content, vocabulary = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.get_vocab()
    used, made = counts.tolist(), dict[int, tuple[int, int]]()
    for left, right in merged_pairs(content["model"]):
        made.setdefault(vocabulary[left + right], (vocabulary[left], vocabulary[right]))
    for token, parts in reversed(made.items()):  # what is merged from a token comes after it
        for part in parts:
            used[part] += used[token]
    return sorted(made, key=lambda token: -used[token])
