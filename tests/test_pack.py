"""Packing against a naive reference; splits, bytes that repeat, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt2 import PregenerateConfig, pregenerate
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.pack import _blocks
from tinygpt2.tokenizer import encode, load_tokenizer


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 12), st.integers(1, 12))
def test_blocks_of_a_stream_in_pieces(sizes: list[int], length: int, stride: int) -> None:
    import numpy as np

    stride = min(stride, length)
    stream = np.arange(sum(sizes), dtype=np.uint16)
    pieces = np.split(stream, np.cumsum(sizes)[:-1]) if sizes else []
    got = [row.tolist() for rows in _blocks(pieces, length, stride) for row in rows]
    assert got == [stream[i : i + length].tolist() for i in range(0, len(stream) - length + 1, stride)]


def pack(out: Path, source: object, tokenizer: Path, **options: object) -> tuple[datasets.DatasetDict, dict]:
    pregenerate(PregenerateConfig(source=str(source), tokenizer=str(tokenizer), out=str(out), **options))
    return datasets.load_from_disk(str(out)), json.loads((out / "pregenerate.json").read_text())


def flat(split: datasets.Dataset) -> list[int]:
    return [token for row in split["input_ids"] for token in row]


def test_documents_go_whole_into_one_split(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    packed, manifest = pack(tmp_path / "d", corpus, tokenizer_dir, sequence_length=16, test_fraction=0.2)
    tokenizer = load_tokenizer(str(tokenizer_dir))
    texts = [file.read_text(encoding="utf-8") for file in sorted(corpus.iterdir())]
    encoded = [[*ids, tokenizer.eos_token_id] for ids in encode(tokenizer, texts)]
    assert manifest["split"] == "document"
    assert manifest["splits"]["test"]["documents"] == round(0.2 * len(texts))
    assert packed["train"].features["input_ids"] == datasets.List(datasets.Value("uint16"), length=16)
    for name in ("train", "test"):
        counts, stream = manifest["splits"][name], flat(packed[name])
        assert len(stream) == 16 * counts["sequences"] == counts["tokens"] - counts["dropped_tokens"]
        assert 0 <= counts["dropped_tokens"] < 16
    whole = {name: "".join(map(chr, stream)) for name, stream in ((n, flat(packed[n])) for n in packed)}
    expected = {name: [] for name in packed}
    for ids in encoded:
        key = "".join(map(chr, ids))[:200]
        expected["test" if key in whole["test"] else "train"].append(ids)
    for name in packed:
        stream = [token for ids in expected[name] for token in ids]
        assert flat(packed[name]) == stream[: len(flat(packed[name]))]
        assert len(stream) == manifest["splits"][name]["tokens"]


def test_a_repeated_document_is_on_one_side_only(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "x.txt"
    lines = [f"the cat {index % 7} sat on the mat" for index in range(70)]
    file.write_text("\n".join(lines))
    _, manifest = pack(tmp_path / "d", file, tokenizer_dir, sequence_length=2, test_fraction=0.05, document="line")
    assert manifest["splits"]["test"]["documents"] == 10
    file.write_text("\n".join(lines[:1] * 20))
    _, manifest = pack(tmp_path / "same", file, tokenizer_dir, sequence_length=2, test_fraction=0.05, document="line")
    assert manifest["split"] == "position"


def test_few_documents_are_split_by_position(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("the cat sat on the mat. " * 200)
    packed, manifest = pack(tmp_path / "d", file, tokenizer_dir, sequence_length=10, test_fraction=0.1)
    assert manifest["split"] == "position"
    tokenizer = load_tokenizer(str(tokenizer_dir))
    stream = [*encode(tokenizer, [file.read_text()])[0], tokenizer.eos_token_id]
    blocks = len(stream) // 10
    held_out = round(0.1 * blocks)
    assert (len(packed["train"]), len(packed["test"])) == (blocks - held_out, held_out)
    assert flat(packed["train"]) + flat(packed["test"]) == stream[: blocks * 10]
    assert manifest["splits"]["test"]["dropped_tokens"] == len(stream) - blocks * 10


def test_stride_overlaps_blocks(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("the cat sat on the mat. " * 50)
    packed, _ = pack(tmp_path / "d", file, tokenizer_dir, sequence_length=10, stride=4, test_fraction=0)
    tokenizer = load_tokenizer(str(tokenizer_dir))
    stream = [*encode(tokenizer, [file.read_text()])[0], tokenizer.eos_token_id]
    assert packed["train"]["input_ids"][:] == [stream[i : i + 10] for i in range(0, len(stream) - 9, 4)]


def test_test_source_and_no_eos(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat. " * 50)
    (tmp_path / "b.txt").write_text("big dog ran. " * 20)
    packed, manifest = pack(
        tmp_path / "d",
        tmp_path / "a.txt",
        tokenizer_dir,
        sequence_length=8,
        test_source=str(tmp_path / "b.txt"),
        append_eos=False,
    )
    assert manifest["split"] == "source"
    assert 0 not in flat(packed["train"]) + flat(packed["test"])
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert tokenizer.decode(flat(packed["test"])).startswith("big dog ran. big")


def test_output_repeats_byte_for_byte(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 1), ("c", 2)):
        pack(tmp_path / name, corpus, tokenizer_dir, sequence_length=16, num_workers=workers)
    trees = [
        {file.relative_to(root): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}
        for root in (tmp_path / "a", tmp_path / "b", tmp_path / "c")
    ]
    assert trees[0] == trees[1] == trees[2]


def test_large_vocabularies_take_int32(shared_data: Path, tmp_path: Path) -> None:
    import numpy as np

    from tinygpt2.pack import _Stream, _write

    stream = _Stream([np.arange(70_000, 70_040, dtype=np.int32)], 1, 1)
    _write(tmp_path / "d", {"train": stream, "test": stream}, 10, 10)
    split = datasets.load_from_disk(str(tmp_path / "d"))["train"]
    assert split.features["input_ids"].feature.dtype == "int32"
    assert split[0]["input_ids"][0] == 70_000


def test_overwrite_replaces_datasets_only(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    pack(out, corpus, tokenizer_dir, sequence_length=16)
    with pytest.raises(ConfigError, match="not empty"):
        pack(out, corpus, tokenizer_dir, sequence_length=8)
    packed, _ = pack(out, corpus, tokenizer_dir, sequence_length=8, overwrite=True)
    assert packed["train"].features["input_ids"].length == 8
    with pytest.raises(ConfigError, match=r"no pregenerate\.json"):
        pack(corpus, corpus, tokenizer_dir, sequence_length=8, overwrite=True)


@pytest.mark.parametrize("content", ["", " \n\n", "short", b"bad \xff utf"])
def test_a_failed_run_leaves_nothing_behind(tmp_path: Path, tokenizer_dir: Path, content: str | bytes) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError):
        pack(tmp_path / "d", file, tokenizer_dir, sequence_length=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.txt"]
