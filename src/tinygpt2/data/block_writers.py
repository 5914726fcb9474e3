"""Write streams of tokens to disk as blocks of one length, in three formats.

`arrow` is for Hugging Face `datasets`, `hdf5` for Cerebras' GPT-2, and `jsonl` for TinyGPT2. To add a format, write a
class like the ones here and add it to `_WRITERS`. `block_readers` reads the files back.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from tinygpt2.config.data import Format
from tinygpt2.utils.files import write_json
from tinygpt2.utils.types import Array, Tokens

FILE_TOKENS = 1 << 27  # most tokens in one file of a split
_ROW_TOKENS = 1 << 20  # number of tokens to collect before they are written


@dataclass(frozen=True)
class BlockFile:
    """A file of blocks.

    Attributes:
        name: its path inside the dataset.
        sequences: its number of blocks.
        sha256: the SHA-256 of its tokens as little-endian 32-bit numbers.
    """

    name: str
    sequences: int
    sha256: str


def content_of(rows: Tokens) -> bytes:
    """Return the bytes from which a file's SHA-256 is computed. They are the same for every format."""
    return rows.astype("<u4").tobytes()


class _BlockWriter(Protocol):
    """Writes one file of blocks.

    Attributes:
        name: the file's path inside the dataset.
        pads: whether the format has a mask for padding, so that the last block may be padded.
        file_tokens: most tokens in one file.
    """

    name: str
    pads: bool
    file_tokens: int

    def __init__(self, split: Path, index: int, length: int, dtype: np.dtype[Any]) -> None: ...

    def write(self, rows: Tokens, padding: int) -> None:
        """Write blocks (rows, length). The last `padding` tokens of the last block are padding."""

    def close(self) -> None:
        """Finish the file."""

    @staticmethod
    def finish(split: Path, length: int, dtype: np.dtype[Any], files: list[BlockFile]) -> None:
        """Write the files of metadata that the format needs for a split."""


class ArrowWriter:
    """Writes an Arrow file that `datasets` opens, with marks of the tokens if there are some."""

    pads, file_tokens = False, FILE_TOKENS

    def __init__(self, split: Path, index: int, length: int, dtype: np.dtype[Any], *, marked: bool = False) -> None:
        import pyarrow as pa

        self.name, self._length = f"{split.name}/data-{index:05d}.arrow", length
        split.mkdir(exist_ok=True)
        self._schema = _features(length, dtype, marked=marked).arrow_schema
        self._file = (split.parent / self.name).open("wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)

    def write(self, rows: Tokens, padding: int, marks: Array | None = None) -> None:
        """Write blocks, and their marks if there are some."""
        import pyarrow as pa

        values = {"input_ids": rows} if marks is None else {"input_ids": rows, "marks": marks}
        columns = {
            name: pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), self._length)
            for name, column in values.items()
        }
        self._writer.write_table(pa.table(columns, schema=self._schema))

    def close(self) -> None:
        """Finish the file."""
        with self._file:
            self._writer.close()

    @staticmethod
    def finish(split: Path, length: int, dtype: np.dtype[Any], files: list[BlockFile], *, marked: bool = False) -> None:
        """Write the metadata that `datasets` needs to open the split."""
        import datasets

        content = hashlib.sha256(" ".join([split.name, str(length), *(file.sha256 for file in files)]).encode())
        write_json(
            split / "state.json",
            {
                "_data_files": [{"filename": Path(file.name).name} for file in files],
                "_fingerprint": content.hexdigest()[:16],  # from the content: the library's own is random
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": split.name,
            },
        )
        datasets.DatasetInfo(features=_features(length, dtype, marked=marked)).write_to_directory(str(split))
        write_json(split.parent / "dataset_dict.json", {"splits": ["train", "test"]})


def _features(length: int, dtype: np.dtype[Any], *, marked: bool) -> Any:
    import datasets

    kinds = {"input_ids": dtype.name, **({"marks": "uint8"} if marked else {})}
    return datasets.Features({name: datasets.List(datasets.Value(kind), length=length) for name, kind in kinds.items()})


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
        """Do nothing: the format needs no metadata."""


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
        """Write the file with the counts that TinyGPT2 reads first."""
        count = sum(file.sequences for file in files)
        write_json(split.parent / f"{split.name}_metrics.json", {"num_examples": count, "max_seq_len": length})


_WRITERS: dict[Format, type[_BlockWriter]] = {"arrow": ArrowWriter, "hdf5": _Hdf5Writer, "jsonl": _JsonLinesWriter}


class SplitWriter:
    """Cuts a stream of tokens into the blocks of one split, and writes these file by file.

    Args:
        out: the dataset's directory.
        split: `train` or `test`.
        length: number of tokens in a block.
        stride: number of tokens from the start of one block to the start of the next.
        dtype: the number type of the tokens.
        kind: the file format.

    Attributes:
        files: the finished files.
        tokens: number of tokens that were added.
        padding: number of padding tokens in the last block.
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
        """Number of blocks written so far."""
        return sum(file.sequences for file in self.files) + self._rows

    @property
    def dropped(self) -> int:
        """Number of tokens at the end that do not fill a block."""
        used = (self.sequences - 1) * self._stride + self._length - self.padding if self.sequences else 0
        return self.tokens - used

    def add(self, tokens: Tokens) -> None:
        """Add the next tokens of the stream."""
        if not len(tokens):  # even an empty view would keep its whole array in memory
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
        """Write the remaining tokens and finish the split. An empty split becomes one empty file.

        The last block is padded if the format has a mask. Otherwise tokens that do not fill a block are dropped.
        """
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

    def entry(self, documents: int, size: int) -> dict[str, Any]:
        """Return what the manifest says of the finished split, whose documents have `size` bytes of text."""
        return {
            "documents": documents,
            "bytes": size,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "dropped_tokens": self.dropped,
            "padding_tokens": self.padding,
            "files": [asdict(file) for file in self.files],
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if self._file is not None:  # after an error, the file is useless: only close it
                with suppress(Exception):
                    self._file.close()


MANIFEST = "pregenerate.json"


def totals(splits: dict[str, Any]) -> dict[str, int]:
    """Return the documents, bytes and tokens of a dataset, given the counts of its splits as in pregenerate.json."""
    return {key: sum(split[key] for split in splits.values()) for key in ("documents", "bytes", "tokens")}
