from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import h5py
import numpy as np
import pytest
import torch

from tinygpt2 import PregenerateConfig, PretrainConfig, from_map_style, pregenerate, pretrain
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.data.validation import check_dataset
from tinygpt2.errors import DataError


def test_batches_are_the_stored_blocks(data: Path) -> None:
    packed, plain = load_packed_dataset(str(data)), datasets.load_from_disk(str(data))
    assert (packed.sequence_length, packed.vocab_size) == (32, 320)
    for name, blocks in (("train", packed.train), ("test", packed.test)):
        assert blocks.batch(range(len(blocks))).input_ids.tolist() == plain[name]["input_ids"][:]
    assert packed.train.batch([3, 1, 3]).input_ids.tolist() == [plain["train"][i]["input_ids"] for i in (3, 1, 3)]


def test_every_epoch_is_another_permutation() -> None:
    order = Shuffle(7, seed=1)
    epochs = [order[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert Shuffle(7, seed=1)[5:16] == (epochs[0] + epochs[1] + epochs[2])[5:16]
    assert Shuffle(7, seed=2)[0:7] != epochs[0]


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("counts", "sequences"), ("tokenizer", "fingerprint"), ("length", "the blocks have 32 tokens, but pregenerate.json says 31"), ("truncated", "cannot open"),
        ("vocabulary", "outside the vocabulary"), ("no manifest", "no pregenerate.json"), ("no tokenizer", "no such"),
    ],
)  # fmt: skip
def test_faults_are_found(data: Path, tmp_path: Path, fault: str, part: str) -> None:
    path = tmp_path / "d"
    shutil.copytree(data, path)
    assert list(check_dataset(path)) == []
    manifest = json.loads((path / "pregenerate.json").read_text())
    if fault == "counts":
        manifest["splits"]["test"]["sequences"] += 1
    elif fault == "tokenizer":
        manifest["tokenizer_fingerprint"] = "0" * 64
    elif fault == "length":
        manifest["sequence_length"] = 31
    elif fault == "vocabulary":
        features = datasets.load_from_disk(str(path / "train")).features
        rows = [[400] * 32] * manifest["splits"]["train"]["sequences"]
        bad = datasets.Dataset.from_dict({"input_ids": rows}, features=features)
        shutil.rmtree(path / "train")
        bad.save_to_disk(str(path / "train"))
    elif fault == "truncated":
        arrow = next((path / "train").glob("*.arrow"))
        arrow.write_bytes(arrow.read_bytes()[:100])
    elif fault == "no tokenizer":
        shutil.rmtree(path / "tokenizer")
    (path / "pregenerate.json").write_text(json.dumps(manifest))
    if fault == "no manifest":
        (path / "pregenerate.json").unlink()
    assert part in " ".join(check_dataset(path))


@pytest.fixture(scope="module")
def stored(corpus: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same blocks in all three formats."""
    root, made = tmp_path_factory.mktemp("formats"), {}
    for kind in ("arrow", "hdf5", "jsonl"):
        made[kind] = root / kind
        options = {"sequence_length": 32, "test_fraction": 0.1, "format": kind}
        pregenerate(
            PregenerateConfig(source=str(corpus), tokenizer=str(tokenizer_dir), out=str(root / kind), **options)
        )
    return made


def test_all_formats_hold_the_same_blocks(stored: dict[str, Path]) -> None:
    packed = {kind: load_packed_dataset(str(path)) for kind, path in stored.items()}
    for name in ("train", "test"):
        arrow, hdf5, jsonl = (getattr(packed[kind], name) for kind in ("arrow", "hdf5", "jsonl"))
        tokens = arrow.batch(range(len(arrow)))
        assert tokens.lengths is None
        assert jsonl.batch(range(len(jsonl))).input_ids.tolist() == tokens.input_ids.tolist()
        assert hdf5.batch(range(len(arrow))).input_ids.tolist() == tokens.input_ids.tolist()
        # the tail of the stream, which the others drop, is the last block of HDF5, padded
        counts = packed["arrow"].manifest["splits"][name]
        assert len(hdf5) == len(arrow) + 1
        last = hdf5.batch([len(hdf5) - 1])
        assert last.lengths == [counts["dropped_tokens"]] == hdf5.lengths([len(hdf5) - 1])
        assert not last.input_ids[0, counts["dropped_tokens"] :].any()
        assert len(hdf5.row(len(hdf5) - 1)) == counts["dropped_tokens"]
    manifests = [packed[kind].manifest["splits"]["train"] for kind in ("arrow", "jsonl")]
    assert manifests[0]["files"][0]["sha256"] == manifests[1]["files"][0]["sha256"]


@pytest.mark.parametrize("kind", ["arrow", "hdf5", "jsonl"])
def test_lengths_are_read_once(stored: dict[str, Path], kind: str, tmp_path: Path) -> None:
    folder = shutil.copytree(stored[kind], tmp_path / kind)
    if kind == "jsonl":  # some padding, and a line that is written in another way
        lines = (folder / "train_dataset.json").read_text().splitlines()
        rows = [json.loads(line) for line in lines[:3]]
        for row, length in zip(rows, (3, 32, 30), strict=True):
            row["attention_mask"] = [1] * length + [0] * (32 - length)
        lines[:2] = map(json.dumps, rows[:2])
        lines[2] = json.dumps({"attention_mask": rows[2]["attention_mask"], "input_ids": rows[2]["input_ids"]})
        (folder / "train_dataset.json").write_text("".join(f"{line}\n" for line in lines))
        manifest = json.loads((folder / "pregenerate.json").read_text())
        manifest["splits"]["train"]["padding_tokens"] = 31
        (folder / "pregenerate.json").write_text(json.dumps(manifest))
    blocks = load_packed_dataset(str(folder)).train
    every = blocks.lengths(range(len(blocks)))
    assert every == [len(blocks.row(index)) for index in range(len(blocks))]
    assert blocks.padded == (min(every) < 32)
    for part in blocks.parts:
        part.lengths = None  # type: ignore[assignment]  # nobody asks again
    assert blocks.lengths([1, 0]) == [every[1], every[0]]


def test_json_lines_are_what_tinygpt2_reads(stored: dict[str, Path]) -> None:
    """Its own check, `check_dataset_valid.py`: every line holds both lists, as long as the metrics say."""
    for split in ("train", "test"):
        metrics = json.loads((stored["jsonl"] / f"{split}_metrics.json").read_text())
        rows = [json.loads(line) for line in (stored["jsonl"] / f"{split}_dataset.json").read_text().splitlines()]
        assert len(rows) == metrics["num_examples"] > 0
        for row in rows:
            assert len(row["input_ids"]) == len(row["attention_mask"]) == metrics["max_seq_len"] == 32


def test_hdf5_is_what_cerebras_gpt2_reads(stored: dict[str, Path]) -> None:
    for split in ("train", "test"):
        with h5py.File(stored["hdf5"] / split / "data-00000.h5") as file:
            assert set(file) == {"input_ids", "input_mask"}
            assert file["input_ids"].dtype == file["input_mask"].dtype == np.int32
            assert file["input_ids"].shape == file["input_mask"].shape
            assert not file["input_ids"][:][file["input_mask"][:] == 1].any()


@pytest.mark.parametrize(
    ("kind", "fault", "part"),
    [
        ("arrow", "changed", "data-00000.arrow: its tokens are not the ones that were written"),
        ("hdf5", "changed", "data-00000.h5: its tokens are not the ones that were written"),
        ("jsonl", "changed", "train_dataset.json: its tokens are not the ones that were written"),
        ("hdf5", "truncated", "data-00000.h5"),
        ("jsonl", "truncated", "ends in the middle of line"),
        ("hdf5", "missing", "data-00000.h5"),
        ("jsonl", "missing", "train_dataset.json"),
        ("jsonl", "short", "sequences, but pregenerate.json says"),
        ("jsonl", "row", "train_dataset.json:3: not a block"),
        ("jsonl", "length", "train_dataset.json:3: expected 32 tokens"),
        ("jsonl", "metrics", "num_examples is 7"),
        ("hdf5", "padding", "sequence 2 has padding before its end"),
        ("hdf5", "range", "sequence 2 contains a token outside the vocabulary of 320"),
        ("hdf5", "shape", "input_mask has shape"),
    ],
)  # fmt: skip
def test_faults_of_every_format_are_found(
    stored: dict[str, Path], tmp_path: Path, kind: str, fault: str, part: str
) -> None:
    path = tmp_path / "d"
    shutil.copytree(stored[kind], path)
    assert list(check_dataset(path)) == []
    ending = {"arrow": "arrow", "hdf5": "h5", "jsonl": "json"}[kind]
    file = path / "train_dataset.json" if kind == "jsonl" else path / "train" / f"data-00000.{ending}"
    raw = file.read_bytes()
    if fault == "changed" and kind == "jsonl":
        at = raw.index(b"[") + 1
        file.write_bytes(raw[:at] + (b"2" if raw[at : at + 1] != b"2" else b"3") + raw[at + 1 :])
    elif fault == "changed" and kind == "arrow":
        middle = len(raw) // 2
        file.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
    elif fault == "truncated":
        file.write_bytes(raw[: len(raw) // 2])
    elif fault == "missing":
        file.unlink()
    elif fault == "short":
        file.write_bytes(raw[: raw[:-1].rindex(b"\n") + 1])
    elif fault in ("row", "length"):
        lines = raw.splitlines(keepends=True)
        lines[2] = b"{}\n" if fault == "row" else lines[2].replace(b"[", b"[1, ", 1)
        file.write_bytes(b"".join(lines))
    elif fault == "metrics":
        (path / "train_metrics.json").write_text('{"num_examples": 7, "max_seq_len": 32}')
    else:
        with h5py.File(file, "r+") as opened:
            if fault == "shape":
                opened["input_mask"].resize(5, axis=0)
            else:
                column = "input_mask" if fault == "padding" else "input_ids"
                opened[column][2, 5] = {"changed": 7, "padding": 1, "range": 320}[fault]
    problems = list(check_dataset(path))
    assert part in " ".join(problems)
    assert len(problems) == 1


class Items:
    """A map-style dataset of one's own: rows of 12, the third padded."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = [(index * 7 + step) % 320 for step in range(12)]
        return {"input_ids": ids[:5] + [0] * 7, "input_mask": [0] * 5 + [1] * 7} if index == 2 else {"input_ids": ids}


def test_any_map_style_dataset_trains(tokenizer_dir: Path, tmp_path: Path) -> None:
    packed = from_map_style(Items(20), Items(3), load_tokenizer(str(tokenizer_dir)), "rows")
    assert packed.train.batch([0, 2]).lengths == [12, 5]
    assert packed.train.batch([0, 1]).lengths is None
    whole = packed.train.batch([0, 1, 2])
    assert whole.lengths == packed.train.lengths([0, 1, 2]) == [12, 12, 5]
    assert (whole.part(0, 2).lengths, whole.part(1, 3).lengths) == (None, [12, 5])
    assert whole.part(1, 3).input_ids.tolist() == whole.input_ids[1:].tolist()
    shape = tmp_path / "shape.yaml"
    shape.write_text("{n_layer: 1, n_embd: 16, n_head: 2, n_positions: 12}")
    config = PretrainConfig(
        data="rows", shape=str(shape), out=str(tmp_path / "m"), max_steps=6, learning_rate=0.01, micro_batch_size=4
    )
    made = pretrain(config, packed)
    assert made.steps == 6
    assert made.eval is not None
    assert "rows" in (tmp_path / "m" / "README.md").read_text()
    with pytest.raises(DataError, match="empty"):
        from_map_style([], [], load_tokenizer(str(tokenizer_dir)))
    odd = from_map_style([{"input_ids": [1, -100], "input_mask": [0, 1]}], [], load_tokenizer(str(tokenizer_dir)))
    assert odd.train.batch([0]).input_ids.tolist() == [[1, 0]]


def test_both_masks_and_labels_mean_what_they_mean_elsewhere(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    ids, real, padding = [5, 6, 7, 0], [1, 1, 1, 0], [0, 0, 0, 1]
    rows = [
        {"input_ids": ids, "attention_mask": real},
        {"input_ids": np.array(ids), "attention_mask": np.array(real, bool)},
        {"input_ids": torch.tensor(ids), "input_mask": torch.tensor(padding)},
        {"input_ids": ids, "attention_mask": real, "input_mask": padding, "labels": [5, 6, 7, -100]},
    ]
    contents = set()
    for row in rows:
        packed = from_map_style([row], [row], tokenizer)
        assert packed.train.batch([0]).lengths == [3]
        assert packed.test.row(0).tolist() == [5, 6, 7]
        contents.add(packed.content)
    assert len(contents) == 1
    plain = from_map_style([{"input_ids": ids, "labels": ids}], [], tokenizer)
    assert plain.train.batch([0]).lengths is None
    assert plain.content not in contents


GOOD = {"input_ids": [5, 6, 7, 8]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 6, 7]}, r"input_ids has shape \(3,\), not 4 tokens"),
        ({"input_ids": [5, 6, 7, 320]}, "the token 320 is outside the tokenizer's vocabulary of 320"),
        ({"input_ids": [5, -1, 7, 8]}, "the token -1 is outside"),
        ({"input_ids": [5.5, 6, 7, 8]}, "are not whole numbers"),
        ({"input_ids": "text"}, "has shape"),
        ({"tokens": [5, 6, 7, 8]}, "has no input_ids"),
        ({**GOOD, "attention_mask": [1, 1, 1]}, "attention_mask has shape"),
        ({**GOOD, "attention_mask": [0, 1, 1, 1]}, "has padding before its end"),
        ({**GOOD, "attention_mask": [0, 0, 0, 0]}, "contains only padding"),
        ({**GOOD, "input_mask": [1, 1, 1, 1]}, "contains only padding"),
        ({**GOOD, "attention_mask": [1, 1, 1, 0], "input_mask": [1, 1, 1, 0]}, "contradict each other"),
        ({**GOOD, "labels": [6, 7, 8, 5]}, "labels are neither its input_ids nor -100"),
        ({**GOOD, "attention_mask": [1, 1, 1, 0], "labels": [5, 6, 7, 8]}, "labels are neither its input_ids nor -100"),
    ],
)
def test_an_item_that_is_no_block_is_named(tokenizer_dir: Path, row: dict, message: str) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    for split, (train, test) in {"train": ([GOOD, GOOD, row], []), "test": ([GOOD], [GOOD, GOOD, row])}.items():
        with pytest.raises(DataError, match=message) as error:
            from_map_style(train, test, tokenizer, "mine")
        assert error.value.message.startswith(f"mine: {split}: item 2")


def test_the_content_of_items_decides_their_fingerprint(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    other = {"input_ids": [5, 6, 7, 9]}
    splits = [([GOOD, other], []), ([other, GOOD], []), ([GOOD], [other]), ([other], [GOOD]), ([GOOD, GOOD], [])]
    contents = [from_map_style(train, test, tokenizer).content for train, test in splits]
    assert len(set(contents)) == len(splits)
    assert from_map_style(*splits[0], tokenizer, "another name").content == contents[0]


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such dataset"):
        load_packed_dataset(str(tmp_path / "x"))
    with pytest.raises(DataError, match="is not a pregenerated dataset"):
        load_packed_dataset(str(tmp_path))
