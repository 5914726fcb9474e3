"""Students with another tokenizer: embeddings that are means of the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.alignment.test_pieces import bpe, unigram
from tests.conftest import Outcome, make_model
from tinygpt2 import PregenerateConfig, TruncateStudentConfig, pregenerate, truncate_student
from tinygpt2.alignment.translation import Translation
from tinygpt2.data.tokenizer import END_OF_TEXT, load_tokenizer

TEXTS = ["the cat sat on the mat. 日本 🙂 "] * 9


def names(tokenizer, ids: tuple[int, ...]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(ids))


def test_parts_spell_their_token(tokenizer_dir: Path) -> None:
    whole, pieces = load_tokenizer(str(tokenizer_dir)), unigram(TEXTS)
    found = Translation.of(whole, pieces, len(whole))
    for token, part in enumerate(found.parts):
        name = pieces.convert_ids_to_tokens(token)
        if name == "</s>":
            assert names(whole, part) == [END_OF_TEXT]
        elif name == "<unk>":
            assert part == ()
        else:
            assert whole.decode(list(part)) == name.replace("\u2581", " ")


def test_sentencepieces_for_bytes() -> None:
    teacher, student = unigram(TEXTS), bpe([("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "t"), ("m", "at")])
    found = Translation.of(teacher, student, len(teacher))

    def of(name: str) -> list[str]:
        return names(teacher, found.parts[student.convert_tokens_to_ids(name)])

    assert of(END_OF_TEXT) == ["</s>"]
    assert "".join(of("Ġthe")) == "\u2581the"
    assert "".join(of("mat")) == "mat"  # and not with the space that sentencepiece puts before a text
    assert of("Z") == of("æ") == []


def test_the_fewest_tokens_where_the_teachers_encoding_is_another_text() -> None:
    teacher = bpe([("a", "b"), ("b", "c"), ("c", "d"), ("ab", "cd")])
    teacher.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    student = bpe([("b", "c"), ("bc", "d"), ("a", "bcd"), ("a", "b"), ("ab", "c")])
    found = Translation.of(teacher, student, len(teacher))
    parts = [names(teacher, found.parts[student.convert_tokens_to_ids(one)]) for one in ("abcd", "abc", "bcd")]
    assert [len(one) for one in parts] == [1, 2, 2]
    assert ["".join(one) for one in parts] == ["abcd", "abc", "bcd"]


def test_rows_are_means() -> None:
    table = torch.randn(5, 3, dtype=torch.float64)
    rows = Translation(None, ((2,), (0, 3, 3), ()), 4).means(table)  # type: ignore[arg-type]
    expected = [table[2], (table[0] + 2 * table[3]) / 3, table[:4].mean(0)]
    torch.testing.assert_close(rows, torch.stack(expected))


@pytest.mark.parametrize("tied", [True, False])
def test_a_student_with_another_tokenizer(
    corpus: Path, tokenizer_dir: Path, data: Path, tmp_path: Path, tied: bool, cli: Callable[..., Outcome]
) -> None:
    teacher = make_model(tmp_path / "t", tokenizer_dir, vocab_size=326, tie_word_embeddings=tied)
    pieces = unigram([(corpus / f"{number:02}.txt").read_text(encoding="utf-8") for number in range(4)])
    pieces.save_pretrained(tmp_path / "pieces")
    out = tmp_path / "s"
    outcome = cli("truncate-student", "--teacher", teacher, "--tokenizer", tmp_path / "pieces", "--out", out)
    assert outcome.code == 0, outcome.err
    assert "tokens are also the teacher's" in outcome.err
    old, new = (GPT2LMHeadModel.from_pretrained(str(path)) for path in (teacher, out))
    assert new.config.vocab_size == len(pieces)
    assert (new.config.eos_token_id, new.config.bos_token_id) == (pieces.eos_token_id, None)
    assert new.config.tie_word_embeddings == tied
    assert load_tokenizer(str(out)).get_vocab() == pieces.get_vocab()
    whole = load_tokenizer(str(teacher))
    ids = whole("the")["input_ids"]
    token = pieces.convert_tokens_to_ids("the") if "the" in pieces.get_vocab() else None
    for name in ("transformer.wte.weight", "lm_head.weight"):
        one, other = old.state_dict()[name], new.state_dict()[name]
        torch.testing.assert_close(other[pieces.eos_token_id], one[whole.eos_token_id])
        if token is not None:
            torch.testing.assert_close(other[token], one[ids].mean(0))
    for name, weight in new.state_dict().items():
        if ".h." in name:
            assert torch.equal(weight, old.state_dict()[name])


def test_a_narrower_student_learns_from_its_teacher(
    teacher: Path, data: Path, corpus: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    unigram([(corpus / "00.txt").read_text(encoding="utf-8")]).save_pretrained(tmp_path / "pieces")
    truncate_student(
        TruncateStudentConfig(
            teacher=str(teacher), tokenizer=str(tmp_path / "pieces"), n_embd=24, refit=True, data=str(data),
            num_layers=1, out=str(tmp_path / "s"),
        )
    )  # fmt: skip
    options = {"tokenizer": str(tmp_path / "s"), "sequence_length": 24, "out": str(tmp_path / "d")}
    pregenerate(PregenerateConfig(source=[str(corpus / "00.txt"), str(corpus / "01.txt")], **options))
    outcome = cli(
        "distill", "--teacher", teacher, "--student", tmp_path / "s", "--data", tmp_path / "d", "--out",
        tmp_path / "out", "--alignment", "both", "--max-steps", 2,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert GPT2LMHeadModel.from_pretrained(str(tmp_path / "out")).config.n_embd == 24


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--vocab-size", "300"), 2, "--vocab-size and --tokenizer cannot be combined"),
        (("--target-params", "9k", "--data", "d"), 2, "cannot be combined with --tokenizer"),
    ],
)
def test_what_cannot_be_combined(
    teacher: Path, tokenizer_dir: Path, tmp_path: Path, options: tuple, code: int, message: str,
    cli: Callable[..., Outcome],
) -> None:  # fmt: skip
    outcome = cli(
        "truncate-student", "--teacher", teacher, "--tokenizer", tokenizer_dir, "--out", tmp_path / "s", *options
    )
    assert (outcome.code, message in outcome.err.replace("\n", " ")) == (code, True), outcome.err
