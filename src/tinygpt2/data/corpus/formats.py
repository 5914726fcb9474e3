"""Find out what a file is: by the option --input-format, by its first bytes, or by the ending of its name."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import PurePath

from tinygpt2.config.data import InputFormat
from tinygpt2.data.corpus.pairs import PairReader
from tinygpt2.errors import DataError
from tinygpt2.utils.progress import say

HEAD = 1 << 12  # number of bytes that show what a file is
COMPRESSED = (
    ".gz", ".gzip", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".zip",
)  # fmt: skip
ENDINGS: dict[str, InputFormat] = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".raw", ".tokens", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
}
_LABELS = {"jsonl": "JSON lines", "json": "JSON", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet", "arrow": "Arrow"}

_UNPACK = "unpack it first, and give what is inside"
_CONVERT = "convert it to plain text first"
_LEAVE = "leave it out of the sources, for example with a pattern in quotes such as 'texts/*.txt'"
# The beginning of each kind of file that holds no text to read, its name, and what to do
_BINARY = (
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (rb"MSCF\0", "a cabinet archive", _UNPACK),
    (rb"!<arch>\n", "an ar archive", _UNPACK),
    (rb"LZIP\x01", "compressed by lzip", _UNPACK),
    (rb"\x04\x22\x4d\x18", "compressed by lz4", _UNPACK),
    (rb"\x1f[\x9d\xa0]", "compressed by compress", _UNPACK),
    (rb"\xff\x06\0\0sNaPpY", "compressed by snappy", _UNPACK),
    (rb"%PDF-\d", "a PDF document", _CONVERT),
    (rb"\{\\rtf\d", "an RTF document", _CONVERT),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", _CONVERT),
    (rb"AT&TFORM", "a DjVu document", _CONVERT),
    (rb".{60}BOOKMOBI", "a Mobipocket book", _CONVERT),
    (rb"\x89PNG\r\n\x1a\n", "a PNG image", _LEAVE),
    (rb"\xff\xd8\xff", "a JPEG image", _LEAVE),
    (rb"GIF8[79]a.*\0", "a GIF image", _LEAVE),
    (rb"RIFF.{4}WEBP", "a WebP image", _LEAVE),
    (rb"II\*\0|MM\0\*", "a TIFF image", _LEAVE),
    (rb"BM.{4}\0{4}", "a BMP image", _LEAVE),
    (rb"RIFF.{4}(?:WAVE|AVI )|ID3[\2-\4]\0|OggS\0|fLaC\0|.{4}ftyp", "a sound or video", _LEAVE),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", _LEAVE),
    (rb"\x93NUMPY", "a NumPy array", _LEAVE),
    (rb"SQLite format 3\0", "an SQLite database", _CONVERT),
    (rb"Obj\x01.*avro", "an Avro file", _CONVERT),
    (rb"ORC.*\0", "an ORC file", _CONVERT),
    (rb"\x80[\2-\5][\x95\]}(cK]", "a Python pickle", _CONVERT),
    (rb".{4}\0{4}\{\"", "a safetensors file", _LEAVE),
    (rb"GGUF.\0\0\0", "a GGUF model", _LEAVE),
    (rb"\x7fELF|MZ.*\0", "a program", _LEAVE),
)
_NAME = rb'"(?:[^"\\]|\\.)*"'
_JSON_OBJECT = re.compile(rb"\s*\{\s*" + _NAME + rb"\s*:")
_JSON_ARRAY = re.compile(rb"\s*\[\s*(?:\{\s*" + _NAME + rb"\s*:|" + _NAME + rb"\s*[,\]])")
_CONTROL = bytes({*range(32), 127} - {*b"\t\n\v\f\r\b\x1a\x1b"})  # bytes that are rare in text


@dataclass
class Notes:
    """What was read, and what was said about it.

    Attributes:
        formats: the formats of the files that were read.
    """

    formats: set[str] = field(default_factory=set)
    _said: set[str] = field(default_factory=set)

    def once(self, kind: str, message: str) -> None:
        """Print a message, unless one of its kind was printed before."""
        if kind not in self._said:
            self._said.add(kind)
            say(message)


@dataclass(frozen=True)
class ReadOptions:
    """How files are read and divided into documents.

    Attributes:
        document: what is one document in a text file: `file`, `line`, `blank-line` or `separator:REGEX`.
        text_column: the field or column that contains the text of a row.
        lenient: return bytes that are not UTF-8 as lone surrogates, which the caller handles, instead of an error.
        format: the format of every file; `auto` finds it out.
        members: patterns of names; from an archive, only the first member that matches one is read. Empty means all.
        pairs: reads pairs or chats from rows instead of one text.
        notes: collects what was read and said.
    """

    document: str = "file"
    text_column: str = "text"
    lenient: bool = False
    format: InputFormat = "auto"
    members: tuple[str, ...] = ()
    pairs: PairReader | None = None
    notes: Notes = field(default_factory=Notes, compare=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields or columns of a row that are read."""
        return (self.text_column,) if self.pairs is None else self.pairs.columns

    def cut_without_space(self, name: str) -> None:
        """Say that a document is cut at a place that may change a token."""
        self.notes.once(
            "cut",
            f"{name} has more than a million characters without white space: they are cut after each 1,048,576, which "
            "may change the tokens there",
        )


def plain_name(name: str) -> PurePath:
    """Return a file's name without the endings that say how it is packed."""
    plain = PurePath(name)
    while plain.suffix.lower() in COMPRESSED:
        plain = plain.with_suffix("")
    return plain


def format_of(name: str, head: bytes, how: ReadOptions) -> InputFormat:
    """Return the format of an unpacked file, and say so if its name does not tell.

    Raises:
        DataError: it is UTF-16, UTF-32, an image or another kind of file that holds no text to read.
    """
    named = ENDINGS.get(plain_name(name).suffix.lower())
    taken = how.format
    if taken == "auto":
        taken = _table(head) or named or _by_content(head, how)
    if taken not in ("parquet", "arrow"):
        _require_text(name, head, explicit=how.format != "auto")
    how.notes.formats.add(taken)
    if how.format == "auto" and taken != named:
        label = _LABELS.get(taken, "text")
        how.notes.once(label, f"{name} is read as {label}, after its content; --input-format sets another format")
    elif how.format == "auto" and taken == "text" and (looks := _by_content(head, how)) in ("jsonl", "json"):
        how.notes.once(
            "text",
            f"{name} is read as text, but it looks like {_LABELS[looks]}: --input-format {looks} reads the field "
            f"{how.text_column!r} of each row",
        )
    return taken


def _table(head: bytes) -> InputFormat | None:
    """Recognize Parquet and Arrow, which no text can be mistaken for."""
    if head.startswith(b"PAR1"):
        return "parquet"
    return "arrow" if head.startswith((b"ARROW1\0\0", b"\xff\xff\xff\xff")) else None


def _by_content(head: bytes, how: ReadOptions) -> InputFormat:
    """Return the text format that a file's beginning shows. Plain text is what shows nothing else."""
    head = head.removeprefix(b"\xef\xbb\xbf")
    if _JSON_ARRAY.match(head):
        return "json"
    line, whole, _ = head.lstrip().partition(b"\n")
    if _JSON_OBJECT.match(line):
        return "jsonl" if not whole or _is_object(line) else "text"
    for delimiter, kind in ((",", "csv"), ("\t", "tsv")):
        try:
            fields = next(csv.reader([line.decode("utf-8", "replace").rstrip("\r")], delimiter=delimiter), [])
        except csv.Error:
            continue
        if whole and len(fields) > 1 and set(how.columns) <= set(fields):
            return "csv" if kind == "csv" else "tsv"
    return "text"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _require_text(name: str, head: bytes, *, explicit: bool) -> None:
    """Check that a file can be text.

    Args:
        name: the file's name.
        head: its beginning.
        explicit: the format was given, so the beginning of the text cannot speak against it.
    """
    if wide := _wide_encoding(head):
        raise DataError(f"{name} is {wide}, not UTF-8", f"convert it: iconv -f {wide} -t UTF-8 FILE > NEW")
    if explicit:
        return
    for pattern, kind, hint in _BINARY:
        if re.match(pattern, head, re.DOTALL):
            raise DataError(f"{name} is {kind}, which cannot be read as text", hint)
    odd = len(head) - len(head.translate(None, _CONTROL))
    if b"\0" in head and odd > len(head) // 50:
        raise DataError(f"{name} is binary data, not text", _LEAVE)


def _wide_encoding(head: bytes) -> str | None:
    """Recognize UTF-16 and UTF-32, by a byte-order mark or by their zero bytes."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    if b"\0" not in head:
        return None
    for encoding, size in (("UTF-32LE", 4), ("UTF-32BE", 4), ("UTF-16LE", 2), ("UTF-16BE", 2)):
        try:
            text = head[: len(head) // size * size].decode(encoding, "replace" if size == 2 else "strict")
        except UnicodeDecodeError:
            continue
        odd = sum(not (char.isprintable() or char in "\t\n\r\ufeff") for char in text)
        plain = sum(char.isspace() or char.isascii() for char in text)  # a text has spaces or line ends
        if text and not odd and plain:
            return encoding
    return None
