"""Datasets whose text is encoded again in another tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome
from tinygpt2 import PregenerateConfig, TrainTokenizerConfig, pregenerate, train_tokenizer
from tinygpt2.data.batches import documents
from tinygpt2.data.corpus import text_splitting
from tinygpt2.data.dataset import Blocks, load_packed_dataset
from tinygpt2.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def other(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tokenizer."""
    out = tmp_path_factory.mktemp("other") / "t"
    train_tokenizer(TrainTokenizerConfig(source=[str(corpus / "03.txt")], vocab_size=290, out=str(out)))
    return out


def text(blocks: Blocks, tokenizer: Path, stride: int | None = None) -> str:
    rows = blocks.batch(range(len(blocks))).input_ids.tolist()
    ids = [token for row in rows[:-1] for token in row[:stride]] + rows[-1]
    return load_tokenizer(str(tokenizer)).decode(ids)


@pytest.mark.parametrize("options", [{}, {"stride": 24}, {"format": "jsonl"}])
def test_the_text_stays_and_the_splits_too(
    corpus: Path, tokenizer_dir: Path, other: Path, tmp_path: Path, options: dict
) -> None:
    common = {"sequence_length": 32, "test_fraction": 0.2}
    sources = [str(corpus / f"{number:02}.txt") for number in range(10)]
    first = PregenerateConfig(
        source=sources, tokenizer=str(tokenizer_dir), out=str(tmp_path / "a"), **common, **options
    )
    pregenerate(first)
    again = PregenerateConfig(
        from_dataset=str(tmp_path / "a"), tokenizer=str(other), out=str(tmp_path / "b"), sequence_length=32
    )
    pregenerate(again)
    old, new = (load_packed_dataset(str(tmp_path / name)) for name in "ab")
    for name in ("train", "test"):
        whole = text(getattr(old, name), tokenizer_dir, options.get("stride"))
        found = text(getattr(new, name), other)
        assert len(found) > 0.9 * len(whole)
        assert whole.startswith(found.rstrip("\ufffd"))
    assert new.manifest["sources"] == [str(tmp_path / "a")]
    assert new.manifest["split"] == "source"


def test_a_dataset_without_a_test_split_stays_so(
    corpus: Path, tokenizer_dir: Path, other: Path, tmp_path: Path
) -> None:
    options = {"sequence_length": 32, "test_fraction": 0, "append_eos": False}
    common = {"source": [str(corpus / "00.txt")], "tokenizer": str(tokenizer_dir), "out": str(tmp_path / "a")}
    pregenerate(PregenerateConfig(**common, **options))
    pregenerate(
        PregenerateConfig(
            from_dataset=str(tmp_path / "a"), tokenizer=str(other), out=str(tmp_path / "b"), sequence_length=32
        )
    )
    assert len(load_packed_dataset(str(tmp_path / "b")).test) == 0


def test_wrong_options(cli: Callable[..., Outcome], data: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    given = ("pregenerate", "--tokenizer", tokenizer_dir, "--out", tmp_path / "d")
    for options, code, message in (
        ((), 2, "give a SOURCE, or --from-dataset"),
        (("--from-dataset", data, "text.txt"), 2, "cannot be combined with a SOURCE"),
        (("--from-dataset", tmp_path / "none"), 3, "no such dataset"),
        (("--from-dataset", data, "--test-fraction", 0.1), 2, "--test-fraction 0.1 has no effect on --from-dataset"),
        (
            ("--from-dataset", data, "--prompt-column", "q", "--response-column", "a"),
            2,
            "--prompt-column q has no effect",
        ),
    ):
        outcome = cli(*given, *options)
        assert (outcome.code, message in outcome.err) == (code, True), outcome.err


def test_documents_end_with_their_shards(corpus: Path, tokenizer_dir: Path, other: Path, tmp_path: Path) -> None:
    common = {"tokenizer": str(tokenizer_dir), "sequence_length": 32, "test_fraction": 0}
    texts = []
    for number in (1, 2):
        out = tmp_path / "shards" / str(number)
        files = [str(corpus / name) for name in ("00.txt", "01.txt")]
        how = {"source": files, "shard": f"{number}/2", "append_eos": False}
        pregenerate(PregenerateConfig(**common, **how, out=str(out)))
        texts.append(text(load_packed_dataset(str(out)).train, tokenizer_dir))
    pregenerate(PregenerateConfig(
        from_dataset=str(tmp_path / "shards"), tokenizer=str(other), out=str(tmp_path / "b"), sequence_length=32,
    ))  # fmt: skip
    found = text(load_packed_dataset(str(tmp_path / "b")).train, other)
    assert found.startswith(f"{texts[0]}<|endoftext|>{texts[1][:20]}")


@pytest.mark.parametrize("longest", [7, 40])
def test_long_documents_are_read_in_parts(
    longest: int, tokenizer_dir: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With characters of several tokens, so that parts cannot begin anywhere."""
    file, common = tmp_path / "long.txt", {"sequence_length": 32, "test_fraction": 0}
    file.write_text("naïve 日本 the cat 🙂 sat. " * 40, encoding="utf-8")
    pregenerate(PregenerateConfig(source=[str(file)], tokenizer=str(other), out=str(tmp_path / "a"), **common))
    monkeypatch.setattr(text_splitting, "LEAST_PART", 9)
    found = []
    for name, limit in (("whole", 10**6), ("parts", longest)):
        monkeypatch.setattr(documents, "_LONG", limit)
        out = tmp_path / name
        pregenerate(
            PregenerateConfig(
                from_dataset=str(tmp_path / "a"), tokenizer=str(tokenizer_dir), out=str(out), sequence_length=32
            )
        )
        found.append(load_packed_dataset(str(out)).content)
    assert found[0] == found[1]
