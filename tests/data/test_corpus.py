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
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tinygpt2.data.corpus import sources as corpus_module
from tinygpt2.data.corpus import text_splitting
from tinygpt2.data.corpus.python_docs import python_docs
from tinygpt2.data.corpus.sources import Corpus, whole
from tinygpt2.errors import DataError, UnreadableError


def documents(sources: list[str], document: str | None = None, text_column: str = "text", **rest: object) -> list[str]:
    return [piece.text for piece in whole(Corpus(sources, document, text_column, **rest).pieces())]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (None, ["a b\nc\n\n d\r\n\n\ne\n"]),
        ("file", ["a b\nc\n\n d\r\n\n\ne\n"]),
        ("line", ["a b", "c", " d", "e"]),
        ("blank-line", ["a b\nc", "d", "e\n"]),
        ("separator:[bd]", ["a ", "\nc\n\n ", "\r\n\n\ne\n"]),
    ],
)
def test_documents_of_a_text_file(tmp_path: Path, document: str | None, expected: list[str]) -> None:
    file = write(tmp_path / "x.txt", "a b\nc\n\n d\r\n\n\ne\n")
    assert list(documents([file], document)) == expected


def test_directories_are_read_in_sorted_order_and_hidden_files_left_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", ".hidden", "a/.git/config", "c.jsonl"):
        write(tmp_path / name, '{"text": "row"}' if name.endswith("jsonl") else name)
    assert list(documents([str(tmp_path)])) == ["a/z.txt", "b.txt", "row"]
    assert list(documents([str(tmp_path / "c.jsonl"), str(tmp_path / "b.txt")])) == ["row", "b.txt"]


def test_json_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", '{"text": "one\\ntwo", "id": 1}\n\n{"text": "  "}\n{"text": "你好"}\n')
    assert list(documents([file])) == ["one\ntwo", "你好"]
    assert list(documents([file], document="blank-line")) == ["one\ntwo", "你好"]
    other = write(tmp_path / "y.jsonl", json.dumps({"body": "b"}) + "\n")
    assert list(documents([other], text_column="body")) == ["b"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"text": "a"}\n{"text": \n', ":2: not valid JSON"),
        ('{"body": "a"}\n', r":1: no text in field 'text' \(found: body\)"),
        ('{"text": 3}\n', ":1: field 'text' holds no text but int"),
        ("[1]\n", ":1: no text in field"),
    ],
)
def test_broken_json_lines_name_file_and_line(tmp_path: Path, content: str, part: str) -> None:
    with pytest.raises(DataError, match=part):
        list(documents([write(tmp_path / "x.jsonl", content)]))


@pytest.mark.parametrize("document", ["file", "line"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_invalid_utf8_names_file_and_byte(tmp_path: Path, document: str, name: str) -> None:
    file = tmp_path / name
    first = b'{"text": "a"}\n' if name.endswith("jsonl") else "né\nok\n".encode()
    file.write_bytes(first + b"b\xff\n")
    with pytest.raises(DataError, match=rf"{name}: not UTF-8: .* at byte {len(first) + 1}"):
        list(documents([str(file)], document))


@pytest.mark.parametrize(
    "missing", ["nowhere.txt", "no/where/at/all", "./nowhere", "some-data-set", "owner/set:part@train"]
)
def test_missing_source(missing: str) -> None:
    with pytest.raises(DataError, match="no such file or directory: "):
        list(documents([missing]))


TEXTS = ["one\ntwo", "你好 🙂", 'naïve, "quoted"; x', "last"]
ROWS = [{"id": index, "text": text} for index, text in enumerate(TEXTS)]


def as_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


def as_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def as_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(ROWS)


def as_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)


def as_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def as_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


WRITERS = {
    "a.jsonl": as_jsonl, "a.json": as_json, "lines.json": as_jsonl, "a.csv": as_csv, "a.parquet": as_parquet,
    "stream.arrow": as_arrow_stream, "file.arrow": as_arrow_file,
}  # fmt: skip
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: pa.Codec("zstd").compress(raw).to_pybytes(),
}


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_packed_or_plain(tmp_path: Path, name: str, ending: str) -> None:
    WRITERS[name](tmp_path / name)
    path = tmp_path / (name + ending)
    path.write_bytes(PACKERS[ending]((tmp_path / name).read_bytes()))
    assert documents([str(path)]) == TEXTS


def test_tar_archives_of_texts_packed_inside_too(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        for index, text in enumerate(TEXTS[:2]):
            member = tarfile.TarInfo(f"{index}.txt")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    as_jsonl(tmp_path / "rows.jsonl")
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("deep/subset_data.xz")  # as OpenWebText's archive holds them
        member.size = len(inner.getvalue())
        archive.addfile(member, io.BytesIO(inner.getvalue()))
        archive.add(tmp_path / "rows.jsonl", "rows.jsonl")
        archive.add(tmp_path / "rows.jsonl", ".hidden.jsonl")
    assert documents([str(tmp_path / "all.tar.gz")]) == TEXTS[:2] + TEXTS


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    splits = {"train": ROWS[:3], "validation": ROWS[3:]}
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    made.save_to_disk(str(tmp_path / "d"))
    assert documents([str(tmp_path / "d")]) == TEXTS[:3]
    assert documents([str(tmp_path / "d")], split=("validation", "test")) == TEXTS[3:]
    assert documents([f"{tmp_path / 'd'}@validation"]) == TEXTS[3:]
    made["train"].save_to_disk(str(tmp_path / "e"))
    assert documents([str(tmp_path / "e"), str(tmp_path / "d")]) == TEXTS[:3] * 2
    with pytest.raises(DataError, match="has no split nothing"):
        documents([f"{tmp_path / 'd'}@nothing"])
    with pytest.raises(DataError, match=r"no text in field 'body' \(found: id: int64, text: string\)"):
        documents([str(tmp_path / "d")], text_column="body")


def test_a_data_set_on_the_hub_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Hub would give, from files here: one unit for each of the set's files."""
    for index in range(3):
        pq.write_table(pa.Table.from_pylist(ROWS[index : index + 2]), tmp_path / f"train-{index}.parquet")
    as_parquet(tmp_path / "validation.parquet")
    files = {"train": str(tmp_path / "train-*.parquet"), "validation": str(tmp_path / "validation.parquet")}
    asked = []

    def load(name: str, configuration: str | None) -> object:
        asked.append((name, configuration))
        return datasets.load_dataset("parquet", data_files=files, streaming=True), "revision"

    monkeypatch.setattr(corpus_module, "stream_dataset", load)
    read = Corpus(["wikitext:wikitext-103-raw-v1"])
    assert [piece.text for piece in read.pieces()] == [text for index in range(3) for text in TEXTS[index : index + 2]]
    assert len(read.items) == 3
    assert documents(["owner/set@validation"]) == TEXTS
    assert asked == [("wikitext", "wikitext-103-raw-v1"), ("owner/set", None)]
    with pytest.raises(DataError, match="no text in field 'body'"):
        documents(["owner/set"], text_column="body")


def test_patterns_and_several_sources_in_the_order_given(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "d.md"):
        write(tmp_path / name, name)
    assert documents([f"{tmp_path}/*.txt"]) == ["a.txt", "b.txt"]
    assert documents([f"{tmp_path}/**/*.txt", str(tmp_path / "d.md")]) == ["a.txt", "b.txt", "deep/c.txt", "d.md"]
    with pytest.raises(DataError, match="no file matches"):
        documents([f"{tmp_path}/*.rst"])


@pytest.mark.parametrize("rule", ["line", "blank-line", "separator:-{3,}\n", "separator:(?m)^={4,}$"])
def test_rules_over_many_chunks_cut_as_one_split_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    pick = random.Random(2)
    text = "".join(
        pick.choice(["word ", "naïve ", "\n", "\r\n", "\n \n\n", "-----\n", "\n=====\n", "x"]) for _ in range(6000)
    )
    file = write(tmp_path / "x.txt", text)
    pattern = {"line": r"\r?\n", "blank-line": r"\r?\n[ \t\r]*\n\s*"}.get(rule) or rule.removeprefix("separator:")
    expected = [part for part in re.split(pattern, text) if part.strip()]
    monkeypatch.setattr(text_splitting, "CHUNK", 97)
    monkeypatch.setattr(text_splitting, "_MARGIN", 40)
    assert documents([file], rule) == expected


def test_bytes_that_are_not_utf8_are_replaced_or_their_documents_left_out(tmp_path: Path) -> None:
    raw = {
        "a.txt": b"good\nb\xffad\xfe\nfine",
        "b.jsonl": b'{"text": "good"}\n{"text": "b\xffad"}\n{"text": "half \\ud83d"}\n{"text": "fine"}\n',
        "c.csv": b"text,n\ngood,1\nb\xffad,2\nfine,3\n",
        "d.json": b'[{"text": "good"}, {"text": "b\xffad"}, {"text": "fine"}]',
    }
    for name, content in raw.items():
        (tmp_path / name).write_bytes(content)
        bad = 2 if name == "b.jsonl" else 1
        skipping = Corpus([str(tmp_path / name)], "line", errors="skip")
        assert [piece.text for piece in whole(skipping.pieces())] == ["good", "fine"]
        assert skipping.encoding_errors == bad
        replacing = Corpus([str(tmp_path / name)], "line", errors="replace")
        found = [piece.text for piece in whole(replacing.pieces())]
        assert (found[0], found[-1], len(found)) == ("good", "fine", 2 + bad)
        assert found[1].startswith("b\ufffdad")
        assert replacing.encoding_errors == bad
        with pytest.raises(DataError, match="--encoding-errors replace"):
            documents([str(tmp_path / name)], "line")
    long = b"word " * 200_000 + b"\xff" + b" word" * 200_000
    (tmp_path / "long.txt").write_bytes(long)
    replacing = Corpus([str(tmp_path / "long.txt")], errors="replace")
    assert "".join(piece.text for piece in replacing.pieces()) == long.decode("utf-8", "replace")
    assert replacing.encoding_errors == 1
    skipping = Corpus([str(tmp_path / "long.txt")], errors="skip")
    assert list(skipping.pieces()) == []
    assert skipping.encoding_errors == 1


def test_blank_documents_are_passed_over_long_ones_too(tmp_path: Path) -> None:
    for name, text in (("a.txt", " \n" * 300_000), ("b.txt", " \n" * 300_000 + "x"), ("c.txt", "y")):
        write(tmp_path / name, text)
    pieces = list(Corpus([str(tmp_path)]).pieces())
    assert [piece.text for piece in whole(pieces)] == [" \n" * 300_000 + "x", "y"]
    assert {piece.number for piece in pieces} == {0, 1}


def test_python_docs_are_big_repeatable_and_imported_from_nowhere() -> None:
    before = set(sys.modules)
    texts = list(python_docs())
    new = {name.split(".")[0] for name in set(sys.modules) - before}
    assert not new & {"antigravity", "turtle", "pydoc_data", "tkinter"}
    assert sum(len(text.encode()) for text in texts) > 1_000_000
    assert len(texts) > 300
    python_docs.cache_clear()
    assert texts == list(python_docs())
    assert any("assert" in text for text in texts[:5])


def test_byte_order_marks_and_blank_lines_before_tables(tmp_path: Path) -> None:
    contents = {
        "a.jsonl": '{"text": "one"}\n', "b.csv": '"text","id"\none,1\n', "c.csv": "\n\ntext\none\n", "d.json": '[{"text": "one"}]',
        "e.json": '{"text": "one"}\n',
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert documents([str(tmp_path / name)]) == ["one"], name


@pytest.mark.parametrize("rule", ["blank-line", "separator:\n+"])
def test_a_separator_longer_than_the_margin_over_a_border(tmp_path: Path, rule: str) -> None:
    first = "a" * (text_splitting.CHUNK - 10_000)
    assert documents([write(tmp_path / "x.txt", first + "\n" * 20_000 + "b")], rule) == [first, "b"]


def test_what_the_network_breaks_off_is_no_fault_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(list):
        num_shards = 1

        def shard(self, count: int, index: int) -> Iterator[dict[str, str]]:
            yield {"text": "one"}
            raise ConnectionError("gone")

    monkeypatch.setattr(corpus_module, "stream_dataset", lambda name, configuration: ({"train": Broken()}, "revision"))
    with pytest.raises(UnreadableError, match="reading owner/set failed: gone"):
        documents(["owner/set"])
