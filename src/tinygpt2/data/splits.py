"""Divide the tokens of a corpus between the training split and the test split."""

from __future__ import annotations

import numpy as np

from tinygpt2.data.block_writers import SplitWriter
from tinygpt2.data.external_sort import ExternalSort
from tinygpt2.utils.progress import track
from tinygpt2.utils.types import Array


def divide(
    read: ExternalSort,
    kept: ExternalSort | None,
    last: int | None,
    cut: int | None,
    train: SplitWriter,
    test: SplitWriter,
) -> Array:
    """Write every token to its split. Return the documents and bytes of train and test, as two rows.

    Documents A, B and C come in one group. They have 3, 2 and 4 tokens, and the hashes 12, 90 and 40:

        by document, `last` is 40  ->  the hashes of A and C are at most 40: 7 tokens go to test, the 2 of B to train
        by position, `cut` is 6    ->  the first 6 tokens go to train (all of A and B, 1 of C), the last 3 to test

    Args:
        read: the corpus.
        kept: the held-out text from --test-source, if there is one. It goes to test.
        last: the largest hash of a held-out document, for a split by document.
        cut: the number of training tokens, for a split by position.
        train: writes the training split.
        test: writes the test split.
    """
    sizes, total = np.zeros((2, 2), np.int64), read.progress.tokens
    with track("pack", total, "tokens") as task:
        # a split by position holds out the last part of the text in its own order
        for entries, tokens in read.groups(shuffled=not (cut is not None and cut < total)):
            if cut is not None:
                head = max(0, cut - train.tokens)
                train.add(tokens[:head])
                test.add(tokens[head:])
                sizes[0] += _sizes(entries)
            else:
                held_out = entries["hash"] <= last
                in_test = np.repeat(held_out, entries["tokens"])  # for each token, not for each document
                train.add(tokens[~in_test])
                test.add(tokens[in_test])
                sizes += _sizes(entries[~held_out]), _sizes(entries[held_out])
            task.advance(len(tokens))
        for entries, tokens in kept.groups() if kept else ():
            test.add(tokens)
            sizes[1] += _sizes(entries)
    return sizes


def _sizes(entries: Array) -> tuple[int, int]:
    """Return the number of documents and of bytes in some index entries."""
    return int(entries["first"].sum()), int(entries["bytes"].sum(dtype=np.int64))


def training_tokens(total: int, length: int, fraction: float) -> int:
    """Return the number of training tokens, for a split by position.

    If `fraction` is 0, these are all tokens. Otherwise they are whole blocks, and at least one of several is held out.
    """
    blocks = total // length
    held_out = min(max(1, round(fraction * blocks)), blocks - 1) if fraction and blocks else 0
    return (blocks - held_out) * length if held_out else total
