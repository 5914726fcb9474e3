from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest

from tinygpt2.dataset import Shuffle, check_dataset, load_packed
from tinygpt2.errors import DataError


def test_batches_are_the_stored_blocks(data: Path) -> None:
    packed, plain = load_packed(str(data)), datasets.load_from_disk(str(data))
    assert (packed.sequence_length, packed.vocab_size) == (32, 320)
    for name, blocks in (("train", packed.train), ("test", packed.test)):
        assert blocks.batch(range(len(blocks))).tolist() == plain[name]["input_ids"][:]
    assert packed.train.batch([3, 1, 3]).tolist() == [plain["train"][i]["input_ids"] for i in (3, 1, 3)]


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
        ("counts", "sequences"), ("tokenizer", "fingerprint"), ("length", "blocks of 32"), ("truncated", "cannot open"),
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
        bad = datasets.Dataset.from_dict(
            {"input_ids": [[400] * 32]},
            features=datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"), length=32)}),
        )
        datasets.DatasetDict({"train": bad, "test": bad}).save_to_disk(str(tmp_path / "bad"))
        for split in ("train", "test"):
            shutil.rmtree(path / split)
            shutil.copytree(tmp_path / "bad" / split, path / split)
    elif fault == "truncated":
        arrow = next((path / "train").glob("*.arrow"))
        arrow.write_bytes(arrow.read_bytes()[:100])
    elif fault == "no tokenizer":
        shutil.rmtree(path / "tokenizer")
    (path / "pregenerate.json").write_text(json.dumps(manifest))
    if fault == "no manifest":
        (path / "pregenerate.json").unlink()
    assert part in " ".join(check_dataset(path))


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such dataset"):
        load_packed(str(tmp_path / "x"))
    with pytest.raises(DataError, match="no pregenerated dataset"):
        load_packed(str(tmp_path))
