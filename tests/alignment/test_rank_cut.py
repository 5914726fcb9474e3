"""Tokenizers cut by rank: what is kept, that texts come back, and that no border of the whole tokenizer is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.conftest import Outcome, make_model
from tinygpt2 import ExportConfig, TruncateStudentConfig, VerifyConfig, export, truncate_student, verify
from tinygpt2.alignment.rank_cut import cut_by_rank
from tinygpt2.data.encoding import Encoder, encode, token_bytes
from tinygpt2.data.tokenizer import fingerprint, load_tokenizer
from tinygpt2.errors import ConfigError, ModelError

TEXTS = [
    "It was the best of times, it was the worst of times; the cat's mat -- 1859.\n\n  It's the epoch of belief.",
    "红楼梦第一回 甄士隐梦幻识通灵、贾雨村风尘怀闺秀。naïve café",
    "def rank(x: int) -> int:\n    return {'a': x**2}[f\"{x!r}\"]  # \t tabs\r\n",
    "🙂👩‍👩‍👧 emoji 🏳️‍🌈\x00\x7f <|endoftext|> the end",
    "",
]


def borders(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return where each token ends, in bytes."""
    names = tokenizer.convert_ids_to_tokens(encode(tokenizer, [text])[0])
    sizes = [len(token_bytes(name)) for name in names]
    assert sum(sizes) == len(text.encode())
    return torch.tensor(sizes).cumsum(0).tolist()


@pytest.mark.parametrize("size", [257, 258, 300, 319, 320])
def test_texts_come_back_and_no_border_is_lost(tokenizer_dir: Path, size: int) -> None:
    check(load_tokenizer(str(tokenizer_dir)), size)


@pytest.mark.parametrize("size", [400, 4096, 30_000])
def test_gpt2s_own_tokenizer(shared_data: Path, size: int) -> None:
    check(load_tokenizer(str(shared_data / "tokenizers" / "gpt2")), size)


def check(whole: PreTrainedTokenizerFast, size: int) -> None:
    cut = cut_by_rank(whole, size, len(whole))
    small = cut.tokenizer
    assert len(small) == len(cut.rows) == size
    assert Encoder(small).reproduced
    assert small.convert_ids_to_tokens(range(size)) == whole.convert_ids_to_tokens(list(cut.rows))
    assert small.eos_token == whole.eos_token
    for text in TEXTS:
        ids = encode(small, [text])[0]
        assert small.decode(ids) == text
        assert set(borders(whole, text)) <= set(borders(small, text))
        # a token of the whole tokenizer consists of what the kept merges alone make of its bytes
        alone = Backend.from_str(small.backend_tokenizer.to_str())
        alone.pre_tokenizer = None
        names = whole.convert_ids_to_tokens(encode(whole, [text])[0])
        assert [token for name in names for token in alone.encode(name).ids] == ids
    if size == len(whole):
        assert fingerprint(small) == fingerprint(whole)


def test_special_tokens_keep_their_place_in_every_post_processor(tokenizer_dir: Path, tmp_path: Path) -> None:
    whole = load_tokenizer(str(tokenizer_dir))
    whole.add_special_tokens({"pad_token": "<pad>", "cls_token": "<s>"})
    start = whole.convert_tokens_to_ids("<s>")
    for processor in (
        TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)]),
        RobertaProcessing(("<pad>", start - 1), ("<s>", start)),
    ):
        whole.backend_tokenizer.post_processor = processor
        cut = cut_by_rank(whole, 290, 320)  # a model has no rows for the two added tokens
        assert len(cut.rows) == 290
        assert [cut.tokenizer.convert_tokens_to_ids(name) for name in ("<pad>", "<s>")] == [290, 291]
        assert cut.tokenizer("the cat")["input_ids"][0] == 291
        cut.tokenizer.save_pretrained(str(tmp_path))
        again = load_tokenizer(str(tmp_path))
        assert (fingerprint(again), again("a cat")) == (fingerprint(cut.tokenizer), cut.tokenizer("a cat"))


def test_impossible_vocabularies(tokenizer_dir: Path) -> None:
    whole = load_tokenizer(str(tokenizer_dir))
    with pytest.raises(ConfigError, match="the bytes and special tokens alone are 257 tokens"):
        cut_by_rank(whole, 256, 320)
    with pytest.raises(ConfigError, match="has only 320 tokens"):
        cut_by_rank(whole, 321, 400)
    words = PreTrainedTokenizerFast(tokenizer_object=Backend(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(ModelError, match="needs a byte-level BPE"):
        cut_by_rank(words, 1, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_student_with_fewer_tokens(
    cli: Callable[..., Outcome], tokenizer_dir: Path, data: Path, tmp_path: Path, tied: bool
) -> None:
    teacher = make_model(tmp_path / "t", tokenizer_dir, vocab_size=326, tie_word_embeddings=tied)
    out = tmp_path / "s"
    options = {"teacher": str(teacher), "data": str(data), "n_embd": 16, "layers": "1,2", "refit": True}
    truncate_student(TruncateStudentConfig(**options, out=str(tmp_path / "whole")))
    outcome = cli(
        "truncate-student", "--teacher", teacher, "--data", data, "--n-embd", 16, "--layers", "1,2", "--refit",
        "--vocab-size", 280, "--out", out, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    whole, plain = (GPT2LMHeadModel.from_pretrained(str(path)) for path in (tmp_path / "whole", out))
    assert outcome.json["parameters"] == plain.num_parameters()
    rows = list(cut_by_rank(load_tokenizer(str(tokenizer_dir)), 280, 326).rows)
    for name, tensor in plain.state_dict().items():
        old = whole.state_dict()[name]
        assert torch.equal(tensor, old[rows] if name in ("transformer.wte.weight", "lm_head.weight") else old), name
    assert plain.config.tie_word_embeddings == tied
    assert (plain.config.vocab_size, plain.config.eos_token_id) == (280, 0)
    assert plain.generation_config.eos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text
    assert verify(VerifyConfig(path=str(out), teacher=str(teacher))).ok
    card = (out / "README.md").read_text()
    assert "280: the first ones" in card
    assert ", in the teacher's tokens" in card


def test_a_student_with_fewer_tokens_is_exported(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "s"
    truncate_student(TruncateStudentConfig(teacher=str(teacher), vocab_size=280, out=str(out)))
    text = str(corpus / "00.txt")
    export(ExportConfig(model=str(out), to="gguf", out=str(tmp_path / "s.gguf"), data=text))
    export(ExportConfig(model=str(out), to="safetensors", out=str(tmp_path / "plain"), data=text))
    assert len(load_tokenizer(str(tmp_path / "plain"))) == 280


def test_the_option_alone_is_a_cut_and_is_checked_early(
    cli: Callable[..., Outcome], teacher: Path, tmp_path: Path
) -> None:
    for options, code, message in (
        (("--vocab-size", "321"), 2, "the teacher has only 320 tokens"),
        (("--vocab-size", "200"), 2, "the bytes and special tokens alone are 257 tokens"),
        (("--vocab-size", "300", "--target-params", "9k", "--for", "draft", "--data", "d"), 2, "a draft has"),
    ):
        outcome = cli("truncate-student", "--teacher", teacher, "--out", tmp_path / "s", *options)
        assert (outcome.code, message in outcome.err) == (code, True), outcome.err
    assert cli("truncate-student", "--teacher", teacher, "--out", tmp_path / "s", "--vocab-size", 300).code == 0
