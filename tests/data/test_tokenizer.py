from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from tinygpt2 import TrainTokenizerConfig, train_tokenizer
from tinygpt2.data.encoding import Encoder, encode, parsed, reproduce
from tinygpt2.data.tokenizer import (
    GPT2_PATTERN,
    convert_tiktoken,
    encoded_size,
    fingerprint,
    has_tokenizer,
    load_tokenizer,
    vocabulary_size,
)
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


def small_bpe(letters: str = "", **model: object) -> Tokenizer:
    """A byte-level BPE with two merges: the end of text, all bytes (or the given letters), th and the."""
    alphabet = sorted(letters or pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet, "th", "the"])}
    backend = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")], **model))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def test_fingerprints_of_plain_byte_level_bpe_never_change(shared_data: Path) -> None:
    assert fingerprint(wrapped(small_bpe())) == "aad5ea309f2df71699817ec9d0b77efbc85cda8d209c38ddf8d47d0dfb579325"
    gpt2 = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    assert fingerprint(gpt2) == "109c7a980808bcc56f59f823c92e2653d3f046fa72138be62d248b9166114f89"


def unigram(score: float) -> Tokenizer:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", score)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


def word_piece(prefix: str = "##", unknown: str = "[UNK]", longest: int = 100) -> Tokenizer:
    vocabulary = {"[UNK]": 0, "?": 1, "a": 2, "##b": 3, "@@b": 4}
    backend = Tokenizer(
        models.WordPiece(
            vocabulary, unk_token=unknown, continuing_subword_prefix=prefix, max_input_chars_per_word=longest
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def added(**how: object) -> Tokenizer:
    from tokenizers import AddedToken

    backend = small_bpe()
    backend.add_tokens([AddedToken("covid19", **how)])
    return backend


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: unigram(-1.5), lambda: unigram(-9.0)),
        (word_piece, lambda: word_piece(prefix="@@")),
        (word_piece, lambda: word_piece(unknown="?")),
        (word_piece, lambda: word_piece(longest=1)),
        (small_bpe, lambda: small_bpe(ignore_merges=True)),
        (small_bpe, lambda: small_bpe(byte_fallback=True)),
        (small_bpe, lambda: small_bpe(dropout=0.1)),
        (lambda: small_bpe("abeht"), lambda: small_bpe("abeht", unk_token="a")),
        (lambda: added(single_word=False), lambda: added(single_word=True)),
        (lambda: added(special=True), lambda: added(special=False)),
    ],
)  # fmt: skip
def test_whatever_changes_an_encoding_changes_the_fingerprint(one: Callable, other: Callable) -> None:
    assert fingerprint(wrapped(one())) == fingerprint(wrapped(one()))
    assert fingerprint(wrapped(one())) != fingerprint(wrapped(other()))


def test_sizes_of_a_vocabulary_with_holes_and_special_tokens() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 5, "b": 9}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert (len(tokenizer), vocabulary_size(tokenizer), encoded_size(tokenizer)) == (3, 10, 10)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert vocabulary_size(tokenizer) > 10 or tokenizer.pad_token_id < 10
    tokenizer = wrapped(small_bpe())
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert (vocabulary_size(tokenizer), encoded_size(tokenizer)) == (260, 259)
    tokenizer.add_tokens(["covid19"])
    assert (vocabulary_size(tokenizer), encoded_size(tokenizer)) == (261, 261)
    unknown_last = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 5}, unk_token="[UNK]"))
    assert encoded_size(PreTrainedTokenizerFast(tokenizer_object=unknown_last, unk_token="[UNK]")) == 6


def lowercase(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


def split_digits(backend: Tokenizer) -> None:
    pattern = Regex(r"\p{N}| ?\p{L}+|[^\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def prefix_space(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def start_token(backend: Tokenizer) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )


def no_merging(backend: Tokenizer) -> None:
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("!", 0, 1)])


@pytest.mark.parametrize("change", [lowercase, split_digits, prefix_space, start_token, no_merging])
@pytest.mark.parametrize("kind", [GPT2TokenizerFast, PreTrainedTokenizerFast])
def test_what_tokenizer_json_says_is_encoded_and_saved(change: Callable, kind: type, tmp_path: Path) -> None:
    backend = small_bpe()
    change(backend)
    kind(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text('{"model_type": "gpt2"}')
    stored = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path / "a"))
    ours.save_pretrained(tmp_path / "b")
    copies = [ours, load_tokenizer(str(tmp_path / "b")), AutoTokenizer.from_pretrained(tmp_path / "b")]
    text = "THE the 123 the\n !  é!"
    for tokenizer in copies:
        assert tokenizer(text)["input_ids"] == stored.encode(text).ids
        assert encode(tokenizer, [text]) == [stored.encode(text, add_special_tokens=False).ids]
        assert tokenizer.decode(stored.encode(text).ids) == stored.decode(stored.encode(text).ids, False)
        assert tokenizer.eos_token == "<|endoftext|>"
    assert len({fingerprint(tokenizer) for tokenizer in copies}) == 1


@pytest.mark.parametrize("names", [{}, {"bos_token": "</s>", "eos_token": "</s>"}])
@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
def test_no_token_is_added_that_no_file_names(names: dict, file: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = legacy_layout(tokenizer_dir, tmp_path / "t")
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps({"</s>": vocabulary.pop("<|endoftext|>"), **vocabulary}))
    (folder / file).write_text(json.dumps(names))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = load_tokenizer(str(folder))
    assert (len(tokenizer), tokenizer.special_tokens_map) == (320, names)
    tokenizer.save_pretrained(tmp_path / "copy")
    assert load_tokenizer(str(tmp_path / "copy")).get_vocab() == tokenizer.get_vocab()
    (folder / file).write_text(json.dumps({**names, "pad_token": "[PAD]"}))  # this one is named
    assert load_tokenizer(str(folder)).pad_token_id == 320


VOCAB_TXT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "c", "你"]


def test_berts_vocabulary_is_read_and_saved(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB_TXT) + "\n", encoding="utf-8")
    assert has_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match=r"GPT2Tokenizer from vocab.txt\) has no vocabulary[\s\S]*BertTokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert encode(tokenizer, ["AB c 你x"]) == [[5, 6, 7, 8, 1]]
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = load_tokenizer(str(tmp_path / "copy"))
    assert (fingerprint(copy), encode(copy, ["AB c 你x"])) == (fingerprint(tokenizer), [[5, 6, 7, 8, 1]])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    ("name", "file"), [("T5Tokenizer", "spiece.model"), ("XLMRobertaTokenizer", "sentencepiece.bpe.model")]
)
def test_models_of_sentencepiece_are_read_and_saved(kind: str, name: str, file: str, tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    options = {"vocab_size": 30, "model_type": kind, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "m"), **options
    )
    folder = tmp_path / "t"
    folder.mkdir()
    shutil.copy(tmp_path / "m.model", folder / file)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    assert has_tokenizer(folder)
    tokenizer, plain = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    ids = plain("the quick fox", add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, ["the quick fox"]) == [ids]
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = load_tokenizer(str(tmp_path / "copy"))
    assert (fingerprint(copy), encode(copy, ["the quick fox"])) == (fingerprint(tokenizer), [ids])


@pytest.mark.parametrize("name", ["ByT5Tokenizer", "BertJapaneseTokenizer"])
def test_what_has_no_fast_version_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB_TXT), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(ModelError, match=rf"{name} from vocab\.txt"):
        load_tokenizer(str(tmp_path))


def test_code_of_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB_TXT), encoding="utf-8")
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"Own from vocab\.txt"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["[]", "{", '{"bos_token": "\\ud800"}', '{"added_tokens_decoder": 3}', "\x00"])
def test_settings_that_are_no_settings_are_errors(content: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"cannot load the tokenizer .*tokenizer\.json\)"):
        load_tokenizer(str(tmp_path / "t"))


def test_lost_text_is_shown(tmp_path: Path) -> None:
    wrapped(small_bpe("".join(sorted(set("Helo,wrdthabcé'ĠĊ"))))).save_pretrained(tmp_path / "a")
    with pytest.raises(
        ModelError, match=r"without the whole byte alphabet: .* for 226 bytes and loses text: .* becomes"
    ):
        load_tokenizer(str(tmp_path / "a"))
    backend = small_bpe()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    wrapped(backend).save_pretrained(tmp_path / "b")
    with pytest.raises(ModelError, match=r'loses text: "Hello, world.*becomes "Hello,world'):
        load_tokenizer(str(tmp_path / "b"))
    lowercase(backend)  # a normalizer changes text by design
    wrapped(backend).save_pretrained(tmp_path / "c")
    assert load_tokenizer(str(tmp_path / "c"))


def test_a_text_without_tokens_is_an_error_of_the_tokenizer(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert encode(tokenizer, ["a b"]) == [[0, 1]]
    for engine in (lambda text: encode(tokenizer, [text]), Encoder(tokenizer).whole):
        with pytest.raises(ModelError, match="cannot encode a text"):
            engine("a c")
