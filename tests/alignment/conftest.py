"""A teacher with a tokenizer of another kind than its student's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.alignment.test_pieces import unigram
from tests.conftest import make_model


@pytest.fixture(scope="module")
def pieces(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with a tokenizer of sentencepiece's kind."""
    root = tmp_path_factory.mktemp("pieces")
    tokenizer = unigram([(corpus / f"{number:02}.txt").read_text(encoding="utf-8") for number in range(8)])
    tokenizer.save_pretrained(root / "t")
    return make_model(root / "m", root / "t", vocab_size=len(tokenizer), n_positions=64)


@pytest.fixture(scope="module")
def student(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("student") / "m", tokenizer_dir, seed=8, n_layer=2, n_embd=24)


def arguments(teacher: Path, student: object, data: Path, out: Path) -> list[object]:
    return ["distill", "--teacher", teacher, "--student", student, "--data", data, "--out", out, "--micro-batch-size",
            4, "--log-every", 1, "--ce-weight", 0]  # fmt: skip
