"""Streams of tokens to blocks of one length on disk, in three formats.

`arrow` is what plain `datasets` opens, `hdf5` what Cerebras' GPT-2 reads, `jsonl` what TinyGPT2 reads. To add
a format, write a class like theirs and name it in `_FORMATS`; `parts` reads what is written here.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from tinygpt2.config.data import Format
from tinygpt2.utils.files import write_json
from tinygpt2.utils.types import Tokens

FILE_TOKENS = 1 << 27  # in one file of a split, at most
_ROW_TOKENS = 1 << 20  # gathered before they are written


@dataclass(frozen=True)
class BlockFile:
    """A file of blocks: its name in the data set, and the SHA-256 of its tokens as little-endian 32-bit numbers."""

    name: str
    sequences: int
    sha256: str


def content_of(rows: Tokens) -> bytes:
    """Return the bytes that a file's SHA-256 is taken over: the same for every format."""
    return rows.astype("<u4").tobytes()


class _BlockWriter(Protocol):
    """Writes one file of blocks.

    Attributes:
        name: the file's, in the data set.
        pads: whether a mask tells padding from tokens, so that the last block may be padded.
        file_tokens: in one file, at most.
    """

    name: str
    pads: bool
    file_tokens: int

    def __init__(self, split: Path, index: int, length: int, dtype: np.dtype[Any]) -> None: ...

    def write(self, rows: Tokens, padding: int) -> None:
        """Write blocks (rows, length); the last `padding` tokens of the last one are none."""

    def close(self) -> None:
        """Finish the file."""

    @staticmethod
    def finish(split: Path, length: int, dtype: np.dtype[Any], files: list[BlockFile]) -> None:
        """Write what belongs beside a split's files."""


class _ArrowWriter:
    pads, file_tokens = False, FILE_TOKENS

    def __init__(self, split: Path, index: int, length: int, dtype: np.dtype[Any]) -> None:
        import pyarrow as pa

        self.name, self._length = f"{split.name}/data-{index:05d}.arrow", length
        split.mkdir(exist_ok=True)
        self._schema = _features(length, dtype).arrow_schema
        self._file = (split.parent / self.name).open("wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)

    def write(self, rows: Tokens, padding: int) -> None:
        import pyarrow as pa

        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), self._length)
        self._writer.write_table(pa.table({"input_ids": column}, schema=self._schema))

    def close(self) -> None:
        with self._file:
            self._writer.close()

    @staticmethod
    def finish(split: Path, length: int, dtype: np.dtype[Any], files: list[BlockFile]) -> None:
        """Write what plain `datasets` looks for beside the blocks."""
        import datasets

        content = hashlib.sha256(" ".join([split.name, str(length), *(file.sha256 for file in files)]).encode())
        write_json(
            split / "state.json",
            {
                "_data_files": [{"filename": Path(file.name).name} for file in files],
                "_fingerprint": content.hexdigest()[:16],  # from content: the library's own is random
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": split.name,
            },
        )
        datasets.DatasetInfo(features=_features(length, dtype)).write_to_directory(str(split))
        write_json(split.parent / "dataset_dict.json", {"splits": ["train", "test"]})


def _features(length: int, dtype: np.dtype[Any]) -> Any:
    import datasets

    return datasets.Features({"input_ids": datasets.List(datasets.Value(dtype.name), length=length)})


class _Hdf5Writer:
    pads, file_tokens = True, FILE_TOKENS

    def __init__(self, split: Path, index: int, length: int, dtype: np.dtype[Any]) -> None:
        import h5py

        self.name = f"{split.name}/data-{index:05d}.h5"
        split.mkdir(exist_ok=True)
        self._file = h5py.File(split.parent / self.name, "w")
        shape = {"shape": (0, length), "maxshape": (None, length), "chunks": (8, length), "dtype": "int32"}
        self._columns = [self._file.create_dataset(name, **shape) for name in ("input_ids", "input_mask")]

    def write(self, rows: Tokens, padding: int) -> None:
        mask = np.zeros(rows.shape, np.int32)
        mask[-1, rows.shape[1] - padding :] = 1
        for column, values in zip(self._columns, (rows, mask), strict=True):
            start = len(column)
            column.resize(start + len(values), axis=0)
            column[start:] = values

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def finish(split: Path, length: int, dtype: np.dtype[Any], files: list[BlockFile]) -> None:
        """Nothing more is needed."""


class _JsonLinesWriter:
    pads, file_tokens = False, sys.maxsize

    def __init__(self, split: Path, index: int, length: int, dtype: np.dtype[Any]) -> None:
        self.name = f"{split.name}_dataset.json"
        self._file = (split.parent / self.name).open("w", encoding="ascii")
        self._mask = json.dumps([1] * length)

    def write(self, rows: Tokens, padding: int) -> None:
        for row in rows.tolist():
            self._file.write(f'{{"input_ids": {row}, "attention_mask": {self._mask}}}\n')

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def finish(split: Path, length: int, dtype: np.dtype[Any], files: list[BlockFile]) -> None:
        """Write the counts that TinyGPT2 reads first."""
        count = sum(file.sequences for file in files)
        write_json(split.parent / f"{split.name}_metrics.json", {"num_examples": count, "max_seq_len": length})


_WRITERS: dict[Format, type[_BlockWriter]] = {"arrow": _ArrowWriter, "hdf5": _Hdf5Writer, "jsonl": _JsonLinesWriter}


class SplitWriter:
    """Cuts a stream of tokens into the blocks of one split and writes them, file by file.

    Args:
        out: the data set's directory.
        split: `train` or `test`.
        length, stride: tokens of a block, and from one block's start to the next.
    """

    def __init__(self, out: Path, split: str, length: int, stride: int, dtype: np.dtype[Any], kind: Format) -> None:
        self._split, self._length, self._stride, self._dtype = out / split, length, stride, dtype
        self._format = _WRITERS[kind]
        self._pending: list[Tokens] = []
        self._held = 0
        self._file: _BlockWriter | None = None
        self._sha = hashlib.sha256()
        self._rows = 0
        self.files: list[BlockFile] = []
        self.tokens = self.padding = 0

    @property
    def sequences(self) -> int:
        """Blocks written so far."""
        return sum(file.sequences for file in self.files) + self._rows

    @property
    def dropped(self) -> int:
        """Tokens at the end that fill no block."""
        used = (self.sequences - 1) * self._stride + self._length - self.padding if self.sequences else 0
        return self.tokens - used

    def add(self, tokens: Tokens) -> None:
        """Take in the next tokens of the stream."""
        if not len(tokens):  # a view of nothing would keep what it is a view of
            return
        self.tokens += len(tokens)
        self._pending.append(tokens)
        self._held += len(tokens)
        if self._held >= max(_ROW_TOKENS, self._length):
            self._write_whole_blocks()

    def _write_whole_blocks(self) -> None:
        stream = np.concatenate([*self._pending, np.empty(0, self._dtype)])
        count = (len(stream) - self._length) // self._stride + 1 if len(stream) >= self._length else 0
        if count:
            windows = np.lib.stride_tricks.sliding_window_view(stream, self._length)[:: self._stride][:count]
            per_file = max(1, self._format.file_tokens // self._length)
            while len(windows):
                room = min(per_file - self._rows, max(1, _ROW_TOKENS // self._length))
                self._write(np.ascontiguousarray(windows[:room]))
                windows = windows[room:]
                if self._rows == per_file:
                    self._close_file()
        self._pending = [stream[count * self._stride :]]
        self._held = len(self._pending[0])

    def _write(self, rows: Tokens, padding: int = 0) -> None:
        if self._file is None:
            self._file = self._format(self._split, len(self.files), self._length, self._dtype)
        if len(rows):
            self._file.write(rows, padding)
        self._sha.update(content_of(rows))
        self._rows += len(rows)

    def _close_file(self) -> None:
        assert self._file is not None
        self._file.close()
        self.files.append(BlockFile(self._file.name, self._rows, self._sha.hexdigest()))
        self._file, self._rows, self._sha = None, 0, hashlib.sha256()

    def close(self) -> None:
        """Write the rest, padded where the format has a mask for it; an empty split is one empty file."""
        self._write_whole_blocks()
        (rest,) = self._pending
        overlap = self._length - self._stride if self.sequences else 0
        if self._format.pads and len(rest) > overlap:
            self.padding = self._length - len(rest)
            self._write(np.pad(rest, (0, self.padding))[None], self.padding)
        if self._file is None and not self.files:
            self._write(np.empty((0, self._length), self._dtype))
        if self._file is not None:
            self._close_file()
        self._format.finish(self._split, self._length, self._dtype, self.files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if self._file is not None:  # something failed: what is there is of no use
                with suppress(Exception):
                    self._file.close()


MANIFEST = "pregenerate.json"
