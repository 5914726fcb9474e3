"""Vocabularies of the tokens that a dataset uses most."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.alignment.test_pieces_distill import arguments
from tests.alignment.test_rank_cut import TEXTS
from tests.alignment.test_redistribution import MERGES, tiny
from tinygpt2.alignment.rank_cut import cut_by_rank, merged_pairs, same_cut
from tinygpt2.alignment.used_tokens import by_use, token_counts
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.encoding import encode
from tinygpt2.data.tokenizer import load_tokenizer


def made_by_hand(text: str) -> Counter[str]:
    """Merge letter by letter, and count what every merge makes."""
    parts, made = list(text), Counter[str]()
    for pair in MERGES:
        at = 0
        while at + 1 < len(parts):
            if (parts[at], parts[at + 1]) == pair:
                parts[at : at + 2] = ["".join(pair)]
                made["".join(pair)] += 1
            at += 1
    return made


def test_use_is_how_often_the_merges_make_a_token() -> None:
    tokenizer = tiny()
    texts = ["abab", "ababb", "bbbab", "aababbab", "babab"]
    made = sum((made_by_hand(text) for text in texts), Counter())
    counts = np.bincount(np.concatenate(encode(tokenizer, texts)), minlength=len(tokenizer))
    order = tokenizer.convert_ids_to_tokens(by_use(tokenizer, counts))
    names = ["".join(pair) for pair in MERGES]
    assert order == sorted(names, key=lambda name: (-made[name], names.index(name)))


@pytest.mark.parametrize("size", [258, 280, 310])
def test_kept_tokens_can_be_made_and_no_text_is_lost(tokenizer_dir: Path, data: Path, size: int) -> None:
    whole = load_tokenizer(str(tokenizer_dir))
    counts = token_counts(load_packed_dataset(str(data)).train, 320)
    assert counts.sum() == len(load_packed_dataset(str(data)).train) * 32
    cut = cut_by_rank(whole, size, 320, by_use(whole, counts))
    assert len(cut.rows) == len(cut.tokenizer) == size
    model = json.loads(cut.tokenizer.backend_tokenizer.to_str())["model"]
    pairs = {"".join(pair): pair for pair in merged_pairs(model)}
    for name in cut.tokenizer.get_vocab():
        if len(name) > 1 and "<|" not in name:
            assert all(part in model["vocab"] for part in pairs[name])
    for text in TEXTS:
        assert cut.tokenizer.decode(encode(cut.tokenizer, [text])[0]) == text


def test_unused_tokens_follow_by_rank(tokenizer_dir: Path) -> None:
    whole = load_tokenizer(str(tokenizer_dir))
    order = by_use(whole, np.zeros(320, np.int64))
    assert cut_by_rank(whole, 290, 320, order).rows == cut_by_rank(whole, 290, 320).rows


def test_students_of_used_tokens_need_an_alignment(teacher: Path, data: Path, tmp_path: Path, cli: Callable) -> None:
    cut, short = tmp_path / "cut", tmp_path / "short"
    asked = ["truncate-student", "--teacher", teacher, "--num-layers", 2, "--out", cut, "--vocab-choice", "used"]
    assert "--vocab-choice used needs --vocab-size" in cli(*asked, "--data", data).err
    assert "--vocab-choice used needs --data" in cli(*asked, "--vocab-size", 280).err
    outcome = cli(*asked, "--vocab-size", 280, "--data", data)
    assert outcome.code == 0, outcome.err
    assert "280: those that d uses most" in (cut / "README.md").read_text(encoding="utf-8")
    assert "vocab_choice: used" in (cut / "config.yaml").read_text(encoding="utf-8")
    assert same_cut(load_tokenizer(str(teacher)), load_tokenizer(str(cut))) is None
    assert cli("verify", cut).code == 0
    again = ["pregenerate", "--from-dataset", data, "--tokenizer", cut, "--out", short, "--sequence-length", 32]
    assert cli(*again).code == 0
    distil = arguments(teacher, cut, short, tmp_path / "a")
    refused = cli(*distil)
    assert refused.code == 4, refused.err
    assert "--alignment" in refused.err
    learned = cli(*distil, "--alignment", "pieces", "--max-steps", 1)
    assert learned.code == 0, learned.err
