"""Read documents from sources, one at a time.

A source is a file, a directory, a pattern such as `'texts/*.txt'`, `-` (standard input), `python-docs`, a dataset saved
by `datasets`, or a dataset on the Hub (`wikitext:wikitext-103-raw-v1@validation`). The module `readers` reads files. To
add a kind of source, add a branch to `_source_items`.
"""

from __future__ import annotations

import glob
import json
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tinygpt2.config.data import EncodingErrors, InputFormat, PairOptions, TextOptions
from tinygpt2.data.corpus.formats import COMPRESSED, ENDINGS, Notes, ReadOptions
from tinygpt2.data.corpus.pairs import PairReader
from tinygpt2.data.corpus.python_docs import python_docs
from tinygpt2.data.corpus.readers import read_stream
from tinygpt2.data.corpus.tables import check_column, rows_of, text_of
from tinygpt2.data.corpus.text_splitting import TextPart, parts_of_rows
from tinygpt2.data.corpus.unpacking import hidden
from tinygpt2.errors import DataError, UnreadableError, one_line
from tinygpt2.utils.files import open_file
from tinygpt2.utils.hub import stream_dataset

PYTHON_DOCS = "python-docs"
SourceKind = Literal["python-docs", "stdin", "saved", "directory", "file", "pattern", "hub"]
Rows = Callable[[ReadOptions], Iterator[TextPart]]

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<configuration>[\w.-]+))?(@(?P<split>[\w.-]+))?")
_BLANK = 64  # parts of white space at the beginning of a document, about a million characters each, that are kept
_AGAIN = "run the command again, pregenerate with --resume"
_HINT = "a SOURCE is a file, a directory, a pattern in quotes, - (stdin), python-docs or a dataset on the Hub"


class Piece(NamedTuple):
    """A document, or the next part of a long one. `last` marks its last part; `number` counts documents from 0."""

    number: int
    text: str
    last: bool


@dataclass
class Corpus:
    """A collection of documents: the sources to read, and how to read them.

    Attributes:
        sources: the names of the sources, as the module describes them.
        document: what is one document in a text file: `file`, `line`, `blank-line` or `separator:REGEX`.
        text_column: the field or column that contains the text of a row.
        errors: what to do with bytes that are not UTF-8 (and halves of surrogate pairs in JSON): stop with an error,
            replace them with U+FFFD, or leave the document out.
        split: names of splits; the first one that a dataset has is read.
        format: the format of every file; `auto` finds it out.
        pairs: reads pairs or chats from rows; None reads one text.
        given: what to read instead of finding out what the sources mean.
        encoding_errors: number of documents with such bytes so far.
        empty_documents: number of documents so far that were left out because they are blank.
        notes: what was said about the sources.
    """

    sources: list[str]
    document: str | None = None
    text_column: str = "text"
    errors: EncodingErrors = "strict"
    split: tuple[str, ...] = ("train",)
    format: InputFormat = "auto"
    pairs: PairReader | None = None
    given: list[SourceItem] | None = None
    encoding_errors: int = field(default=0, init=False)
    empty_documents: int = field(default=0, init=False)
    notes: Notes = field(default_factory=Notes, init=False)

    @classmethod
    def of(cls, sources: list[str], options: TextOptions, split: tuple[str, ...] = ("train",)) -> Corpus:
        """Return the corpus of these sources, read with a command's options."""
        read = (options.document, options.text_column, options.encoding_errors, split, options.input_format)
        pairs = PairReader.of(options) if isinstance(options, PairOptions) and options.prompt_column else None
        return cls(sources, *read, pairs)

    def pieces(self) -> Iterator[Piece]:
        """Yield the documents of all sources in order, without blank ones.

        Raises:
            DataError: a source is missing or damaged, is not UTF-8 (the message gives file and byte), or has a row that
                is broken or lacks the field (the message gives file and row).
        """
        read = (self.document or "file", self.text_column, self.errors != "strict", self.format, (), self.pairs)
        how, number = ReadOptions(*read, notes=self.notes), 0
        for item in self.items:
            for parts in _by_document(item.rows(how)):
                for text, last in self._not_blank(self._valid(parts) if self.errors == "skip" else parts):
                    yield Piece(number, text, last)
                    number += last

    @cached_property
    def items(self) -> list[SourceItem]:
        """The files, streams and datasets that the sources consist of, in order."""
        return self.given or [item for source in self.sources for item in _source_items(source, self.split)]

    def size_hint(self) -> int | None:
        """Return the approximate size of the sources in bytes, for a progress bar, or None if it is unknown."""
        sizes = [item.size for item in self.items]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def _valid(self, parts: Iterator[TextPart]) -> Iterator[TextPart]:
        """Yield a document unless it contains invalid bytes. A long one is held on disk meanwhile."""
        with tempfile.SpooledTemporaryFile(1 << 26) as held:  # the last part may be the invalid one
            for text, last in parts:
                if _broken(text):
                    self.encoding_errors += 1
                    return
                held.write(json.dumps((text, last)).encode() + b"\n")
            held.seek(0)
            for line in held:
                text, last = json.loads(line)
                yield text, last

    def _not_blank(self, parts: Iterator[TextPart]) -> Iterator[TextPart]:
        """Replace a document's invalid bytes if `errors` says so, and leave the document out if it is blank."""
        counted = False
        leading: list[TextPart] | None = []  # the parts so far, if all of them are blank
        for text, last in parts:
            if self.errors == "replace" and _broken(text):
                self.encoding_errors += not counted
                counted = True
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if leading is None:
                yield text, last
                continue
            leading.append((text, last))
            if text.strip() or len(leading) > _BLANK:
                yield from leading
                leading = None
        self.empty_documents += bool(leading)


@dataclass(frozen=True)
class SourceItem:
    """A file, a stream or a dataset to read.

    Attributes:
        name: its path or name.
        size: the size of its text in bytes, or None if it is unknown.
        rows: a function that reads its documents.
        mark: a text that changes with the content, as far as this can be seen without reading the content.
        dataset: the name of the dataset on the Hub that it is a part of; None for anything else.
    """

    name: str
    size: int | None
    rows: Rows
    mark: str = ""
    dataset: str | None = None


def whole(
    pieces: Iterable[Piece], most: int | None = None, divided: Callable[[], None] = lambda: None
) -> Iterator[Piece]:
    """Join the parts of long documents, so that each piece is a whole document.

    Args:
        pieces: the documents in parts.
        most: the number of characters up to which parts are joined; None joins all.
        divided: called when a document has more than `most`, before its first piece.
    """
    held: list[str] = []
    size = 0
    for piece in pieces:
        if most is not None and held and size + len(piece.text) > most:
            divided()
            yield Piece(piece.number, "".join(held), False)
            held, size = [], 0
        held.append(piece.text)
        size += len(piece.text)
        if piece.last:
            yield Piece(piece.number, "".join(held), True)
            held, size = [], 0


def _by_document(parts: Iterator[TextPart]) -> Iterator[Iterator[TextPart]]:
    """Group parts by document. Asking for the next group skips what is unread of the current one."""

    def group(first: TextPart) -> Iterator[TextPart]:
        part = first
        yield part
        while not part[1]:
            part = next(parts)
            yield part

    for first in parts:
        document = group(first)
        yield document
        for _ in document:
            pass


def _broken(text: str) -> bool:
    """Return whether a text contains lone surrogates, which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _source_items(source: str, split: tuple[str, ...]) -> Iterator[SourceItem]:
    path, kind = Path(source), source_kind(source)
    if kind == "python-docs":
        texts = python_docs()
        size = sum(len(text.encode()) for text in texts)
        yield SourceItem(source, size, lambda how: ((text, True) for text in texts), sys.version)
    elif kind == "stdin":
        yield SourceItem(source, None, _standard_input)
    elif kind == "saved":
        saved = _without_split(source)
        yield _saved(Path(saved), (source[len(saved) + 1 :],) if saved != source else split)
    elif kind == "directory":
        inside = (file for file in sorted(path.rglob("*")) if file.is_file())
        yield from (_file(file) for file in inside if not hidden(file.relative_to(path)))
    elif kind == "file":
        yield _file(path)
    elif kind == "pattern":
        yield from map(_file, _matching(source))
    elif found := _HUB_NAME.fullmatch(source):
        yield from _streamed(source, found, split)


def source_kind(source: str) -> SourceKind:
    """Return what kind of source a name means. Nothing is read, and the Hub is not asked.

    Raises:
        DataError: there is no such file or directory, and no dataset on the Hub can have the name.
    """
    path = Path(source)
    if source in (PYTHON_DOCS, "-"):
        return "python-docs" if source == PYTHON_DOCS else "stdin"
    if (saved := _without_split(source)) and _is_saved(Path(saved)):
        return "saved"
    if source and path.exists():
        return "directory" if path.is_dir() else "file"
    if any(sign in source for sign in "*?["):
        _matching(source)
        return "pattern"
    # a missing file is not taken for a dataset
    if path.suffix.lower() in (*COMPRESSED, *ENDINGS) or not _HUB_NAME.fullmatch(source):
        raise DataError(f"no such file or directory: {source}", _HINT)
    return "hub"


def _without_split(source: str) -> str:
    return re.sub(r"@[\w.-]+$", "", source)


def _standard_input(how: ReadOptions) -> Iterator[TextPart]:
    if sys.stdin is None:
        raise DataError("standard input is closed", "pipe the text into the command")
    yield from read_stream(sys.stdin.buffer, "standard input", how)


def _matching(pattern: str) -> list[Path]:
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207  (Path.glob takes no absolute pattern)
    files = [Path(name) for name in sorted(found) if Path(name).is_file()]
    if not files:
        raise DataError(f"no file matches {pattern}", _HINT)
    return files


def _file(path: Path) -> SourceItem:
    def read(how: ReadOptions) -> Iterator[TextPart]:
        with open_file(path) as stream:
            yield from read_stream(stream, str(path), how)

    status = path.stat()
    plain = stat.S_ISREG(status.st_mode) and path.suffix.lower() not in (*COMPRESSED, ".parquet")
    size = status.st_size if plain else None
    return SourceItem(str(path), size, read, f"{status.st_size} {status.st_mtime_ns}")


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(path: Path, split: tuple[str, ...]) -> SourceItem:
    """Read a dataset that `datasets` saved to disk."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # broken files raise many kinds of exceptions
        raise DataError(f"cannot open the dataset {path}: {one_line(error)}") from error
    if isinstance(dataset, datasets.DatasetDict):
        dataset = dataset[_choose(list(dataset), split, str(path))]

    def read(how: ReadOptions) -> Iterator[TextPart]:
        check_column(dataset.features.arrow_schema, str(path), how)
        tables = dataset.with_format("arrow").iter(256)
        rows = rows_of(chain.from_iterable(table.to_batches() for table in tables), str(path), how)
        yield from _whole_texts(rows, str(path), how)

    return SourceItem(str(path), dataset.data.nbytes, read, dataset._fingerprint)


def _whole_texts(texts: Iterable[str], name: str, how: ReadOptions) -> Iterator[TextPart]:
    return parts_of_rows(texts, lambda: how.cut_without_space(name))


def _streamed(source: str, name: re.Match[str], split: tuple[str, ...]) -> Iterator[SourceItem]:
    """Stream a dataset from the Hub. Each of its shards is one item."""
    wanted = (name["split"],) if name["split"] else split
    splits, revision = stream_dataset(name["name"], name["configuration"])
    dataset = splits[_choose(list(splits), wanted, source)]

    def rows(index: int) -> Rows:
        def read(how: ReadOptions) -> Iterator[TextPart]:
            rows = enumerate(_reading(dataset.shard(dataset.num_shards, index), source))
            texts = (text_of(row, f"{source}: row {number} of shard {index}", how) for number, row in rows)
            yield from _whole_texts(texts, source, how)

        return read

    for index in range(dataset.num_shards):
        yield SourceItem(f"{source} ({index + 1} of {dataset.num_shards})", None, rows(index), revision, name["name"])


def _reading(rows: Iterable[Any], source: str) -> Iterator[Any]:
    try:
        yield from rows
    except Exception as error:  # network failures raise many kinds of exceptions
        raise UnreadableError(f"reading {source} failed: {one_line(error, 200)}", _AGAIN) from error


def _choose(there: list[Any], wanted: Iterable[str], source: str) -> str:
    for name in wanted:
        if name in there:
            return name
    raise DataError(
        f"{source} has no split {' or '.join(wanted)} (it has: {', '.join(map(str, there))})",
        "give one of them after an @, such as NAME@train",
    )
