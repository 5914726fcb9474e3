"""Read the documents of a file, compressed or not, without loading the whole file.

The first bytes of a file show how it is packed (gz, bz2, xz, zst, tar); the ending of its name shows its format. To add
a format, write a reader and add it to `_READERS`.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import IO, Any

import pyarrow as pa

from tinygpt2.data.corpus.text_splitting import RULES, TextPart, decoded_chunks, document_parts, split_documents
from tinygpt2.errors import DataError, UnreadableError, one_line
from tinygpt2.utils.files import not_utf8

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".tar", ".tgz")


@dataclass(frozen=True)
class ReadOptions:
    """How files are divided into documents.

    Attributes:
        document: what is one document in a text file: `file`, `line`, `blank-line` or `separator:REGEX`.
        text_column: the field or column that contains the text of a row.
        lenient: return bytes that are not UTF-8 as lone surrogates, which the caller handles, instead of an error.
    """

    document: str = "file"
    text_column: str = "text"
    lenient: bool = False


def read_stream(stream: IO[bytes], name: str, how: ReadOptions) -> Iterator[TextPart]:
    """Yield the documents of an open file, which may be compressed or an archive.

    Args:
        stream: the file, at its beginning. It need not be seekable.
        name: the file's name. Its ending shows the format, and error messages contain it.
        how: how to divide the file into documents.

    Raises:
        DataError: the text is not UTF-8 (the message gives file and byte), a row is broken (the message gives file and
            row), or the compressed data or the archive is damaged.
        UnreadableError: the disk or the stream failed.
    """
    try:
        with _opened(stream) as (inner, is_tar):
            if is_tar:
                yield from _tar(inner, name, how)
                return
            plain = PurePath(name)
            while plain.suffix.lower() in COMPRESSED:
                plain = plain.with_suffix("")
            reader = _READERS.get(plain.suffix.lower(), _text)
            yield from reader(inner, name, how)
    except (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UnreadableError(f"cannot read {name}: {error.strerror}") from error
        raise DataError(f"{name} is damaged: {one_line(error)}") from error


@contextmanager
def _opened(stream: IO[bytes]) -> Iterator[tuple[io.BufferedReader, bool]]:
    """Decompress a stream, repeatedly if needed; yield the result and whether it is a tar archive."""
    inner = stream if isinstance(stream, io.BufferedReader) else _buffered(stream)
    while (unpack := _unpacker(inner.peek(10)[:10])) is not None:
        inner = _buffered(unpack(inner))
    yield inner, inner.peek(262)[257:262] == b"ustar"


def _buffered(stream: Any) -> io.BufferedReader:
    return io.BufferedReader(stream, 1 << 17)


def _unpacker(head: bytes) -> Callable[[IO[bytes]], Any] | None:
    if head.startswith(b"\x1f\x8b"):
        return lambda stream: gzip.GzipFile(fileobj=stream)
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return bz2.BZ2File
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return lambda stream: pa.CompressedInputStream(stream, "zstd")
    return None


def _tar(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[TextPart]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # otherwise the library keeps every member in memory
            if member.isfile() and not hidden(member.name) and (file := archive.extractfile(member)) is not None:
                yield from read_stream(file, f"{name}/{member.name}", how)


def hidden(name: PurePath | str) -> bool:
    """Return whether a file or one of its folders is hidden."""
    return any(part.startswith(".") and part != "." for part in PurePath(name).parts)


def _text(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[TextPart]:
    chunks = decoded_chunks(stream, name, lenient=how.lenient)
    if how.document == "file":
        yield from document_parts(chunks)
    else:
        pattern = RULES.get(how.document) or how.document.removeprefix("separator:")
        for text in split_documents(chunks, re.compile(pattern)):
            yield text, True


def _lines(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[str]:
    """Yield the lines with their line ends, without a byte-order mark. Only one line is in memory at a time."""
    offset = _skip_mark(stream)
    for raw in stream:
        try:
            yield raw.decode("utf-8", "surrogateescape" if how.lenient else "strict")
        except UnicodeDecodeError as error:
            raise not_utf8(name, error, offset) from error
        offset += len(raw)


def _skip_mark(stream: io.BufferedReader) -> int:
    """Skip a byte-order mark, if there is one; return its length in bytes."""
    return len(stream.read(3)) if stream.peek(3).startswith(codecs.BOM_UTF8) else 0


def _json_lines(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[TextPart]:
    for number, line in enumerate(_lines(stream, name, how), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{name}:{number}: not valid JSON: {error}") from error
        except RecursionError as error:
            raise DataError(f"{name}:{number}: JSON nested too deeply") from error
        yield _field(row, f"{name}:{number}", how), True


def _json(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[TextPart]:
    """Read JSON lines, or one array of objects or texts."""
    _skip_mark(stream)
    if not stream.peek(1 << 12).lstrip().startswith(b"["):
        yield from _json_lines(stream, name, how)
        return
    import ijson

    # Lone surrogates become escapes here. ijson's slow Python backend decodes these; its fast backends refuse them.
    backend = ijson.get_backend("python") if how.lenient else ijson
    text = (chunk.encode("utf-8", "backslashreplace") for chunk in decoded_chunks(stream, name, lenient=how.lenient))
    number = 0
    try:
        for number, row in enumerate(backend.items(_Chunks(text), "item", use_float=True), start=1):
            yield _field(row, f"{name}: item {number}", how, bare=True), True
    except (ijson.JSONError, UnicodeDecodeError) as error:
        problem = one_line(error, 120)
        raise DataError(f"{name}: not valid JSON after item {number}: {problem}") from error


class _Chunks:
    """A byte stream that reads from an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._held = chunks, b""

    def read(self, size: int = -1) -> bytes:
        while not self._held and (chunk := next(self._chunks, None)) is not None:
            self._held = chunk
        size = len(self._held) if size < 0 else size
        answer, self._held = self._held[:size], self._held[size:]
        return answer


def _csv(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[TextPart]:
    csv.field_size_limit(2**31 - 1)  # a field may contain a whole document
    rows = csv.reader(_lines(stream, name, how), strict=True)
    try:
        header = next(filter(None, rows), [])
        if header and how.text_column not in header:
            raise _no_text(f"{name}:1", how, ", ".join(header))
        for row in rows:
            if len(row) == len(header):
                yield row[header.index(how.text_column)], True
            elif row:
                raise DataError(f"{name}:{rows.line_num}: {len(row)} fields, but the header has {len(header)}")
    except csv.Error as error:
        raise DataError(f"{name}:{rows.line_num}: not valid CSV: {error}") from error


def _field(row: Any, where: str, how: ReadOptions, *, bare: bool = False) -> str:
    text = row if bare and isinstance(row, str) else row.get(how.text_column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise _no_text(where, how, ", ".join(row) if isinstance(row, dict) else type(row).__name__)
    if not how.lenient:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: half of a surrogate pair, which is not valid text",
                "use --encoding-errors replace or --encoding-errors skip",
            ) from error
    return text


def _no_text(where: str, how: ReadOptions, found: str) -> DataError:
    return DataError(
        f"{where}: no text in field {how.text_column!r} (found: {found})", "give the field's name with --text-column"
    )


def _parquet(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[TextPart]:
    import pyarrow.parquet as pq

    with _seekable(stream) as file, pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16) as table:
        check_column(table.schema_arrow, name, how)
        yield from rows_of(table.iter_batches(256, columns=[how.text_column]), name, how)


def _arrow(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[TextPart]:
    """Read Arrow's file format, or its stream format, which `datasets` writes."""
    with _seekable(stream) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        with pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file) as reader:
            check_column(reader.schema, name, how)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            yield from rows_of(batches, name, how)


def check_column(schema: Any, name: str, how: ReadOptions) -> None:
    """Check that a table has the text column, and that the column contains text.

    Raises:
        DataError: the column is missing or has another type.
    """
    kind = schema.field(how.text_column).type if how.text_column in schema.names else None
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise _no_text(name, how, ", ".join(f"{field.name}: {field.type}" for field in schema))


def rows_of(batches: Iterator[Any], name: str, how: ReadOptions) -> Iterator[TextPart]:
    """Yield the texts of a table's record batches. A row without a text is an empty document."""
    number = 0
    for batch in batches:
        for value in batch.column(how.text_column):
            number += 1
            try:
                yield value.as_py() or "", True
            except UnicodeDecodeError as error:
                if not how.lenient:
                    raise not_utf8(f"{name}: row {number}", error) from error
                yield value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape"), True


@contextmanager
def _seekable(stream: io.BufferedReader) -> Iterator[IO[bytes]]:
    """Yield the stream itself if it is a seekable file, otherwise a copy of it on disk."""
    if isinstance(stream.raw, io.FileIO) and stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy)
        copy.seek(0)
        yield copy


_READERS: dict[str, Callable[[io.BufferedReader, str, ReadOptions], Iterator[TextPart]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
