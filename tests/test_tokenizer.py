from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tinygpt2 import TrainTokenizerConfig, train_tokenizer
from tinygpt2.errors import ConfigError, DataError, ModelError
from tinygpt2.tokenizer import batches, encode, encode_all, fingerprint, load_tokenizer

TEXTS = ["the cat sat", "", " 你好 🙂\n\n", "naïve <|endoftext|> x", "a" * 300]


def test_the_size_is_exact_and_plain_transformers_opens_it(tokenizer_dir: Path) -> None:
    plain = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    assert len(plain) == 320
    assert plain.eos_token == plain.bos_token == "<|endoftext|>"
    for text in TEXTS:
        assert plain.decode(plain(text)["input_ids"]) == text


def test_encoding_is_the_tokenizers_own(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    plain = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    expected = plain(TEXTS, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert encode(tokenizer, TEXTS) == expected
    assert plain.eos_token_id not in {token for ids in expected for token in ids}


def test_worker_processes_change_nothing(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    texts = [f"{index} the cat" for index in range(50)]
    one = list(encode_all(tokenizer, batches(texts, size=3)))
    assert [text for text, _ in one] == texts
    assert list(encode_all(tokenizer, batches(texts, size=3), workers=2)) == one


def test_batches_bound_count_and_characters() -> None:
    assert list(batches(["a"] * 5, size=2)) == [["a", "a"], ["a", "a"], ["a"]]
    assert list(batches(["aaa", "b", "c"], size=9, characters=3)) == [["aaa"], ["b", "c"]]


def legacy_layout(tokenizer_dir: Path, out: Path) -> Path:
    model = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    out.mkdir()
    (out / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return out


def test_vocab_and_merges_alone_are_the_same_tokenizer(tokenizer_dir: Path, tmp_path: Path) -> None:
    legacy = load_tokenizer(str(legacy_layout(tokenizer_dir, tmp_path / "legacy")))
    modern = load_tokenizer(str(tokenizer_dir))
    assert len(legacy) == 320
    assert encode(legacy, TEXTS) == encode(modern, TEXTS)
    assert fingerprint(legacy) == fingerprint(modern)


def test_gpt2s_own_files(shared_data: Path) -> None:
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    assert len(tokenizer) == 50257
    assert tokenizer.eos_token_id == 50256
    assert encode(tokenizer, ["Hello world"]) == [[15496, 995]]


@pytest.mark.parametrize("fault", ["empty vocabulary", "no merges", "not json", "nothing"])
def test_an_unusable_tokenizer_never_passes(tokenizer_dir: Path, tmp_path: Path, fault: str) -> None:
    folder = legacy_layout(tokenizer_dir, tmp_path / "t")
    if fault == "empty vocabulary":
        (folder / "vocab.json").write_text("{}")
        (folder / "merges.txt").write_text("#version: 0.2\n")
    elif fault == "no merges":
        (folder / "merges.txt").unlink()
    elif fault == "not json":
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{")
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    with pytest.raises(ModelError):
        load_tokenizer(str(folder))


def test_training_refuses_what_it_cannot_do(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer than --vocab-size 50000"):
        train_tokenizer(TrainTokenizerConfig(source=[str(corpus)], vocab_size=50000, out=str(tmp_path / "a")))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(TrainTokenizerConfig(source=[str(tmp_path / "empty.txt")], out=str(tmp_path / "b")))
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match="not empty"):
        train_tokenizer(TrainTokenizerConfig(source=[str(corpus)], vocab_size=300, out=str(corpus)))
