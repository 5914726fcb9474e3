"""One text in several vocabularies: what models with different tokens learn from, and are compared on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from transformers import GPT2LMHeadModel

from tinygpt2.alignment.decomposition import Decomposition
from tinygpt2.alignment.rank_cut import RankCut
from tinygpt2.compression.calibration import Batches
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.dataset import Blocks, PackedDataset, from_map_style
from tinygpt2.data.encoding import token_bytes
from tinygpt2.evaluation.scoring import Window, padded
from tinygpt2.models.lm_head import target_losses
from tinygpt2.runtime.devices import current_device, float64_device
from tinygpt2.utils.types import Array

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer


class Pieces(NamedTuple):
    """What each of the teacher's tokens is in a vocabulary: `pieces[starts[token] : starts[token + 1]]`."""

    starts: Array
    pieces: Array

    @classmethod
    def of(cls, whole: Tokenizer, cut: RankCut | None, rows: int) -> Pieces:
        """Find the pieces of every token.

        Args:
            whole: the teacher's tokenizer.
            cut: the smaller vocabulary; None if it is the teacher's.
            rows: number of tokens that the teacher has rows for.
        """
        if cut is None:
            return cls(np.arange(rows + 1), np.arange(rows))
        found = Decomposition.of(whole, cut, rows)
        return cls(found.starts, found.pieces)

    def counts(self, ids: Array) -> Array:
        """Return how many tokens each of the teacher's tokens is."""
        found: Array = self.starts[ids + 1] - self.starts[ids]
        return found

    def spelled(self, ids: Array) -> Array:
        """Return a text of the teacher's tokens in this vocabulary.

        These are the tokens that its tokenizer makes of the text, because a cut by rank keeps every border of the
        teacher's tokens; see `rank_cut`.
        """
        counts = self.counts(ids)
        ends = counts.cumsum()
        found: Array = self.pieces[np.repeat(self.starts[ids] - ends + counts, counts) + np.arange(counts.sum())]
        return found


def sizes_in_bytes(tokenizer: Tokenizer, rows: int) -> Array:
    """Return the bytes of text in each token of a byte-level tokenizer; special tokens have none."""
    sizes = np.zeros(rows, np.int64)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for name, token in tokenizer.get_vocab().items():
        if token < rows and name not in special:
            sizes[token] = len(token_bytes(name))
    return sizes


class SharedText:
    """Blocks of text that models of several vocabularies predict, byte for byte the same.

    Every model reads a block from its beginning in its own tokens, and predicts what follows the teacher's first token.
    So that each can read as far, blocks end where the vocabulary that needs most tokens has no positions left.

    Args:
        batches: blocks in the teacher's tokens.
        sizes: the bytes of each of these; see `sizes_in_bytes`.
        vocabularies: all that are compared.
        positions: number of positions that every model has.
    """

    def __init__(self, batches: Batches, sizes: Array, vocabularies: Sequence[Pieces], positions: int) -> None:
        self._sizes = sizes
        self._batches = [[_fitting(row, vocabularies, positions) for row in ids.cpu().numpy()] for ids in batches]

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return sum(map(len, self._batches))

    @property
    def size(self) -> int:
        """The bytes of the text."""
        return sum(int(self._sizes[row].sum()) for rows in self._batches for row in rows)

    def tokens(self, pieces: Pieces) -> int:
        """Return how many tokens the text has in a vocabulary."""
        return sum(int(pieces.counts(row).sum()) for rows in self._batches for row in rows)

    def bits_per_byte(self, model: GPT2LMHeadModel, pieces: Pieces, every: int = 1) -> float:
        """Return the cross-entropy in bits per byte of the text.

        Args:
            pieces: the model's vocabulary.
            every: use every `every`-th batch.
        """
        model, nats, size = model.to(current_device()), 0.0, 0
        for rows in self._batches[::every]:
            texts = [pieces.spelled(row) for row in rows]
            ends = np.cumsum([len(text) for text in texts])
            spans = [
                Window(int(end) - len(text), int(end), int(pieces.counts(row[:1])[0]))
                for end, text, row in zip(ends, texts, rows, strict=True)
            ]
            losses, _ = target_losses(model, model.lm_head.weight, *padded(np.concatenate(texts), spans, model.device))
            nats += float(losses.to(float64_device(losses.device)).double().sum())
            size += sum(int(self._sizes[row[1:]].sum()) for row in rows)
        return nats / math.log(2) / size


def _fitting(row: Array, vocabularies: Sequence[Pieces], positions: int) -> Array:
    """Return the beginning of a block that has no more tokens than positions in any vocabulary."""
    fits = [int(np.searchsorted(pieces.counts(row).cumsum(), positions, side="right")) for pieces in vocabularies]
    return row[: min(fits)]


class SpelledBlocks:
    """Blocks of a dataset in a smaller vocabulary: of each, the first tokens, as many as a block has.

    Args:
        blocks: in the teacher's tokens.
        numbers: of the blocks to use.
        pieces: the smaller vocabulary.
    """

    def __init__(self, blocks: Blocks, numbers: Sequence[int], pieces: Pieces) -> None:
        self._blocks, self._numbers, self._pieces = blocks, numbers, pieces

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return the tokens of a block, and which of them are text: only those of a shorter block are not."""
        length = self._blocks.sequence_length
        ids = self._pieces.spelled(self._blocks.row(self._numbers[index]).astype(np.int64))[:length].tolist()
        rest = [0] * (length - len(ids))
        return {"input_ids": [*ids, *rest], "attention_mask": [1] * len(ids) + rest}


def spelled_dataset(data: PackedDataset, pieces: Pieces, tokenizer: Tokenizer, count: int, seed: int) -> PackedDataset:
    """Return a training split in a smaller vocabulary.

    Args:
        data: in the teacher's tokens.
        tokenizer: the one with these pieces.
        count: number of blocks: those that a run with this seed reads first. All of them if there are fewer.
    """
    numbers = Shuffle(len(data.train), seed)[0 : min(count, len(data.train))]
    return from_map_style(SpelledBlocks(data.train, numbers, pieces), [], tokenizer, data.name)
