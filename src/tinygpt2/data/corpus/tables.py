"""Read the texts of rows: JSON lines, JSON, CSV, TSV, Parquet and Arrow, without loading the whole file."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute

from tinygpt2.data.corpus.formats import ReadOptions
from tinygpt2.data.corpus.pairs import MESSAGES
from tinygpt2.data.corpus.text_splitting import decoded_chunks
from tinygpt2.data.corpus.unpacking import seekable
from tinygpt2.errors import DataError, one_line
from tinygpt2.utils.files import not_utf8, require_valid

LONGEST_LINE = 1 << 28  # bytes of a line, which has to fit into memory


def skip_mark(stream: io.BufferedReader) -> int:
    """Skip a byte-order mark, if there is one; return its length in bytes."""
    return len(stream.read(3)) if stream.peek(3).startswith(codecs.BOM_UTF8) else 0


def _lines(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[str]:
    """Yield the lines with their line ends, without a byte-order mark. Only one line is in memory at a time."""
    offset = skip_mark(stream)
    while raw := stream.readline(LONGEST_LINE):
        if len(raw) == LONGEST_LINE:
            raise DataError(
                f"{name}: the line at byte {offset} is longer than {LONGEST_LINE >> 20} MiB",
                "one row has to fit into memory: divide it, or give its text as a text file",
            )
        try:
            yield raw.decode("utf-8", "surrogateescape" if how.lenient else "strict")
        except UnicodeDecodeError as error:
            raise not_utf8(name, error, offset) from error
        offset += len(raw)


def json_lines(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[str]:
    """Yield the texts of JSON lines."""
    for where, row in parsed_lines(stream, name, how):
        yield text_of(row, where, how)


def parsed_lines(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[tuple[str, Any]]:
    """Yield where each of some JSON lines is, and its value. Blank lines are left out.

    Raises:
        DataError: a line is not UTF-8 or not JSON.
    """
    for number, line in enumerate(_lines(stream, name, how), start=1):
        if not line.strip():
            continue
        try:
            yield f"{name}:{number}", json.loads(line)
        except ValueError as error:
            raise DataError(f"{name}:{number}: not valid JSON: {error}") from error
        except RecursionError as error:
            raise DataError(f"{name}:{number}: JSON nested too deeply") from error


def json_rows(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[str]:
    """Yield the texts of JSON lines, or of one array of objects or texts."""
    skip_mark(stream)
    first = stream.peek(1 << 12).lstrip()
    if first.partition(b"\n")[0].strip() == b"{":
        raise DataError(
            f"{name} is one JSON object over several lines", "an array of objects, or one object in each line, is read"
        )
    if not first.startswith(b"["):
        yield from json_lines(stream, name, how)
        return
    import ijson

    # Lone surrogates become escapes here. ijson's slow Python backend decodes these; its fast backends refuse them.
    backend = ijson.get_backend("python") if how.lenient else ijson
    text = (chunk.encode("utf-8", "backslashreplace") for chunk in decoded_chunks(stream, name, lenient=how.lenient))
    number = 0
    try:
        for number, row in enumerate(backend.items(_Chunks(text), "item", use_float=True), start=1):
            plain = isinstance(row, str) and how.pairs is None
            yield row if plain else text_of(row, f"{name}: item {number}", how)
    except (ijson.JSONError, ValueError, RecursionError) as error:
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


def csv_rows(stream: io.BufferedReader, name: str, how: ReadOptions, delimiter: str = ",") -> Iterator[str]:
    """Yield the texts of a table of comma-separated values, whose first row names the columns."""
    csv.field_size_limit(2**31 - 1)  # a field may contain a whole document
    rows = csv.reader(_lines(stream, name, how), strict=True, delimiter=delimiter)
    try:
        header = next(filter(None, rows), [])
        if header and how.pairs is None and how.text_column not in header:
            raise _no_text(f"{name}:1", how, ", ".join(header))
        for row in rows:
            if len(row) == len(header) and how.pairs is not None:
                yield text_of(dict(zip(header, row, strict=True)), f"{name}:{rows.line_num}", how)
            elif len(row) == len(header):
                yield row[header.index(how.text_column)]
            elif row:
                raise DataError(f"{name}:{rows.line_num}: {len(row)} fields, but the header has {len(header)}")
    except csv.Error as error:
        kind = "CSV" if delimiter == "," else "TSV"
        raise DataError(f"{name}:{rows.line_num}: not valid {kind}: {error}") from error


def tsv_rows(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[str]:
    """Yield the texts of a table of tab-separated values."""
    return csv_rows(stream, name, how, "\t")


def text_of(row: Any, where: str, how: ReadOptions) -> str:
    """Return the text of a row, or its turns. A row whose text is null is an empty document.

    Raises:
        DataError: the row has no such field, the field is no text, or the text is not valid.
    """
    if how.pairs is not None:
        return how.pairs.text(row, where, lenient=how.lenient)
    text = row.get(how.text_column) if isinstance(row, dict) else row
    if text is None and (row is None or how.text_column in row):
        return ""
    if not isinstance(row, dict):
        raise _no_text(where, how, type(row).__name__)
    if how.text_column not in row and MESSAGES in row:
        raise DataError(
            f"{where}: a chat (field {MESSAGES!r}) where texts are read",
            "pregenerate and finetune read chats from files whose first row is one, not from standard input",
        )
    if how.text_column not in row:
        raise _no_text(where, how, ", ".join(row))
    if not isinstance(text, str):
        raise DataError(f"{where}: field {how.text_column!r} holds no text but {type(text).__name__}")
    if not how.lenient:
        require_valid(text, where)
    return text


def _no_text(where: str, how: ReadOptions, found: str) -> DataError:
    return DataError(
        f"{where}: no text in field {how.text_column!r} (found: {found})",
        "give the field's name with --text-column, or a dataset that pregenerate made with it",
    )


def parquet_rows(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[str]:
    """Yield the texts of a Parquet file."""
    import pyarrow.parquet as pq

    with seekable(stream) as file, pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16) as table:
        check_column(table.schema_arrow, name, how)
        columns = None if how.pairs is not None else [how.text_column]
        yield from rows_of(table.iter_batches(256, columns=columns), name, how)


def arrow_rows(stream: io.BufferedReader, name: str, how: ReadOptions) -> Iterator[str]:
    """Yield the texts of Arrow's file format, or of its stream format, which `datasets` writes."""
    with seekable(stream) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        with pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file) as reader:
            check_column(reader.schema, name, how)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            yield from rows_of(batches, name, how)


def check_column(schema: Any, name: str, how: ReadOptions) -> None:
    """Check that a table has the text column, and that the column contains text. Rows of pairs check themselves.

    Raises:
        DataError: the column is missing or has another type.
    """
    if how.pairs is not None:
        return
    kind = schema.field(how.text_column).type if schema.names.count(how.text_column) == 1 else None
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if kind is None or not any(is_kind(kind) for is_kind in text):
        raise _no_text(name, how, ", ".join(f"{field.name}: {field.type}" for field in schema))


def rows_of(batches: Iterator[Any], name: str, how: ReadOptions) -> Iterator[str]:
    """Yield the texts of a table's record batches. A row without a text is an empty document."""
    number = 0
    for batch in batches:
        if how.pairs is not None:
            for row in batch.to_pylist():
                number += 1
                yield text_of(row, f"{name}: row {number}", how)
            continue
        column = batch.column(how.text_column)
        _check_bounds(column)
        for value in column:
            number += 1
            try:
                yield value.as_py() or ""
            except UnicodeDecodeError as error:
                if not how.lenient:
                    raise not_utf8(f"{name}: row {number}", error) from error
                text = value.value if pa.types.is_dictionary(value.type) else value
                yield text.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")


def _check_bounds(column: Any) -> None:
    """Check that the texts of a column lie inside its memory: reading a damaged one would end the process.

    Raises:
        pa.ArrowInvalid: they do not.
    """
    values = column
    if pa.types.is_dictionary(column.type):
        values = column.dictionary
        column.indices.validate(full=True)
        if len(column) and pa.compute.max(column.indices).as_py() is not None:
            low, high = (bound(column.indices).as_py() for bound in (pa.compute.min, pa.compute.max))
            if low < 0 or high >= len(values):
                raise pa.ArrowInvalid("a row refers to a text that is not there")
    # seen as bytes, because texts that are not UTF-8 are dealt with row by row
    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    (values.view(as_bytes[values.type]) if values.type in as_bytes else values).validate(full=True)
