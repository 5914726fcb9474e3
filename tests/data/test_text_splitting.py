"""Long texts: separators at the borders of what is read at a time, texts without white space, and who may cut them."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from tests.data.test_formats import LINES
from tinygpt2 import PregenerateConfig, TrainTokenizerConfig, pregenerate, train_tokenizer
from tinygpt2.data import pregenerate as pregenerate_module
from tinygpt2.data.corpus import formats, piecewise, sources, text_splitting
from tinygpt2.data.corpus.piecewise import joined_pieces, splits_at_white_space
from tinygpt2.data.corpus.sources import Corpus, whole
from tinygpt2.data.encoding import Encoder
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.utils.types import Tokens


def read(path: Path, **options: object) -> list[str]:
    return [piece.text for piece in whole(Corpus([str(path)], **options).pieces())]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(formats, "say", lines.append)
    return lines


@pytest.mark.parametrize(
    "pattern", ["^\n", r"\A\n|^-+\n", "(?m)^(?=#)", r"(?<=\n)\n", "(?m)^-+$\n", r"\n\Z|\n\n", "x(?=b)"]
)
def test_separators_see_the_text_around_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    pick = random.Random(3)
    text = "\n" + "".join(pick.choice(["\n", "\n\n", "# a", "---\n", "word ", "xb", "b"]) for _ in range(5000))
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    for name, value in (("CHUNK", 97), ("_MARGIN", 40), ("LEAST_PART", 60), ("LONGEST_RUN", 200)):
        monkeypatch.setattr(text_splitting, name, value)
    expected = [part for part in re.split(pattern, text) if part.strip()]
    assert read(tmp_path / "x.txt", document=f"separator:{pattern}") == expected


def test_a_text_without_white_space_is_cut_but_stays_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    for name, value in (("CHUNK", 100), ("_MARGIN", 40), ("LEAST_PART", 50), ("LONGEST_RUN", 400)):
        monkeypatch.setattr(text_splitting, name, value)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 3000))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "b" * 3000}) + "\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("c" * 3000 + "\n" + "d" * 10, encoding="utf-8")
    pieces = list(Corpus([str(tmp_path)], "line").pieces())
    assert [piece.text for piece in whole(pieces)] == ["a" * 3000, "b" * 3000, "c" * 3000, "d" * 10]
    assert max(len(piece.text) for piece in pieces) <= 800
    assert len(said) == 1
    assert "more than a million characters without white space" in said[0]


def test_long_white_space_and_long_skipped_documents_stay_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("CHUNK", 100), ("LEAST_PART", 50), ("LONGEST_RUN", 400)):
        monkeypatch.setattr(text_splitting, name, value)
    monkeypatch.setattr(sources, "_BLANK", 4)
    (tmp_path / "a.txt").write_text(" " * 9000, encoding="utf-8")
    pieces = Corpus([str(tmp_path)]).pieces()
    assert len(next(pieces).text) == 400
    assert sum(len(piece.text) for piece in pieces) == 8600
    (tmp_path / "a.txt").write_text("the cat " * 3000, encoding="utf-8")
    corpus = Corpus([str(tmp_path)], errors="skip")
    assert [piece.text for piece in whole(corpus.pieces())] == ["the cat " * 3000]
    (tmp_path / "a.txt").write_bytes(b"the cat " * 3000 + b"\xff")
    assert list(corpus.pieces()) == []
    assert corpus.encoding_errors == 1


def test_a_line_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinygpt2.data.corpus.tables.LONGEST_LINE", 1 << 10)
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"text": "' + b"a" * 2000)
    with pytest.raises(DataError, match=rf"the line at byte {len(LINES)} is longer than"):
        read(tmp_path / "a.jsonl")


BYTES, SPACE, PIECES = pre_tokenizers.ByteLevel, pre_tokenizers.WhitespaceSplit, pre_tokenizers.Sequence
APART = {
    "gpt2": {"pre_tokenizer": BYTES(add_prefix_space=False)},
    "gpt2, normalized": {
        "pre_tokenizer": BYTES(add_prefix_space=False),
        "normalizer": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    },
    "added": {"pre_tokenizer": BYTES(add_prefix_space=False), "added": AddedToken("covid19")},
    "added special": {"pre_tokenizer": BYTES(add_prefix_space=False), "added": AddedToken("a b", special=True)},
    "bert": {"pre_tokenizer": pre_tokenizers.BertPreTokenizer(), "normalizer": normalizers.BertNormalizer()},
    "words": {"pre_tokenizer": pre_tokenizers.Whitespace()},
    "spaces, bytes": {"pre_tokenizer": PIECES([SPACE(), BYTES(add_prefix_space=True, use_regex=False)])},
    "digits, bytes": {"pre_tokenizer": PIECES([pre_tokenizers.Digits(), BYTES(add_prefix_space=False)])},
}
JOINED = {
    "none": {},
    "prefix space": {"pre_tokenizer": BYTES(add_prefix_space=True)},
    "bytes without a pattern": {"pre_tokenizer": BYTES(add_prefix_space=False, use_regex=False)},
    "metaspace": {"pre_tokenizer": pre_tokenizers.Metaspace()},
    "pattern": {"pre_tokenizer": PIECES([pre_tokenizers.Split(Regex(r"\S+\s*"), "isolated"), SPACE()])},
    "strip": {"pre_tokenizer": SPACE(), "normalizer": normalizers.Strip()},
    "prepend": {"pre_tokenizer": SPACE(), "normalizer": normalizers.Sequence([normalizers.Prepend("x")])},
    "added with a space": {"pre_tokenizer": SPACE(), "added": AddedToken("cat sat")},
    "added that strips": {"pre_tokenizer": SPACE(), "added": AddedToken("cat", rstrip=True)},
}


def backend(pre_tokenizer: object = None, normalizer: object = None, added: AddedToken | None = None) -> Tokenizer:
    letters = sorted({*map(chr, range(32, 127)), *BYTES.alphabet()})
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    made = Tokenizer(models.BPE({**vocabulary, "[UNK]": len(vocabulary)}, [], unk_token="[UNK]"))
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_special_tokens([added]) if added and added.special else made.add_tokens([added] if added else [])
    made.encode_special_tokens = True
    return made


@pytest.mark.parametrize("name", APART)
def test_tokenizers_that_encode_parts_as_the_whole(name: str) -> None:
    made = backend(**APART[name])
    assert splits_at_white_space(json.loads(made.to_str()))
    pick = random.Random(4)
    words = ["The", "covid19", "cat", "12", "naïve", "ﬁ", "e\u0301", "!?", "a b", "'s", "\u0301"]
    text = "".join(pick.choice(words) + pick.choice(["", " ", "\n", "  \n", "\n\n\t"]) for _ in range(400))
    cuts = [0, *(match.end() for match in re.finditer(r"\S(?=[ \n])", text)), len(text)]
    parts = [text[start:end] for start, end in pairwise(cuts)]
    ids = [token for part in parts for token in made.encode(part, add_special_tokens=False).ids]
    assert ids == made.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", JOINED)
def test_tokenizers_that_may_not(name: str) -> None:
    assert not splits_at_white_space(json.loads(backend(**JOINED[name]).to_str()))


def test_parts_are_joined_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    for name, value in (("CHUNK", 100), ("LEAST_PART", 50)):
        monkeypatch.setattr(text_splitting, name, value)
    monkeypatch.setattr(piecewise, "LONGEST_WHOLE", 1000)
    (tmp_path / "a.txt").write_text("the cat " * 120, encoding="utf-8")
    assert [len(piece.text) for piece in joined_pieces(Corpus([str(tmp_path)]), "mine")] == [960]
    assert said == []
    (tmp_path / "b.txt").write_text("the dog " * 1200, encoding="utf-8")
    pieces = list(joined_pieces(Corpus([str(tmp_path)]), "mine"))
    assert [piece.text for piece in whole(pieces)] == ["the cat " * 120, "the dog " * 1200]
    assert all(800 < len(piece.text) <= 1000 for piece in pieces[:-1])
    assert len(said) == 1
    assert "the tokenizer mine may encode the places" in said[0]


@pytest.mark.parametrize("kind", ["own", "prefix space"])
def test_pregenerate_counts_empty_documents_and_never_joins_a_long_one_whole(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], kind: str
) -> None:
    for name, value in (("CHUNK", 1000), ("LEAST_PART", 500), ("LONGEST_RUN", 4000)):
        monkeypatch.setattr(text_splitting, name, value)
    monkeypatch.setattr(piecewise, "LONGEST_WHOLE", 5000)
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 4000, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(gzip.compress(b"a" * 50_000))
    (tmp_path / "c.jsonl").write_bytes(b'{"text": null}\n{"text": " "}\n' + LINES)
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, tokenizer)
    if kind == "prefix space":
        content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
        content["pre_tokenizer"]["add_prefix_space"] = True
        (tokenizer / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        settings = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings["tokenizer_class"], settings["add_prefix_space"] = "PreTrainedTokenizerFast", True
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    longest = []

    class Measured(Encoder):
        def __call__(self, texts: list[str]) -> list[Tokens]:
            longest.extend(map(len, texts))
            return super().__call__(texts)

    monkeypatch.setattr(pregenerate_module, "Encoder", Measured)
    sources = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl")]
    config = PregenerateConfig(
        source=sources, tokenizer=str(tokenizer), out=str(tmp_path / "out"), sequence_length=16, test_fraction=0
    )
    result = pregenerate(config)
    assert (result.documents, result.empty_documents) == (5, 2)
    assert json.loads((tmp_path / "out" / "pregenerate.json").read_text(encoding="utf-8"))["empty_documents"] == 2
    assert max(longest) <= 5000
    assert len(said) == 1 + (kind == "prefix space")
    with pytest.raises(ConfigError, match="input_format differ"):
        pregenerate(config.model_copy(update={"input_format": "text", "resume": True}))


def test_a_tokenizer_is_trained_on_no_word_longer_than_a_passage(tmp_path: Path) -> None:
    """Merging takes the square of a word's length, so one word of a million characters would take hours."""
    (tmp_path / "a.txt").write_text("ab" * 1_000_000, encoding="utf-8")
    result = train_tokenizer(TrainTokenizerConfig(source=[str(tmp_path)], vocab_size=259, out=str(tmp_path / "t")))
    assert (result.documents, result.bytes, result.vocab_size) == (1, 2_000_000, 259)
