"""Read batches from packed datasets: memory-mapped, shuffled by a seed, and from any step in constant time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt2.data.batches.batch import Batch
from tinygpt2.data.batches.block_readers import (
    ArrowPart,
    BlockPart,
    Hdf5Part,
    JsonPart,
    MapPart,
    MarkedPart,
    real_tokens,
)
from tinygpt2.data.batches.packing import document_lengths
from tinygpt2.data.block_writers import MANIFEST
from tinygpt2.data.layout import dataset_folders, shard_folders
from tinygpt2.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from tinygpt2.errors import ConfigError, DataError, one_line
from tinygpt2.utils.files import read_json
from tinygpt2.utils.types import Array

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer


class Blocks:
    """The blocks of one split, which are read from their files when they are needed.

    Args:
        parts: the stored parts of the split, in order.
        length: number of tokens in a block.
        chosen: the numbers of the blocks to use, if not all of the parts' blocks.
        end: the token that ends a document, if no token is to see the documents before its own.
    """

    def __init__(
        self, parts: Sequence[BlockPart], length: int, chosen: Sequence[int] | None = None, end: int | None = None
    ) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self._chosen, self.end = chosen, end
        self.sequence_length = length

    def __len__(self) -> int:
        return self.stored if self._chosen is None else len(self._chosen)

    @property
    def stored(self) -> int:
        """The number of blocks that the parts hold."""
        return int(self._ends[-1]) if self._parts else 0

    def spaced(self, count: int) -> Blocks:
        """Return `count` of the blocks, evenly spaced, or all if there are not more."""
        if count >= len(self):
            return self
        numbers = [index * len(self) // count for index in range(count)]
        return Blocks(self._parts, self.sequence_length, [self._number(index) for index in numbers], self.end)

    def ending(self, end: int) -> Blocks:
        """Return the blocks such that no token sees documents before its own, which end with the given token."""
        return Blocks(self._parts, self.sequence_length, self._chosen, end)

    def _number(self, index: int) -> int:
        """Return the number of a block among those of all parts."""
        return index if self._chosen is None else self._chosen[index]

    @property
    def parts(self) -> list[BlockPart]:
        """The stored parts that the blocks are read from, in order."""
        return self._parts

    @property
    def padded(self) -> bool:
        """Whether any block may be padded."""
        return any(part.padded for part in self._parts)

    @property
    def marked(self) -> bool:
        """Whether not every real token but the first counts as a target."""
        return self.divided or self.labelled

    @property
    def labelled(self) -> bool:
        """Whether the stored blocks say which of their tokens count as targets, as those of pairs do."""
        return any(part.marked for part in self._parts)

    @property
    def divided(self) -> bool:
        """Whether no token sees documents before its own."""
        return self.end is not None or any(part.divided for part in self._parts)

    def _place(self, index: int) -> tuple[BlockPart, int]:
        """Return the part that holds a block, and the block's number in it."""
        index = self._number(index)
        at = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[at], index - (int(self._ends[at - 1]) if at else 0)

    def _read(self, index: int) -> tuple[Array, int]:
        """Return a block as stored, and the number of its real tokens.

        Raises:
            DataError: the block contains only padding, or has padding before its end.
        """
        part, at = self._place(index)
        ids, mask = part.read(at, at + 1)
        return ids[0], self.sequence_length if mask is None else real_tokens(mask, self._number(index))[0]

    def row(self, index: int) -> Array:
        """Return the real tokens of a block, as stored."""
        ids, length = self._read(index)
        return ids[:length]

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Return the number of real tokens in each block."""
        if not self.padded:
            return [self.sequence_length] * len(indices)
        return [int(self._lengths[self._number(index)]) for index in indices]

    @cached_property
    def _lengths(self) -> Array:
        """The number of real tokens in each block of the parts. They are read once: every step asks for some."""
        return np.concatenate([part.lengths() for part in self._parts])

    def targets(self, indices: Sequence[int]) -> list[int]:
        """Return the number of targets that count in each block."""
        if not self.marked:
            return [max(0, length - 1) for length in self.lengths(indices)]
        return self.batch(indices).targets

    def _marks(self, index: int, ids: Array, length: int) -> tuple[Array, Array]:
        """Return with which tokens of a block documents begin that are apart, and which tokens count as targets."""
        part, at = self._place(index)
        first, counted = np.zeros(len(ids), np.bool_), np.arange(len(ids)) < length
        if part.divided:
            first |= part.first(at, at + 1)[0]
        elif self.end is not None:
            first[1:] = ids[:-1] == self.end
        first[0] = True  # which nothing predicts, as the first token of any document
        return first, counted & ~first & (part.counted(at, at + 1)[0] if part.marked else True)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return blocks as int64 tokens, one row per index."""
        import torch

        rows = [self._read(int(index)) for index in indices]
        ids = torch.from_numpy(np.stack([ids for ids, _ in rows]).astype(np.int64))
        lengths, counted, documents = [length for _, length in rows], None, None
        if self.marked:
            marks = [self._marks(int(index), *row) for index, row in zip(indices, rows, strict=True)]
            counted = np.stack([one for _, one in marks])
            documents = [document_lengths(first) for first, _ in marks] if self.divided else None
        if min(lengths) == self.sequence_length:
            return Batch(ids, None, counted, documents)
        for row, length in zip(ids, lengths, strict=True):
            row[length:] = 0  # the model looks up an embedding for padding too, so it must be a valid token
        return Batch(ids, lengths, counted, documents)


@dataclass(frozen=True)
class PackedDataset:
    """A dataset of blocks.

    Attributes:
        name: its directory, or a name for messages.
        train: the training split.
        test: the held-out split.
        manifest: the description of the dataset, as in pregenerate.json.
        made_with: its tokenizer, or the tokenizer's directory.
        members: the datasets that it consists of, if it is several; see `mixture`.
        shares: the share of each member in the training; empty if every block is used once in each pass.
    """

    name: str
    train: Blocks
    test: Blocks
    manifest: dict[str, Any]
    made_with: Any
    members: tuple[PackedDataset, ...] = ()
    shares: tuple[Fraction, ...] = ()

    @property
    def sequence_length(self) -> int:
        """Number of tokens in a block."""
        return self.train.sequence_length

    @property
    def content(self) -> str:
        """Fingerprint of all blocks. It does not depend on the name of the directory."""
        return str(self.manifest["content"])

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary."""
        return int(self.manifest["vocab_size"])

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer with which the dataset was made."""
        made: Tokenizer = load_tokenizer(str(self.made_with)) if isinstance(self.made_with, Path) else self.made_with
        return made


def from_map_style(train: Any, test: Any, tokenizer: Tokenizer, name: str = "custom dataset") -> PackedDataset:
    """Wrap map-style datasets, so that the functions `pretrain`, `distill` and `finetune` can use them.

    All items are read once, to check them and to compute the fingerprint of their content; a resumed run compares it.
    So the datasets must return the same item each time. A very large corpus is read faster if `pregenerate` packs it.

    Args:
        train, test: datasets whose items contain `input_ids`, all of one length. Padding is allowed only at the end,
            and is marked by `attention_mask` (1 on real tokens, 0 on padding) or `input_mask` (the opposite). `labels`
            say which tokens count as targets: they are `input_ids`, with -100 on padding and on all tokens that do
            not. `test` may be empty.
        tokenizer: the tokenizer that made the tokens.
        name: a name for messages and the model card.

    Raises:
        DataError: `train` is empty, or an item is not such a block (the message names it).
    """
    if not len(train):
        raise DataError(f"{name}: the training split is empty")
    first = train[0]
    if "input_ids" not in first:
        raise DataError(f"{name}: train: item 0 has no input_ids", "items are dictionaries with input_ids")
    length, vocabulary = len(first["input_ids"]), vocabulary_size(tokenizer)
    parts = [
        MapPart(items, length, vocabulary, f"{name}: {split}") for items, split in ((train, "train"), (test, "test"))
    ]
    digest = hashlib.sha256(f"{len(train)} and {len(test)} blocks of {length}".encode())
    for part in parts:
        for index in range(len(part)):
            for values in part.read(index, index + 1):
                digest.update(b"" if values is None else values.tobytes())
            digest.update(part.counted(index, index + 1).tobytes() if part.marked else b"")
    manifest = {
        "sources": [name],
        "sequence_length": length,
        "stride": length,
        "vocab_size": vocabulary,
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "content": digest.hexdigest(),
    }
    splits = [Blocks([part], length) for part in parts]
    return PackedDataset(name, splits[0], splits[1], manifest, tokenizer)


def load_packed_dataset(name: str) -> PackedDataset:
    """Open a pregenerated dataset, or a folder that contains all shards of one.

    Raises:
        DataError: there is no dataset at that path, or a part of it is missing or broken.
    """
    path, folders = Path(name), dataset_folders(name)
    try:
        manifests = [read_json(folder / MANIFEST) for folder in folders]
        manifest = manifests[0] if folders == [path] else _joined(folders, manifests)
        manifest = {**manifest, "content": _content(manifests)}
        train, test = (
            [part for folder, own in zip(folders, manifests, strict=True) for part in _open(folder, split, own)]
            for split in ("train", "test")
        )
        length = int(manifest["sequence_length"])
        return PackedDataset(str(path), Blocks(train, length), Blocks(test, length), manifest, folders[0] / "tokenizer")
    except (ConfigError, DataError):
        raise
    except Exception as error:  # broken files raise many kinds of exceptions
        raise DataError(
            f"cannot open the dataset {path}: {one_line(error)}", f"for details, run tinygpt2 verify {path}"
        ) from error


def content_of(path: Path) -> str:
    """Return the fingerprint of a pregenerated dataset's blocks, `PackedDataset.content`, from its manifests alone.

    Raises:
        DataError: a manifest is missing or broken.
    """
    try:
        return _content([read_json(folder / MANIFEST) for folder in shard_folders(path) or [path]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot open the dataset {path}: {one_line(error)}", f"for details, run tinygpt2 verify {path}"
        ) from error


def _content(manifests: list[dict[str, Any]]) -> str:
    written = json.dumps([own["splits"] for own in manifests], sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()


def _open(folder: Path, split: str, manifest: dict[str, Any]) -> list[BlockPart]:
    length, kind = int(manifest["sequence_length"]), manifest["format"]
    padded = manifest["splits"][split]["padding_tokens"] > 0
    if kind == "hdf5":
        return [Hdf5Part(folder / file["name"], length, padded) for file in manifest["splits"][split]["files"]]
    if kind == "jsonl":
        return [JsonPart(folder / f"{split}_dataset.json", length, padded)]
    stored = read_json(folder / split / "state.json")["_data_files"]
    return [part for file in stored for part in _arrow_parts(folder / split / file["filename"], length)]


def _arrow_parts(file: Path, length: int) -> list[BlockPart]:
    """Map one of the files that `datasets` writes; to import that library takes longer than to open a split."""
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    stored = table.schema.field("input_ids").type.list_size
    if stored != length:
        raise DataError(f"{file}: the blocks have {stored} tokens, but {MANIFEST} says {length}")
    chunks = table.column("input_ids").chunks
    if "marks" not in table.schema.names:
        return [ArrowPart(chunk, length) for chunk in chunks]
    pairs = zip(chunks, table.column("marks").chunks, strict=True)
    return [MarkedPart(chunk, marks, length) for chunk, marks in pairs]


def _joined(folders: list[Path], manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the part of the manifest that all shards of a dataset share.

    Raises:
        DataError: a shard is missing, is there twice, or belongs to another dataset.
    """
    own = ("shard", "splits", "encoding_errors", "empty_documents")
    first, folder = manifests[0], folders[0].parent
    for other, manifest in zip(folders[1:], manifests[1:], strict=True):
        differ = [key for key in first if key not in own and manifest.get(key) != first[key]]
        if differ or manifest["shard"][1] != first["shard"][1]:
            raise DataError(
                f"{folders[0]} and {other} do not belong to the same dataset "
                f"(they differ in: {', '.join(differ) or 'shard'})",
                "a folder of shards may contain only the shards of one dataset, made with pregenerate --shard I/N",
            )
    there, count = sorted(manifest["shard"][0] for manifest in manifests), first["shard"][1]
    if there != list(range(1, count + 1)):
        raise DataError(
            f"{folder} contains shards {', '.join(map(str, there))} of {count}", "each shard is needed exactly once"
        )
    return {**{key: value for key, value in first.items() if key not in own}, "shards": count}
