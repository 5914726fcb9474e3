"""Blocks where they lie: Arrow, HDF5, JSON lines, or any map-style dataset, read a few rows at a time."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinygpt2.errors import DataError, one_line
from tinygpt2.utils.types import Array


class BlockPart(Protocol):
    """Some blocks of one length."""

    padded: bool  # whether any may be

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> tuple[Array, Array | None]:
        """Return tokens (rows, T) as stored, and a mask with 1 on padding and 0 elsewhere, if there is one."""


class ArrowPart:
    """A record batch, memory-mapped."""

    padded = False

    def __init__(self, chunk: Any, length: int) -> None:
        self._rows = chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, length)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> tuple[Array, Array | None]:
        """See `Part`."""
        return self._rows[start:stop], None


class Hdf5Part:
    """A file with `input_ids` and `input_mask`."""

    def __init__(self, file: Path, length: int, padded: bool) -> None:
        import h5py

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
        """See `Part`."""
        return self._ids[start:stop], self._mask[start:stop]


class JsonPart:
    """JSON lines, found through an index of line ends that opening the file makes."""

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
        """See `Part`."""
        rows = [self._row(index) for index in range(start, stop)]
        shape = (len(rows), self._length)
        ids = np.array([ids for ids, _ in rows], np.int64).reshape(shape)
        return ids, np.array([mask for _, mask in rows], np.int64).reshape(shape)

    def _row(self, index: int) -> tuple[list[int], list[int]]:
        where = f"{self._file}:{index + 1}"
        try:
            row = json.loads(self._text[self._ends[index] + 1 : self._ends[index + 1]])
            ids, mask = row["input_ids"], [1 - real for real in row["attention_mask"]]
            if not len(ids) == len(mask) == self._length or not all(type(token) is int for token in ids):
                raise DataError(f"{where}: not {self._length} tokens and as many entries of the mask")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{where}: not a block with input_ids and attention_mask: {error}") from error
        return ids, mask


class MapPart:
    """A map-style dataset whose items hold `input_ids` and perhaps `input_mask` (1 on padding)."""

    padded = True

    def __init__(self, items: Any, length: int) -> None:
        self._items, self._length = items, length

    def __len__(self) -> int:
        return len(self._items)

    def read(self, start: int, stop: int) -> tuple[Array, Array | None]:
        """See `Part`."""
        rows = [self._items[index] for index in range(start, stop)]
        ids = np.array([np.asarray(row["input_ids"]) for row in rows], np.int64)
        if ids.shape != (len(rows), self._length):
            raise DataError(f"item {start}: shape {ids.shape[1:]}, not {self._length} tokens as in the first one")
        masks = [np.asarray(row["input_mask"]) if "input_mask" in row else np.zeros(self._length) for row in rows]
        return ids, np.array(masks, np.int64)


def real_tokens(mask: Array, first: int) -> list[int]:
    """Return how many tokens of each row are real; `first` is the number of the first row, for the message."""
    lengths = (mask == 0).sum(-1)
    if not lengths.all():
        raise DataError(f"sequence {first + int((lengths == 0).argmax())} holds nothing but padding")
    wrong = (mask != (np.arange(mask.shape[1]) >= lengths[:, None])).any(-1)
    if wrong.any():
        raise DataError(
            f"sequence {first + int(wrong.argmax())} is padded before its end", "only the end of a block may be padded"
        )
    return [int(length) for length in lengths]
