"""What can be wrong with sources and with `pregenerate`: the exit code, one clear message, nothing left behind."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

TEXT = b"the cat sat on the mat. " * 4000
GOOD = b'{"text": "the cat sat on the mat"}\n'


def tar(**members: bytes) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name + ".txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return held.getvalue()


def table(**columns: list) -> bytes:
    held = io.BytesIO()
    pq.write_table(pa.table(columns), held)
    return held.getvalue()


FILES = {
    "good.txt": TEXT,
    "empty.txt": b" \n\n",
    "short.txt": b"the cat",
    "latin1.txt": b"one\ncaf\xe9 au lait",
    "cut.txt": "naïve".encode()[:3],
    "latin1.jsonl": GOOD + b'{"text": "caf\xe9"}\n',
    "latin1.csv": b"text\ngood\ncaf\xe9\n",
    "latin1.json": b'[{"text": "good"}, {"text": "caf\xe9"}]',
    "broken.jsonl": GOOD + b'{"text": \n',
    "column.jsonl": GOOD + b'{"body": "a", "id": 3}\n',
    "number.jsonl": b'{"text": 3}\n',
    "list.jsonl": b'["text"]\n',
    "half.jsonl": b'{"text": "a \\ud83d b"}\n',
    "deep.jsonl": b'{"text": ' + b"[" * 200_000 + b"\n",
    "broken.json": b'[{"text": "a"}, {"text": "b"',
    "item.json": b'[{"text": "a"}, {"body": "b"}]',
    "fields.csv": b"id,text\n1,a\n2\n",
    "column.csv": b"id,body\n1,a\n",
    "quote.csv": b'text\n"a\nb\n',
    "column.parquet": table(body=["a"], id=[1]),
    "numbers.parquet": table(text=[1, 2]),
    "damaged.parquet": table(text=["a"])[:-9],
    "text.parquet": TEXT,
    "damaged.arrow": b"ARROW1\0\0" + TEXT,
    "noise.arrow": TEXT,
    "cut.txt.gz": gzip.compress(TEXT)[:-20],
    "sum.txt.gz": gzip.compress(TEXT)[:-8] + b"\0" * 8,
    "cut.txt.xz": lzma.compress(TEXT)[:-20],
    "noise.txt.xz": lzma.compress(TEXT)[:30] + b"\0" * 99,
    "cut.txt.bz2": bz2.compress(TEXT)[:-20],
    "cut.txt.zst": pa.Codec("zstd").compress(TEXT).to_pybytes()[:-5],
    "noise.txt.zst": pa.Codec("zstd").compress(TEXT).to_pybytes()[:6] + b"\xff" * 60,
    "cut.tar": tar(a=TEXT, b=TEXT)[: 2 * len(TEXT) // 2],
    "latin1.tar": tar(a=TEXT, b=b"caf\xe9!"),
}
BAD = [
    (3, "no such file or directory: {in}/nowhere.txt", "{in}/nowhere.txt"),
    (3, "no such file or directory: {in}/nowhere", "{in}/nowhere"),
    (3, "no file matches {in}/*.rst", "{in}/*.rst"),
    (3, "and no dataset of that name could be read from the Hub", "some-data-set"),
    (3, "and no dataset of that name could be read from the Hub", "owner/set:part@train"),
    (3, "no text in {in}/empty.txt", "{in}/empty.txt"),
    (3, "shorter than one block of 16", "{in}/short.txt"),
    (3, "latin1.txt: not UTF-8: invalid continuation byte at byte 7", "{in}/latin1.txt"),
    (3, "latin1.txt: not UTF-8: invalid continuation byte at byte 7", "{in}/latin1.txt --document line"),
    (3, "cut.txt: not UTF-8: unexpected end of data at byte 2", "{in}/cut.txt"),
    (3, "latin1.jsonl: not UTF-8: invalid continuation byte at byte 48", "{in}/latin1.jsonl"),
    (3, "latin1.csv: not UTF-8: invalid continuation byte at byte 13", "{in}/latin1.csv"),
    (3, "latin1.json: not UTF-8: invalid continuation byte at byte 32", "{in}/latin1.json"),
    (3, "broken.jsonl:2: not valid JSON", "{in}/broken.jsonl"),
    (3, "column.jsonl:2: no text in field 'text' (found: body, id)", "{in}/column.jsonl"),
    (3, "good.txt", "{in}/good.txt {in}/column.jsonl --text-column nothing --test-source {in}/good.txt.no"),
    (3, "number.jsonl:1: field 'text' holds no text but int", "{in}/number.jsonl"),
    (3, "list.jsonl:1: no text in field 'text' (found: list)", "{in}/list.jsonl"),
    (3, "half.jsonl:1: half of a surrogate pair", "{in}/half.jsonl"),
    (3, "deep.jsonl:1: JSON nested too deeply", "{in}/deep.jsonl"),
    (3, "broken.json: not valid JSON after item 1", "{in}/broken.json"),
    (3, "item.json: item 2: no text in field 'text' (found: body)", "{in}/item.json"),
    (3, "fields.csv:3: 1 fields, but the header has 2", "{in}/fields.csv"),
    (3, "column.csv:1: no text in field 'text' (found: id, body)", "{in}/column.csv"),
    (3, "quote.csv:3: not valid CSV", "{in}/quote.csv"),
    (3, "column.parquet: no text in field 'text' (found: body: string, id: int64)", "{in}/column.parquet"),
    (3, "numbers.parquet: no text in field 'text' (found: text: int64)", "{in}/numbers.parquet"),
    (3, "damaged.parquet is damaged", "{in}/damaged.parquet"),
    (3, "text.parquet is damaged", "{in}/text.parquet"),
    (3, "damaged.arrow is damaged", "{in}/damaged.arrow"),
    (3, "noise.arrow is damaged", "{in}/noise.arrow"),
    (3, "cut.txt.gz is damaged", "{in}/cut.txt.gz"),
    (3, "sum.txt.gz is damaged", "{in}/sum.txt.gz"),
    (3, "cut.txt.xz is damaged", "{in}/cut.txt.xz"),
    (3, "noise.txt.xz is damaged", "{in}/noise.txt.xz"),
    (3, "cut.txt.bz2 is damaged", "{in}/cut.txt.bz2"),
    (3, "cut.txt.zst is damaged", "{in}/cut.txt.zst"),
    (3, "noise.txt.zst is damaged", "{in}/noise.txt.zst"),
    (3, "cut.tar/a.txt is damaged", "{in}/cut.tar"),
    (3, "latin1.tar/b.txt: not UTF-8", "{in}/latin1.tar"),
    (3, "has no split nothing (it has: train)", "{in}/saved@nothing"),
    (3, "no text in field 'text' (found: input_ids", "{data}"),
    (3, "fewer documents than 4 shards", "{in}/good.txt --shard 2/4"),
    (2, "--document: expected file, line, blank-line or separator:REGEX, got 'pages'", "{in}/good.txt --document pages"),
    (2, "not a regular expression", "{in}/good.txt --document separator:("),
    (2, "matches the empty string", "{in}/good.txt --document separator:x*"),
    (2, "the first of N shards is 1/N", "{in}/good.txt --shard 0/4"),
    (2, "the first of N shards is 1/N", "{in}/good.txt --shard 5/4"),
    (2, "expected I/N", "{in}/good.txt --shard four"),
    (2, "--resume cannot be combined with standard input", "- --resume"),
    (2, "--format: expected arrow, hdf5 or jsonl, got 'xml'", "{in}/good.txt --format xml"),
    (2, "--encoding-errors: expected strict, replace or skip, got 'ignore'", "{in}/good.txt --encoding-errors ignore"),
    (2, "--test-fraction: expected less than 1, got 1", "{in}/good.txt --test-fraction 1"),
    (2, "--num-workers: expected at least 1, got 0", "{in}/good.txt --num-workers 0"),
    (2, "--stride 17 is larger than --sequence-length 16", "{in}/good.txt --stride 17"),
    (2, "is a file", "{in}/good.txt --out {in}/good.txt"),
    (2, "is not empty", "{in}/good.txt --out {in}"),
    (2, "is not empty", "{in}/good.txt --out {in} --resume"),
    (2, "contains no pregenerate.json", "{in}/good.txt --out {in} --overwrite"),
    (4, "no tiktoken vocabulary 'nothing'", "{in}/good.txt --tokenizer tiktoken:nothing"),
    (4, "HF_HUB_OFFLINE", "{in}/good.txt --tokenizer no-such-tokenizer"),
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("in")
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})})
    saved.save_to_disk(str(root / "saved"))
    return root


@pytest.mark.parametrize(("code", "part", "line"), BAD)
def test_bad_data_has_its_code_and_one_clear_message(
    cli: Callable, inputs: Path, data: Path, tokenizer_dir: Path, tmp_path: Path, code: int, part: str, line: str
) -> None:
    places = {"in": inputs, "data": data}
    arguments = [word.format(**places) for word in line.split()]
    for name, value in (("--tokenizer", tokenizer_dir), ("--out", tmp_path / "out"), ("--sequence-length", 16)):
        if name not in arguments:
            arguments += [name, str(value)]
    before = sorted(inputs.rglob("*"))
    outcome = cli("pregenerate", *arguments)
    assert outcome.code == code, outcome.err
    assert part.format(**places) in outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert len(re.findall("^error: ", outcome.err, re.MULTILINE)) == 1
    assert outcome.err[outcome.err.index("error: ") :].count("\n") <= 5
    assert list(tmp_path.iterdir()) == []
    assert sorted(inputs.rglob("*")) == before
    reported = cli("pregenerate", *arguments, "--json")
    assert reported.json["error"]["code"] == code
    assert json.dumps(reported.json["error"]["message"])
