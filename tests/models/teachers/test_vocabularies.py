"""Teachers whose tokens have other numbers: pieces by their bytes, end of text, start tokens, what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import ModelError
from tinygpt2.models.teachers.vocabularies import Reading, start_token, teacher_reading

NAMES = ("teacher", "student")


def opt_order(tokenizer_dir: Path, out: Path) -> Path:
    """OPT's way with the same pieces: special tokens first, then the pieces in another order, then rows for nothing."""
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = sorted(piece for piece in content["model"]["vocab"] if piece != "<|endoftext|>")
    names = ["<s>", "<pad>", "</s>", "<unk>", *pieces, "<|endoftext|>", "madeupword0000"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}), encoding="utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]]
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **special}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return out


def llama_order(tokenizer_dir: Path, out: Path, *, template: bool = True) -> Path:
    """The pieces backwards after a start and an end, in one tokenizer.json with a template."""
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = [piece for piece in content["model"]["vocab"] if piece != "<|endoftext|>"]
    names = ["<s>", "</s>", *sorted(pieces, reverse=True)]
    content["model"]["vocab"] = {name: index for index, name in enumerate(names)}
    content["added_tokens"] = []
    backend = Backend.from_str(json.dumps(content))
    backend.add_special_tokens(["<s>", "</s>"])
    if template:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(out)
    return out


def test_the_same_tokenizer_needs_no_map(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert teacher_reading(tokenizer, 320, tokenizer, 320, NAMES) == Reading()
    assert teacher_reading(tokenizer, 320, None, 320, NAMES) == Reading()


def test_padded_rows_are_left_out(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert teacher_reading(tokenizer, 320, tokenizer, 323, NAMES) == Reading(tuple(range(320)), (320, 321, 322))
    assert teacher_reading(tokenizer, 320, None, 323, NAMES) == Reading(tuple(range(320)), (320, 321, 322))
    assert teacher_reading(tokenizer, 322, tokenizer, 320, NAMES) == Reading((*range(320), -1, -1), ())


def test_pieces_in_opts_order_are_found_by_their_bytes(tokenizer_dir: Path, tmp_path: Path) -> None:
    ours, opt = load_tokenizer(str(tokenizer_dir)), load_tokenizer(str(opt_order(tokenizer_dir, tmp_path)))
    reading = teacher_reading(ours, 320, opt, 325, NAMES)
    assert reading.rows is not None
    end = ours.eos_token_id
    for piece, token in ours.get_vocab().items():
        assert reading.rows[token] == (2 if token == end else opt.get_vocab()[piece]), piece
    assert reading.start == 2  # </s>, which is OPT's start, too
    left_out = {opt.convert_ids_to_tokens(row) for row in reading.others}
    assert left_out == {"<s>", "<pad>", "<unk>", "<|endoftext|>", "madeupword0000"}


def test_a_template_tells_the_start_token(tokenizer_dir: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(str(tokenizer_dir))
    llama = load_tokenizer(str(llama_order(tokenizer_dir, tmp_path / "a")))
    plain = load_tokenizer(str(llama_order(tokenizer_dir, tmp_path / "b", template=False)))
    assert (start_token(ours), start_token(llama), start_token(plain)) == (None, 0, None)
    with_start, without = (teacher_reading(ours, 320, one, 321, NAMES) for one in (llama, plain))
    assert (with_start.start, without.start) == (0, None)
    assert with_start.rows == without.rows
    assert with_start.others == without.others == (0,)
    assert with_start.rows is not None
    assert with_start.rows[ours.eos_token_id] == 1


def test_other_pieces_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    """One tokenizer lacks the last merge of the other."""
    ours = load_tokenizer(str(tokenizer_dir))
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    last = content["model"]["merges"].pop()
    pair = last.split(" ") if isinstance(last, str) else last
    vocabulary = content["model"]["vocab"]
    gone = vocabulary.pop("".join(pair))
    content["model"]["vocab"] = {piece: number - (number > gone) for piece, number in vocabulary.items()}
    content["added_tokens"] = [one | {"id": one["id"] - (one["id"] > gone)} for one in content["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    smaller = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>")
    with pytest.raises(ModelError, match=r"vocabulary of 319 tokens.*the teacher lacks 1 pieces") as refused:
        teacher_reading(ours, 320, smaller, 319, NAMES)
    assert "pregenerate --tokenizer" in (refused.value.hint or "")
    with pytest.raises(ModelError, match="the student lacks 1 pieces"):
        teacher_reading(smaller, 319, ours, 320, NAMES)
    with pytest.raises(ModelError, match="no tokenizer, and fewer tokens"):
        teacher_reading(ours, 320, None, 300, NAMES)
