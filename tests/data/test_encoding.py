"""Tokens are the tokenizer's own, by whichever engine; order never depends on threads."""

from __future__ import annotations

import json
import lzma
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer

from tinygpt2.data.corpus.formats import ReadOptions
from tinygpt2.data.corpus.readers import read_stream
from tinygpt2.data.corpus.text_splitting import LEAST_PART
from tinygpt2.data.encoding import Encoder, encode, in_order, merge_ends, reproduce
from tinygpt2.data.tokenizer import load_tokenizer

TEXTS = [
    "the cat sat",
    "",
    " 你好 🙂\n\n",
    "naïve <|endoftext|> x",
    "a" * 300,
    "it's we'LL 12 3½ \u3000\r\n\t x  ",
    "e\u0301\u200d",
    "a\uffff  b\uffff",
    *("\n" * i + " " * j + end for i in range(4) for j in range(4) for end in ("x", "7", ".", "\u3000\u3000é", "")),
]
CORPORA = [
    "corpus/tinyshakespeare.txt", "corpus/novels-valid/Doyle_Hound_1902.txt", "corpus/novels-valid/Hardy_Madding_1874.txt",
    "corpus/tinystories-1000.jsonl", "corpus/openwebtext-900.jsonl", "corpus/us-speeches.jsonl", "corpus/enwiki-slice.xml.xz",
    "corpus/enwiki-slice.text8-style.txt", "lambada/lambada_test.jsonl", "ptb/valid.txt", "wikitext-2/valid.txt",
    "wikitext-2/wiki.test.raw", "wikitext-103/wiki.valid.tokens", "zh/hongloumeng.txt", "zh/xiyouji.txt", "zh/shuihuzhuan.txt",
    "zh/sanguoyanyi.txt", "zh/tang-poems.txt.xz", "zh/wikipedia-simplified.txt", "zh/wikipedia-traditional.txt",
]  # fmt: skip


def reference(directory: Path, texts: list[str]) -> list[list[int]]:
    plain = AutoTokenizer.from_pretrained(str(directory))
    return plain(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.fixture(scope="module")
def encoder(tokenizer_dir: Path) -> Encoder:
    return Encoder(load_tokenizer(str(tokenizer_dir)))


def test_encoding_is_the_tokenizers_own(tokenizer_dir: Path, encoder: Encoder) -> None:
    expected = reference(tokenizer_dir, TEXTS)
    assert encoder.reproduced
    assert [ids.tolist() for ids in encoder(TEXTS)] == encode(load_tokenizer(str(tokenizer_dir)), TEXTS) == expected
    assert 0 not in {token for ids in expected for token in ids}  # the end of text is never read from a text


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=60)
    | st.text("aet hs'd12 \n\t.\u3000\x85\x1c\uffff", max_size=60)
)
def test_any_text_has_the_tokenizers_own_tokens(encoder: Encoder, text: str) -> None:
    assert encoder([text])[0].tolist() == encoder._backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", [r"\p{L}", r"\p{N}", r"\s"])
def test_both_engines_know_the_same_letters_numbers_and_spaces(kind: str) -> None:
    every = "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    single = {bytes([byte]): byte for byte in range(256)}
    one = tiktoken.Encoding("kind", pat_str=kind, mergeable_ranks=single, special_tokens={})
    others = Split(Regex(kind), "removed").pre_tokenize_str(every)
    found = one.decode(one.encode_ordinary(every))  # what the pattern does not match is no token
    assert set(found) == set(every) - set("".join(text for text, _ in others))
    assert found


@pytest.mark.parametrize(
    "text", [" " * 1_000_000 + "x", " \n" * 300_000, "a" * 500_000, "\u3000" * 600_000 + ".", "\uffff" + " " * 500_000]
)
def test_long_runs_of_one_kind(encoder: Encoder, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert encoder([text])[0].tolist() == encoder._backend.encode(text, add_special_tokens=False).ids
    assert capfd.readouterr().err == ""


def test_a_document_in_parts_has_the_tokens_of_the_whole(encoder: Encoder, tmp_path: Path) -> None:
    text = ("the cat's  12 dogs\n\n\tran 日本 naïve\u3000red.\x1c \r\n" * 20_000) + "x" * 400_000 + " \n\n end"
    file = tmp_path / "long.txt"
    file.write_bytes(text.encode())
    with file.open("rb") as stream:
        parts = list(read_stream(stream, "long.txt", ReadOptions()))
    assert "".join(part for part, _ in parts) == text
    assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) > 3
    assert min(len(part) for part, last in parts if not last) >= LEAST_PART
    assert np.concatenate(encoder([part for part, _ in parts])).tolist() == encoder([text])[0].tolist()


@pytest.mark.parametrize(
    "text", ["", "the cat's \n 12 dogs\u3000\x1c red. " * 30_000, "a" * 600_000 + "  b", " " * 600_000]
)
def test_a_long_text_is_encoded_as_the_whole(encoder: Encoder, text: str) -> None:
    assert encoder.whole(text).tolist() == encoder([text])[0].tolist()


@pytest.mark.parametrize(
    "change",
    [
        "prefix space",
        "normaliser",
        "merge order",
        "merge missing",
        "other pre-tokeniser",
        "added token",
        "no byte",
        "unigram",
    ],
)
def test_what_tiktoken_would_encode_otherwise_is_left_to_tokenizers(tokenizer_dir: Path, change: str) -> None:
    backend = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    assert reproduce(backend) is not None
    model = backend["model"]
    if change == "prefix space":
        backend["pre_tokenizer"]["add_prefix_space"] = True
    elif change == "normaliser":
        backend["normalizer"] = {"type": "NFC"}
    elif change == "merge order":
        model["merges"][3], model["merges"][9] = model["merges"][9], model["merges"][3]
    elif change == "merge missing":
        del model["merges"][5]
    elif change == "other pre-tokeniser":
        backend["pre_tokenizer"] = {"type": "Whitespace"}
    elif change == "added token":
        backend["added_tokens"].append({**backend["added_tokens"][0], "id": 320, "content": "cat", "special": False})
    elif change == "no byte":
        model["vocab"]["!!!"] = model["vocab"].pop("!")
    else:
        model["type"] = "Unigram"
    assert reproduce(backend) is None


def test_a_merge_that_lower_ranks_undo_is_found() -> None:
    single = {bytes([byte]): byte for byte in range(256)}
    # "abc" listed as a + bc, but ab has the lower rank: tiktoken would make ab + c
    ranks = {**single, b"ab": 256, b"bc": 257, b"abc": 258}
    assert merge_ends(b"abc", 258, ranks) == [2, 3]
    assert merge_ends(b"abcd", 300, ranks) == [3, 4]


def test_merges_are_never_left_out_at_random(tokenizer_dir: Path) -> None:
    plain, random = load_tokenizer(str(tokenizer_dir)), load_tokenizer(str(tokenizer_dir))
    random.backend_tokenizer.model.dropout = 0.9
    text = "the cat sat on the mat " * 20
    assert len(random.backend_tokenizer.encode(text).ids) > len(encode(plain, [text])[0])
    assert encode(random, [text]) == encode(plain, [text])
    assert Encoder(random)([text])[0].tolist() == encode(plain, [text])[0]


def test_a_tokenizer_of_another_kind_falls_back(tokenizer_dir: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert not encoder.reproduced
    assert [ids.tolist() for ids in encoder(["the cat", "dog the"])] == [[0, 1], [2, 0]]


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_few_wait(workers: int) -> None:
    asked = []

    def items() -> object:
        for index in range(40):
            asked.append(index)
            yield index

    def work(index: int) -> int:
        time.sleep(0.003 * (index % 3))
        return index * index

    for number, square in enumerate(in_order(work, items(), workers)):
        assert square == number * number
        assert len(asked) - number <= 2 * workers + 2


@pytest.mark.parametrize("name", CORPORA)
def test_every_shared_corpus_has_the_tokenizers_own_tokens(shared_data: Path, name: str) -> None:
    path = shared_data / name
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
    texts = [json.loads(line)["text"] for line in text.splitlines()] if name.endswith("jsonl") else [text]
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    encoder = gpt2_encoder(tokenizer)
    assert np.concatenate(encoder(texts)).tolist() == [token for ids in encode(tokenizer, texts) for token in ids]


_encoders: list[Encoder] = []


def gpt2_encoder(tokenizer: object) -> Encoder:
    if not _encoders:
        _encoders.append(Encoder(tokenizer))
    assert _encoders[0].reproduced
    return _encoders[0]
