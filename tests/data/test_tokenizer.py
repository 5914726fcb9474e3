from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tiktoken
from transformers import AutoTokenizer

from tinygpt2 import TrainTokenizerConfig, train_tokenizer
from tinygpt2.data.encoding import Encoder, encode, parsed, reproduce
from tinygpt2.data.tokenizer import GPT2_PATTERN, convert_tiktoken, fingerprint, load_tokenizer
from tinygpt2.errors import ConfigError, DataError, ModelError

TEXTS = ["the cat sat", "", " 你好 🙂\n\n", "naïve <|endoftext|> x", "a" * 300]


def test_the_size_is_exact_and_plain_transformers_opens_it(tokenizer_dir: Path) -> None:
    plain = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    assert len(plain) == 320
    assert plain.eos_token == plain.bos_token == "<|endoftext|>"
    for text in TEXTS:
        assert plain.decode(plain(text)["input_ids"]) == text


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


def test_bytes_per_token_are_measured_on_text_that_was_held_out(tmp_path: Path) -> None:
    file = tmp_path / "zh.txt"
    file.write_text("\n".join(f"{index} 红楼梦 西游记 水浒传 三国演义 " * 30 for index in range(300)), encoding="utf-8")
    made = train_tokenizer(
        TrainTokenizerConfig(source=[str(file)], vocab_size=400, out=str(tmp_path / "t"), test_fraction=0.2)
    )
    assert made.bytes == file.stat().st_size
    assert 0.05 < made.test_bytes / made.bytes < 0.4
    assert made.bytes_per_token is not None
    assert 3 < made.bytes_per_token < 20
    none = train_tokenizer(
        TrainTokenizerConfig(source=[str(file)], vocab_size=400, out=str(tmp_path / "u"), test_fraction=0)
    )
    assert (none.test_bytes, none.bytes_per_token) == (0, None)


CL100K = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""


def test_tiktokens_vocabularies_become_the_same_tokenizer(tokenizer_dir: Path, corpus: Path) -> None:
    ranks = reproduce(parsed(load_tokenizer(str(tokenizer_dir)).backend_tokenizer.to_str()))
    assert ranks
    texts = [
        *TEXTS,
        "x 12345  \n\n  y's 'S\r\n  end  ",
        "a\n \n\t",
        *(file.read_text(encoding="utf-8") for file in corpus.iterdir()),
    ]
    for pattern in (GPT2_PATTERN, CL100K):
        special = {"<|endoftext|>": 330, "<|fim|>": 333}
        encoding = tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        tokenizer = convert_tiktoken(encoding)
        assert (len(tokenizer), tokenizer.eos_token_id) == (334, 330)
        assert encode(tokenizer, texts) == [encoding.encode_ordinary(text) for text in texts]
        assert tokenizer.decode(encode(tokenizer, texts[:1])[0]) == texts[0]


def test_tiktokens_gpt2_is_gpt2s_own(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for source, name in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        kept_as = hashlib.sha1((base + name).encode()).hexdigest()
        shutil.copy(shared_data / "tokenizers" / "gpt2" / source, tmp_path / kept_as)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    ours, original = (load_tokenizer(name) for name in ("tiktoken:gpt2", str(shared_data / "tokenizers" / "gpt2")))
    assert ours.get_vocab() == original.get_vocab()
    assert encode(ours, TEXTS) == encode(original, TEXTS)
    assert Encoder(ours).reproduced


def test_a_tiktoken_vocabulary_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no tiktoken vocabulary 'nothing'"):
        load_tokenizer("tiktoken:nothing")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="TIKTOKEN_CACHE_DIR"):
        load_tokenizer("tiktoken:o200k_base")
