"""Read the documents of a file, compressed or not, without loading the whole file.

`unpacking` decompresses it and opens archives, `formats` finds out its format, and `tables` reads rows. To add a
format, write a reader and add it to `_ROWS`, to `InputFormat` and to `formats.ENDINGS`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from tinygpt2.data.corpus.formats import ReadOptions, format_of
from tinygpt2.data.corpus.tables import (
    arrow_rows,
    csv_rows,
    json_lines,
    json_rows,
    parquet_rows,
    parsed_lines,
    skip_mark,
    tsv_rows,
)
from tinygpt2.data.corpus.text_splitting import RULES, TextPart, decoded_chunks, document_parts, parts_of_rows
from tinygpt2.data.corpus.unpacking import DAMAGE, MOST_LAYERS, archive_kind, decompressed, head_of, members, seekable
from tinygpt2.errors import DataError, UnreadableError, one_line
from tinygpt2.utils.files import open_file

_ROWS: dict[str, Callable[[io.BufferedReader, str, ReadOptions], Iterator[str]]] = {
    "jsonl": json_lines,
    "json": json_rows,
    "csv": csv_rows,
    "tsv": tsv_rows,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
}


def read_stream(stream: IO[bytes], name: str, how: ReadOptions, archives: int = 0) -> Iterator[TextPart]:
    """Yield the documents of an open file, which may be compressed or an archive.

    Args:
        stream: the file, at its beginning. It need not be seekable.
        name: the file's name. Error messages contain it, and its ending may show the format.
        how: how to read the file.
        archives: the number of archives that the file lies in, one inside the other.

    Raises:
        DataError: the text is not UTF-8 (the message gives file and byte), a row is broken (the message gives file and
            row), the compressed data or the archive is damaged, or the file holds no text to read.
        UnreadableError: the disk or the stream failed.
    """
    with explained_damage(name):
        inner = decompressed(stream, name)
        head = head_of(inner)
        archive = archive_kind(head)
        if archive is None:
            yield from _documents(inner, name, head, how)
            return
        if archives == MOST_LAYERS:
            raise DataError(f"{name} lies in more than {MOST_LAYERS} archives, one inside the other")
        for inside, file in members(inner, archive, name, how.members):
            yield from read_stream(file, inside, how, archives + 1)


@contextmanager
def explained_damage(name: str) -> Iterator[None]:
    """Raise what libraries say about a file as one of this package's errors."""
    try:
        yield
    except (*DAMAGE, pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UnreadableError(f"cannot read {name}: {error.strerror}") from error
        raise DataError(f"{name} is damaged: {one_line(error)}") from error


def _documents(stream: io.BufferedReader, name: str, head: bytes, how: ReadOptions) -> Iterator[TextPart]:
    def forced() -> None:
        how.cut_without_space(name)

    if rows := _ROWS.get(format_of(name, head, how)):
        yield from parts_of_rows(rows(stream, name, how), forced)
        return
    if how.pairs is not None and how.pairs.needs_rows:
        raise DataError(
            f"{name} is plain text, and pairs are read from rows of {' and '.join(map(repr, how.pairs.columns))}",
            "leave the file out, for example by a pattern in quotes such as 'folder/*.jsonl'",
        )
    chunks = decoded_chunks(stream, name, lenient=how.lenient, offset=skip_mark(stream))
    rule = RULES.get(how.document) or how.document.removeprefix("separator:")
    yield from document_parts(chunks, None if how.document == "file" else re.compile(rule), forced)


def table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each row of a Parquet file or of JSON lines is, and the row with all its columns.

    Raises:
        DataError: the file is damaged, or it is an archive.
        UnreadableError: the file cannot be read.
    """
    import pyarrow.parquet as pq

    name = str(path)
    with explained_damage(name), open_file(path) as stream:
        inner = decompressed(stream, name)
        head = head_of(inner)
        if head.startswith(b"PAR1"):
            with seekable(inner) as file:
                rows = pq.ParquetFile(file).read().to_pylist()
            yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))
        elif archive_kind(head) is not None:
            raise DataError(f"{name} is an archive", "unpack it first, and give the folder")
        else:
            yield from parsed_lines(inner, name, ReadOptions())


def read_documents(path: Path, how: ReadOptions) -> list[str]:
    """Return all documents of a file, also empty ones. `how.notes` holds its format afterwards.

    Raises:
        DataError: as `read_stream`.
    """
    documents, held = [], []
    with open_file(path) as stream:
        for text, last in read_stream(stream, str(path), how):
            held.append(text)
            if last:
                documents.append("".join(held))
                held = []
    return documents
