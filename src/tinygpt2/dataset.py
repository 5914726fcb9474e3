"""Packed blocks to batches: memory-mapped, seeded, and restartable at any step in constant time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tinygpt2.errors import DataError
from tinygpt2.files import read_json
from tinygpt2.pack import MANIFEST
from tinygpt2.tokenizer import fingerprint, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer


class Blocks:
    """One split's blocks, read from Arrow without copying the corpus.

    Args:
        split: a `datasets.Dataset` with one fixed-length column `input_ids`.
    """

    def __init__(self, split: Any) -> None:
        chunks = split.data.column("input_ids").chunks
        self.sequence_length: int = split.features["input_ids"].length
        self._chunks = [
            chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, self.sequence_length)
            for chunk in chunks
            if len(chunk)
        ]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._chunks else 0

    def row(self, index: int) -> np.ndarray[Any, Any]:
        """Return block `index` as stored."""
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        block: np.ndarray[Any, Any] = self._chunks[chunk][index - (int(self._ends[chunk - 1]) if chunk else 0)]
        return block

    def batch(self, indices: Any) -> Int[Tensor, "B T"]:
        """Return blocks as int64 tokens, one row per index."""
        return torch.from_numpy(np.stack([self.row(int(index)) for index in indices]).astype(np.int64))


class Shuffle:
    """The endless order of training blocks: a seeded permutation for each epoch, one after another.

    Position p of the order is known without walking there, so a run restarts at any step at once, and the
    sequence of global batches does not depend on the number of processes.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, span: slice) -> list[int]:
        return [self._at(position) for position in range(span.start, span.stop)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self._count)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                np.random.default_rng((self._seed, epoch)).permutation(self._count),
            )
        return int(self._order[offset])


@dataclass(frozen=True)
class Packed:
    """A pregenerated dataset: its two splits, its manifest and the directory of its tokenizer."""

    path: Path
    train: Blocks
    test: Blocks
    manifest: dict[str, Any]

    @property
    def sequence_length(self) -> int:
        """Tokens in a block."""
        return self.train.sequence_length

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary."""
        return int(self.manifest["vocab_size"])

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that made the dataset."""
        return load_tokenizer(str(self.path / "tokenizer"))


def is_packed(path: Path) -> bool:
    """Say whether a directory is a pregenerated dataset."""
    return (path / MANIFEST).is_file() or (path / "dataset_dict.json").is_file()


def load_packed(name: str) -> Packed:
    """Open a pregenerated dataset.

    Raises:
        DataError: there is none at that path, or a part of it is missing or broken.
    """
    path = Path(name)
    if not path.is_dir():
        raise DataError(
            f"no such dataset: {path}", "make one with: tinygpt2 pregenerate SOURCE --tokenizer T --out DIR"
        )
    if not (path / MANIFEST).is_file():
        raise DataError(
            f"{path} is no pregenerated dataset: it has no {MANIFEST}", "make one with tinygpt2 pregenerate"
        )
    import datasets

    try:
        manifest = read_json(path / MANIFEST)
        splits = datasets.load_from_disk(str(path))
        return Packed(path, Blocks(splits["train"]), Blocks(splits["test"]), manifest)
    except Exception as error:  # whatever a broken file makes the library raise
        raise DataError(
            f"cannot open the dataset {path}: {' '.join(str(error).split())}", f"see tinygpt2 verify {path}"
        ) from error


def check_dataset(path: Path) -> Iterator[str]:
    """Yield one message per fault of a pregenerated dataset: counts, lengths, token range, tokenizer."""
    try:
        packed = load_packed(str(path))
        tokenizer = packed.tokenizer()
    except Exception as error:
        yield str(error)
        return
    manifest = packed.manifest
    if fingerprint(tokenizer) != manifest.get("tokenizer_fingerprint"):
        yield f"tokenizer/ is not the one that made the dataset: its fingerprint differs from {MANIFEST}'s"
    for name, blocks in (("train", packed.train), ("test", packed.test)):
        if blocks.sequence_length != manifest.get("sequence_length"):
            expected = manifest.get("sequence_length")
            yield f"{name}: blocks of {blocks.sequence_length} tokens, {MANIFEST} says {expected}"
        expected = manifest.get("splits", {}).get(name, {}).get("sequences")
        if len(blocks) != expected:
            yield f"{name}: {len(blocks)} sequences, {MANIFEST} says {expected}"
        for index in range(len(blocks)):
            row = blocks.row(index)
            if row.min() < 0 or row.max() >= len(tokenizer):
                yield f"{name}: sequence {index} holds a token outside the vocabulary of {len(tokenizer)}"
                break
