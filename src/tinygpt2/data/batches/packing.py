"""Several documents in one block: which ones, and what marks say of the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinygpt2.utils.types import Array

# The bits of a token's mark.
REAL = 1  # not padding
COUNTED = 2  # the loss counts it as a target
FIRST = 4  # a document begins with it


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Put documents into as few blocks as best fit finds, the longest ones first.

    Args:
        lengths: of the documents, each at most `size`.
        size: the number of tokens in a block.

    Returns:
        For each block the numbers of its documents.
    """
    blocks: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(size + 1)]  # the blocks that have so much room left
    some = 0  # a bit for each amount of room that any block has
    for number in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = lengths[number]
        fitting = some >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            block = room[left].pop()
            some &= ~(0 if room[left] else 1 << left)
        else:
            left, block = size, len(blocks)
            blocks.append([])
        blocks[block].append(number)
        left -= length
        room[left].append(block)
        some |= 1 << left
    return blocks


def block_of(documents: Sequence[tuple[Array, Array]], size: int) -> tuple[Array, Array]:
    """Return the tokens and the marks of a block.

    Args:
        documents: of each, the tokens, and which of them count as targets.
        size: the number of tokens in the block; padding is 0.
    """
    ids, marks, place = np.zeros(size, np.int64), np.zeros(size, np.uint8), 0
    for tokens, counted in documents:
        part = slice(place, place + len(tokens))
        ids[part], marks[part] = tokens, REAL + COUNTED * counted
        marks[place] = REAL + FIRST  # what comes before a document does not predict its first token
        place += len(tokens)
    return ids, marks


def document_lengths(first: Array) -> list[int]:
    """Return the lengths of the documents in a block; padding belongs to the last one.

    Args:
        first: whether a document begins with a token (T).
    """
    begins = np.flatnonzero(first[1:]) + 1
    found: list[int] = np.diff([0, *begins, len(first)]).tolist()
    return found
