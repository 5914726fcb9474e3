"""Read stored blocks, a few rows at a time, from Arrow, HDF5, JSON lines or any map-style dataset."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinygpt2.config.data import H5PY_HINT
from tinygpt2.data.batches.packing import COUNTED, FIRST, REAL
from tinygpt2.errors import ConfigError, DataError, one_line
from tinygpt2.utils.types import Array

_AT_ONCE = 1024  # blocks whose masks are in memory at a time


class BlockPart(Protocol):
    """A sequence of stored blocks that all have the same length."""

    padded: bool  # whether any block may be padded
    marked: bool  # whether any block says which of its tokens count as targets
    divided: bool  # whether blocks say where documents begin

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> tuple[Array, Array | None]:
        """Return the tokens (rows, T) as stored, and their mask, if there is one: 1 on padding, 0 elsewhere."""

    def lengths(self) -> Array:
        """Return the number of real tokens in every block, as int32; `read` checks the blocks themselves."""

    def counted(self, start: int, stop: int) -> Array:
        """Return which tokens count as targets (rows, T), if blocks are marked."""

    def first(self, start: int, stop: int) -> Array:
        """Return with which tokens documents begin (rows, T), if blocks are divided."""


class _Unmarked:
    """All real tokens count as targets, and nothing says where documents begin."""

    padded = marked = divided = False

    def counted(self, start: int, stop: int) -> Array:
        """See `BlockPart`."""
        raise NotImplementedError

    def first(self, start: int, stop: int) -> Array:
        """See `BlockPart`."""
        raise NotImplementedError


class ArrowPart(_Unmarked):
    """A memory-mapped Arrow record batch."""

    def __init__(self, chunk: Any, length: int) -> None:
        self._rows = chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, length)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> tuple[Array, Array | None]:
        """See `BlockPart`."""
        return self._rows[start:stop], None

    def lengths(self) -> Array:
        """See `BlockPart`."""
        return np.full(len(self._rows), self._rows.shape[1], np.int32)


class MarkedPart(ArrowPart):
    """A memory-mapped Arrow record batch with marks: see `packing`."""

    padded = marked = divided = True

    def __init__(self, chunk: Any, marks: Any, length: int) -> None:
        super().__init__(chunk, length)
        self._marks = marks.flatten().to_numpy(zero_copy_only=True).reshape(-1, length)

    def read(self, start: int, stop: int) -> tuple[Array, Array | None]:
        """See `BlockPart`."""
        return self._rows[start:stop], 1 - (self._marks[start:stop] & REAL)

    def marks(self, start: int, stop: int) -> Array:
        """Return the marks as stored (rows, T)."""
        found: Array = self._marks[start:stop]
        return found

    def lengths(self) -> Array:
        """See `BlockPart`."""
        parts = [self._marks[start : start + _AT_ONCE] & REAL for start in range(0, len(self), _AT_ONCE)]
        return np.concatenate([part.sum(1, dtype=np.int32) for part in parts])

    def counted(self, start: int, stop: int) -> Array:
        """See `BlockPart`."""
        found: Array = self.marks(start, stop) & COUNTED != 0
        return found

    def first(self, start: int, stop: int) -> Array:
        """See `BlockPart`."""
        found: Array = self.marks(start, stop) & FIRST != 0
        return found


class Hdf5Part(_Unmarked):
    """An HDF5 file that contains `input_ids` and `input_mask`."""

    def __init__(self, file: Path, length: int, padded: bool) -> None:
        try:
            import h5py
        except ImportError:
            raise ConfigError(f"{file} is an HDF5 file, but h5py is not installed", H5PY_HINT) from None
        self.padded = padded

        try:
            columns = h5py.File(file, "r")
        except OSError as error:
            raise DataError(f"cannot open {file}: {one_line(error)}") from error
        self._ids, self._mask = columns["input_ids"], columns["input_mask"]
        for column in (self._ids, self._mask):
            if column.ndim != 2 or column.shape != (len(self._ids), length):
                raise DataError(f"{file}: {column.name[1:]} has shape {column.shape}, not (blocks, {length})")

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, start: int, stop: int) -> tuple[Array, Array | None]:
        """See `BlockPart`."""
        return self._ids[start:stop], self._mask[start:stop]

    def lengths(self) -> Array:
        """See `BlockPart`."""
        parts = [self._mask[start : start + _AT_ONCE] for start in range(0, len(self), _AT_ONCE)]
        return np.concatenate([(part == 0).sum(1, dtype=np.int32) for part in parts])


class JsonPart(_Unmarked):
    """A file of JSON lines. Opening it builds an index of the line ends."""

    def __init__(self, file: Path, length: int, padded: bool) -> None:
        self._file, self._length, self.padded = file, length, padded
        with file.open("rb") as stream:
            self._text = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if file.stat().st_size else b""
        raw = np.frombuffer(self._text, np.uint8)
        steps = range(0, len(raw), 1 << 26)
        ends = [np.flatnonzero(raw[step : step + (1 << 26)] == ord("\n")) + step for step in steps]
        self._ends = np.concatenate([np.array([-1]), *ends])
        if len(raw) and raw[-1] != ord("\n"):
            raise DataError(f"{file} ends in the middle of line {len(self._ends)}")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, start: int, stop: int) -> tuple[Array, Array | None]:
        """See `BlockPart`."""
        rows = [self._row(index) for index in range(start, stop)]
        shape = (len(rows), self._length)
        ids = np.array([ids for ids, _ in rows], np.int64).reshape(shape)
        return ids, np.array([mask for _, mask in rows], np.int64).reshape(shape)

    def lengths(self) -> Array:
        """See `BlockPart`. In a line as `pregenerate` writes it, the ones at the end are counted without parsing it."""
        found = np.zeros(len(self), np.int32)
        for index in range(len(self)):
            _, _, mask = self._line(index).rpartition(b'"attention_mask":')
            ones = mask.count(b"1")
            simple = ones + mask.count(b"0") == self._length
            found[index] = ones if simple else self._row(index)[1].count(0)
        return found

    def _line(self, index: int) -> bytes:
        return bytes(self._text[self._ends[index] + 1 : self._ends[index + 1]])

    def _row(self, index: int) -> tuple[list[int], list[int]]:
        where = f"{self._file}:{index + 1}"
        try:
            row = json.loads(self._line(index))
            ids, mask = row["input_ids"], [1 - real for real in row["attention_mask"]]
            if not len(ids) == len(mask) == self._length or not all(type(token) is int for token in ids):
                raise DataError(f"{where}: expected {self._length} tokens and as many entries in attention_mask")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{where}: not a block with input_ids and attention_mask: {error}") from error
        return ids, mask


class MapPart(_Unmarked):
    """A map-style dataset. Its items hold `input_ids`, and if there is padding, `attention_mask` or `input_mask`.

    `labels` may say which tokens count as targets. Whether any do is known when all items have been read.

    Args:
        items: the dataset.
        length: number of tokens in every item.
        vocabulary: all real tokens are below it.
        split: a name for error messages.
    """

    padded = True

    def __init__(self, items: Any, length: int, vocabulary: int, split: str) -> None:
        self._items, self._length, self._vocabulary, self._split = items, length, vocabulary, split
        self.marked = False
        self._lengths = np.zeros(len(items), np.int32)

    def __len__(self) -> int:
        return len(self._items)

    def read(self, start: int, stop: int) -> tuple[Array, Array | None]:
        """See `BlockPart`.

        Raises:
            DataError: an item is not a block (the message names it).
        """
        rows = [self._row(index) for index in range(start, stop)]
        shape = (len(rows), self._length)
        ids = np.array([ids for ids, _, _ in rows], np.int64).reshape(shape)
        return ids, np.array([mask for _, mask, _ in rows], np.int64).reshape(shape)

    def counted(self, start: int, stop: int) -> Array:
        """See `BlockPart`."""
        return np.stack([self._row(index)[2] for index in range(start, stop)])

    def lengths(self) -> Array:
        """See `BlockPart`. Items that were read before are not read again."""
        for index in np.flatnonzero(self._lengths == 0):
            self._row(int(index))
        return self._lengths

    def _row(self, index: int) -> tuple[Array, Array, Array]:
        """Return an item's tokens, its padding, and which of its tokens count as targets."""
        row, where = self._items[index], f"{self._split}: item {index}"
        if "input_ids" not in row:
            raise DataError(f"{where} has no input_ids", "items are dictionaries with input_ids")
        ids = self._numbers(row, "input_ids", where)
        mask = self._padding(row, where)
        self._lengths[index] = real_tokens(mask[None], index, where)[0]
        real = ids[: self._lengths[index]]
        if real.min() < 0 or real.max() >= self._vocabulary:
            wrong = real[(real < 0) | (real >= self._vocabulary)][0]
            raise DataError(
                f"{where}: the token {wrong} is outside the tokenizer's vocabulary of {self._vocabulary}",
                "give the tokenizer that made the tokens",
            )
        counted = mask == 0
        if "labels" in row:
            labels = self._numbers(row, "labels", where)
            counted = labels != -100
            if (counted & ((mask != 0) | (labels != ids))).any():
                raise DataError(
                    f"{where}: its labels are neither its input_ids nor -100",
                    "labels repeat input_ids, with -100 on padding and on every token that does not count",
                )
            self.marked |= not np.array_equal(counted, mask == 0)
        return ids, mask, counted

    def _padding(self, row: Any, where: str) -> Array:
        """Return the mask of an item: 1 on padding, 0 elsewhere. `attention_mask` has the opposite sense."""
        masks = [self._numbers(row, "input_mask", where)] if "input_mask" in row else []
        masks += [1 - self._numbers(row, "attention_mask", where)] if "attention_mask" in row else []
        if len(masks) == 2 and not np.array_equal(masks[0], masks[1]):
            raise DataError(
                f"{where}: attention_mask and input_mask contradict each other",
                "attention_mask is 1 on real tokens and 0 on padding, input_mask the opposite; one of them is enough",
            )
        return masks[0] if masks else np.zeros(self._length, np.int64)

    def _numbers(self, row: Any, key: str, where: str) -> Array:
        """Return one field of an item as whole numbers, one for each token."""
        try:
            values = np.asarray(row[key])
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: {key} is not a list of numbers: {one_line(error, 200)}") from error
        if values.shape != (self._length,):
            raise DataError(f"{where}: {key} has shape {values.shape}, not {self._length} tokens as in the first item")
        if values.dtype.kind not in "iub":
            raise DataError(f"{where}: {key} are not whole numbers")
        return values.astype(np.int64)


def real_tokens(mask: Array, first: int, where: str | None = None) -> list[int]:
    """Return the number of real tokens in each row.

    Args:
        mask: rows (rows, T) with 1 on padding and 0 elsewhere.
        first: the number of the first row, for error messages.
        where: what error messages call the first row instead.

    Raises:
        DataError: a row contains only padding, or has padding before its end.
    """
    lengths = (mask == 0).sum(-1)
    if not lengths.all():
        raise DataError(f"{where or f'sequence {first + int((lengths == 0).argmax())}'} contains only padding")
    wrong = (mask != (np.arange(mask.shape[1]) >= lengths[:, None])).any(-1)
    if wrong.any():
        raise DataError(
            f"{where or f'sequence {first + int(wrong.argmax())}'} has padding before its end",
            "padding is allowed only at the end of a block",
        )
    return [int(length) for length in lengths]
