"""What people bring: files of many kinds and what is read of them, or the message that names what they are."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tinygpt2.data.corpus import formats, readers, sources, unpacking
from tinygpt2.data.corpus.sources import Corpus, whole
from tinygpt2.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXTS = ["one\ntwo", "你好 🙂", 'naïve, "quoted"; x']
ROWS = [{"id": index, "text": text} for index, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
NULLS = b'{"text": null}\n{"text": "a"}\n{"text": ""}\n{"text": " "}\n'
MARK = b"\xef\xbb\xbf"
TEXT = "The cat sat.\n\nIt ran, naïve.\n".encode()
SKIPPED = b"\x5a\x2a\x4d\x18\x04\0\0\0skip"


def separated(delimiter: str) -> bytes:
    held = io.StringIO(newline="")
    writer = csv.DictWriter(held, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return held.getvalue().encode()


def parquet(texts: pa.Array | list) -> bytes:
    held = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), held)
    return held.getvalue()


def arrow(texts: pa.Array | list, new: Callable = pa.ipc.new_stream) -> bytes:
    held, table = io.BytesIO(), pa.table({"text": texts})
    with new(held, table.schema) as writer:
        writer.write_table(table)
    return held.getvalue()


def tar(kind: int = tarfile.PAX_FORMAT, **members: bytes) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=kind) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return held.getvalue()


def v7(**members: bytes) -> bytes:
    """Make a tar archive without the mark `ustar`, as old programs write it."""
    raw = bytearray(tar(tarfile.USTAR_FORMAT, **members))
    for at in range(0, len(raw), 512):
        if raw[at + 257 : at + 262] == b"ustar":
            raw[at + 257 : at + 265] = bytes(8)
            raw[at + 148 : at + 156] = b" " * 8
            raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    return bytes(raw)


def zipped(*names: str, **members: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("folder/", *names):
            archive.writestr(name, b"")
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), content)
    return held.getvalue()


def layers(count: int, raw: bytes) -> bytes:
    for _ in range(count):
        raw = gzip.compress(raw)
    return raw


def long_window(raw: bytes) -> bytes:
    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.enable_long_distance_matching: 1}
    compressor = zstd.ZstdCompressor(options=options)
    return compressor.compress(raw) + compressor.flush()


def encrypted(raw: bytes) -> bytes:
    """Set the mark of encryption in a zip archive's two headers of its only file."""
    raw = bytearray(raw)
    for sign, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.rindex(sign) + at] |= 1
    return bytes(raw)


WHOLE = [TEXT.decode()]
GOOD = {
    # the name tells
    "a.txt": (TEXT, WHOLE), "mark.txt": (MARK + TEXT, WHOLE), "mark.csv": (MARK + separated(","), TEXTS),
    "a.ndjson": (LINES, TEXTS), "a.tsv": (separated("\t"), TEXTS), "a.feather": (arrow(TEXTS, pa.ipc.new_file), TEXTS),
    "json.txt": (LINES, [LINES.decode()]), "braces.txt": (b"{a} is a set", ["{a} is a set"]),
    # the content tells
    "wiki_00": (LINES, TEXTS), "part-00000": (LINES, TEXTS), "a.jsonl.2024": (MARK + LINES, TEXTS),
    "long": (b'{"text": "' + b"a" * 9000 + b'"}', ["a" * 9000]),
    "array": (json.dumps(ROWS, indent=1).encode(), TEXTS), "texts": (json.dumps(TEXTS).encode(), TEXTS),
    "comma": (separated(","), TEXTS), "tab.data": (separated("\t"), TEXTS),
    "columns": (parquet(TEXTS), TEXTS), "columns.txt": (parquet(TEXTS), TEXTS),
    "stream.bin": (arrow(TEXTS), TEXTS), "file.bin": (arrow(TEXTS, pa.ipc.new_file), TEXTS),
    "prose": (TEXT, WHOLE), "noted": (b"[Illustration]\n\nNote, text\n", ["[Illustration]\n\nNote, text\n"]),
    "object.conf": (b'{\n "text": 1\n}\n', ['{\n "text": 1\n}\n']), "zero": (b"a\0b " * 3 + TEXT * 9, ["a\0b " * 3 + WHOLE[0] * 9]),
    # how it is packed
    "a.jsonl.gzip": (gzip.compress(LINES), TEXTS), "a.ndjson.gz": (gzip.compress(LINES), TEXTS),
    "a.jsonl.zstd": (zstd.compress(LINES), TEXTS), "two.jsonl.zst": (zstd.compress(LINES) + zstd.compress(LINES), TEXTS * 2),
    "skip.jsonl.zst": (SKIPPED + zstd.compress(LINES) + SKIPPED, TEXTS), "window.txt.zst": (long_window(TEXT), WHOLE),
    "a.txt.lzma": (lzma.compress(TEXT, lzma.FORMAT_ALONE), WHOLE), "four.txt.gz": (layers(4, TEXT), WHOLE),
    "mixed.txt": (gzip.compress(bz2.compress(lzma.compress(TEXT))), WHOLE), "empty.txt.bz2": (bz2.compress(b""), []),
    "a.tbz2": (bz2.compress(tar(a_txt=TEXT, b_jsonl=LINES)), [*WHOLE, *TEXTS]), "a.txz": (lzma.compress(tar(a=LINES)), TEXTS),
    "v7.tar": (v7(a_txt=TEXT, _hidden=b"x"), WHOLE), "v7": (gzip.compress(v7(a_txt=TEXT)), WHOLE),
    "text8.zip": (zipped(text8=TEXT), WHOLE), "rows.zip": (zipped(a__b_jsonl=LINES, _DS=b"x", c_csv=separated(",")), TEXTS * 2),
    "deep.zip": (zipped(a_zip=zipped(b_tar=tar(c_txt_gz=gzip.compress(TEXT)))), WHOLE),
    "deep.parquet.zip": (zipped(a_parquet=parquet(TEXTS)), TEXTS),
    # every form of a text, and rows without one
    "large.parquet": (parquet(pa.array(TEXTS, pa.large_string())), TEXTS),
    "view.arrow": (arrow(pa.array(TEXTS, pa.string_view())), TEXTS),
    "dictionary.arrow": (arrow(pa.array(TEXTS).dictionary_encode()), TEXTS),
    "dictionary.parquet": (parquet(pa.array(TEXTS).dictionary_encode()), TEXTS),
    "null.jsonl": (NULLS, ["a"]), "null.json": (b'[{"text": null}, {"text": "a"}, "", null]', ["a"]),
    "null.csv": (b'id,text\n1,\n2,a\n3," "\n4,""\n', ["a"]), "null.parquet": (parquet([None, "a", "", " "]), ["a"]),
    "null.arrow": (arrow([None, "a", "", " "]), ["a"]), "never.parquet": (parquet([None, None, None]), []),
    "nothing.txt": (b"", []),
}  # fmt: skip


def read(path: Path, **options: object) -> tuple[list[str], Corpus]:
    corpus = Corpus([str(path)], **options)
    return [piece.text for piece in whole(corpus.pieces())], corpus


@pytest.mark.parametrize("name", GOOD)
def test_what_a_file_contains(tmp_path: Path, name: str) -> None:
    content, texts = GOOD[name]
    (tmp_path / name).write_bytes(content)
    found, corpus = read(tmp_path / name)
    assert found == texts
    if name.startswith(("null.", "never.")):
        assert corpus.empty_documents == 3


BAD = {
    "utf16.txt": ("a\nb".encode("utf-16"), "is UTF-16, not UTF-8", "iconv -f UTF-16 -t UTF-8"),
    "le.txt": ("naïve\n text".encode("utf-16-le"), "is UTF-16LE", "iconv"),
    "be.jsonl": ('{"text": "a"}\n'.encode("utf-16-be"), "is UTF-16BE", "iconv"),
    "chinese.txt": ("你好世界。\n再见。".encode("utf-16-le"), "is UTF-16LE", "iconv"),
    "utf32.csv": ("text\na".encode("utf-32"), "is UTF-32,", "iconv"),
    "utf32le.txt": ("a b\n".encode("utf-32-le"), "is UTF-32LE", "iconv"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive", "unpack it first"),
    "a.rar": (b"Rar!\x1a\x07\x01\0", "is a RAR archive", "unpack it first"),
    "a.lz4": (b"\x04\x22\x4d\x18aaaa", "is compressed by lz4", "unpack it first"),
    "a.pdf": (b"%PDF-1.7\n%\xe2\xe3", "is a PDF document", "convert it to plain text"),
    "a.rtf": (b"{\\rtf1\\ansi hello}", "is an RTF document", "convert"),
    "a.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0", "is an old Office document", "convert"),
    "a.docx": (zipped("[Content_Types].xml", "word/document.xml"), "is an Office document", "convert"),
    "a.epub": (zipped(mimetype=b"application/epub+zip", a_xhtml=b"x"), "is an EPUB", "convert"),
    "a.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a PNG image", "leave it out"),
    "a.jpg.txt": (b"\xff\xd8\xff\xe0\0\x10JFIF", "is a JPEG image", "leave it out"),
    "a.gif": (b"GIF89a\x01\0\x01\0", "is a GIF image", "leave it out"),
    "a.h5": (b"\x89HDF\r\n\x1a\n\0\0", "is an HDF5 file", "leave it out"),
    "a.npz": (zipped(a_npy=b"\x93NUMPY"), "is an archive of NumPy arrays", "convert"),
    "a.safetensors": (b"\x10\0\0\0\0\0\0\0" + b'{"a":{}}        ', "is a safetensors file", "leave it out"),
    "noise": (random.Random(1).randbytes(5000), "is binary data, not text", "leave it out"),
    "zeros.txt": (bytes(4000), "is binary data, not text", "leave it out"),
    "photos.tar": (tar(a_txt=TEXT, b_png=b"\x89PNG\r\n\x1a\n\0"), "photos.tar/b.png is a PNG image", "leave it out"),
    "five.txt.gz": (layers(5, TEXT), "is compressed more than 4 times", None),
    "five.zip": (zipped(a_zip=zipped(b_zip=zipped(c_zip=zipped(d_zip=zipped(e=TEXT))))), "lies in more than 4 archives", None),
    "locked.zip": (encrypted(zipped(a_txt=TEXT)), "locked.zip/a.txt is encrypted", "unpack it first"),
    "damaged.zip": (zipped(a_txt=TEXT * 100)[:-30], "damaged.zip is damaged", None),
    "cut.txt.zst": (zstd.compress(TEXT * 100)[:-4], "cut.txt.zst is damaged", None),
    "cut.tar": (v7(a_txt=TEXT * 1000)[:9000], "cut.tar/a.txt is damaged", None),
    "quotes.tsv": (b'id\ttext\n1\t"a" b\n', "quotes.tsv:2: not valid TSV", None),
    "number.jsonl": (b'{"text": 3}\n', ":1: field 'text' holds no text but int", None),
    "chat.csv": (b"messages\nhello\n", "no text in field 'text' (found: messages)", "--text-column"),
    "mixed.jsonl": (b'{"text": "a"}\n{"messages": []}\n', ":2: a chat (field 'messages') where texts are read", "from files"),
    "pretty.json": (b'{\n  "text": "a"\n}\n', "is one JSON object over several lines", "an array of objects"),
    "binary.parquet": (parquet(pa.array([b"a"])), "no text in field 'text' (found: text: binary)", "--text-column"),
    "big.json": (b'[{"text": "a", "n": ' + b"9" * 5000 + b"}]", "not valid JSON after item 0", None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    content, message, hint = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read(tmp_path / name)
    assert hint is None or hint in (caught.value.hint or "")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(formats, "say", lines.append)
    return lines


def test_what_the_content_tells_is_said_once_for_each_format(tmp_path: Path, said: list[str]) -> None:
    for name, content in (
        ("a", LINES),
        ("b", LINES),
        ("c", TEXT),
        ("d.jsonl", LINES),
        ("e.txt", TEXT),
        ("f.txt", LINES),
    ):
        (tmp_path / name).write_bytes(content)
    found, _ = read(tmp_path)
    assert found == [*TEXTS, *TEXTS, *WHOLE, *TEXTS, *WHOLE, LINES.decode()]
    assert [line.replace(f"{tmp_path}/", "") for line in said] == [
        "a is read as JSON lines, after its content; --input-format sets another format",
        "c is read as text, after its content; --input-format sets another format",
    ]
    said.clear()
    read(tmp_path / "f.txt")
    assert "is read as text, but it looks like JSON lines: --input-format jsonl reads the field 'text'" in said[0]


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jsonl", "jsonl"), ("a.json", "json"), ("comma", "csv"), ("tab.data", "tsv"), ("columns", "parquet"), ("stream.bin", "arrow")]
)  # fmt: skip
def test_a_format_that_is_given_wins(tmp_path: Path, name: str, kind: str, said: list[str]) -> None:
    content = {"a.jsonl": LINES, "a.json": json.dumps(TEXTS).encode()}.get(name) or GOOD[name][0]
    file = tmp_path / "x.md.gz"
    file.write_bytes(gzip.compress(content))
    assert read(file, format=kind)[0] == TEXTS
    if kind in ("jsonl", "json", "csv", "tsv"):
        assert read(file, format="text")[0] == [content.decode()]
    assert said == []


class Slow(io.RawIOBase):
    """A pipe that gives one byte at a time."""

    def __init__(self, raw: bytes) -> None:
        self._held = io.BytesIO(raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return self._held.readinto(memoryview(buffer)[:1])


@pytest.mark.parametrize("name", ["wiki_00", "comma", "prose", "columns", "a.jsonl.zstd", "rows.zip", "v7.tar"])
def test_standard_input_is_known_by_its_content(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, texts = GOOD[name]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Slow(content))))
    assert read(Path("-"))[0] == texts
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        read(Path("-"))


def test_names_of_splits_with_dots_and_hyphens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def stream(name: str, configuration: str | None) -> object:
        asked.append(f"{name} {configuration}")
        raise DataError("enough")

    monkeypatch.setattr(sources, "stream_dataset", stream)
    for source in ("owner/set@test-clean", "owner/set:clean@train.clean.100"):
        with pytest.raises(DataError, match="enough"):
            read(Path(source))
    assert asked == ["owner/set None", "owner/set clean"]
    for source in ("owner/set.jsonl.zstd", ""):
        with pytest.raises(DataError, match="no such file or directory"):
            list(Corpus([source]).pieces())


def test_only_the_wanted_file_of_an_archive(tmp_path: Path) -> None:
    for name, content in (
        ("a.zip", zipped(x__train_txt=b"no", x__test_txt=TEXT)),
        ("a.tar", tar(train_txt=b"no", test_txt=TEXT)),
    ):
        (tmp_path / name).write_bytes(content)
        how = formats.ReadOptions(members=("test.txt", "x/test.txt"))
        assert readers.read_documents(tmp_path / name, how) == WHOLE
        with pytest.raises(DataError, match="contains no file named other"):
            readers.read_documents(tmp_path / name, formats.ReadOptions(members=("other",)))
    assert unpacking.hidden("a/.b/c")
    assert not unpacking.hidden("./../a")
