from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tinygpt2.corpus import documents, python_docs
from tinygpt2.errors import DataError


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
        ('{"text": 3}\n', ":1: no text in field"),
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


def test_missing_source() -> None:
    with pytest.raises(DataError, match="no such file or directory: nowhere"):
        list(documents(["nowhere"]))


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
