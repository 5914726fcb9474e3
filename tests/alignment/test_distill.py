"""Students with fewer tokens than their teacher, from the cut to the trained model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.conftest import Outcome, make_model
from tinygpt2 import (
    DistillConfig,
    PregenerateConfig,
    TrainTokenizerConfig,
    TruncateStudentConfig,
    distill,
    plan_budget,
    pregenerate,
    train_tokenizer,
    truncate_student,
)
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.encoding import encode
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import ConfigError


@pytest.fixture(scope="module")
def cut(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with 270 of 320 tokens, and otherwise its teacher."""
    out = tmp_path_factory.mktemp("cut") / "s"
    truncate_student(TruncateStudentConfig(teacher=str(teacher), vocab_size=270, out=str(out)))
    return out


@pytest.fixture(scope="module")
def short(corpus: Path, cut: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the corpus, in ASCII, in the student's tokens."""
    root = tmp_path_factory.mktemp("short")
    texts = [(corpus / f"{number:02}.txt").read_text(encoding="utf-8") for number in range(2)]
    (root / "plain.txt").write_text("\n".join(text.replace("naïve", "old").replace("日本", "new") for text in texts))
    options = {"sequence_length": 32, "test_fraction": 0.2, "document": "line"}
    out = root / "d"
    pregenerate(PregenerateConfig(source=[str(root / "plain.txt")], tokenizer=str(cut), out=str(out), **options))
    return out


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_student_learns_from_a_teacher_with_more_tokens(
    teacher: Path, cut: Path, short: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    outcome = cli(
        "distill", "--teacher", teacher, "--student", cut, "--data", short, "--out", tmp_path / "s",
        "--max-steps", 12, "--micro-batch-size", 4, "--learning-rate", 3e-3, "--log-every", 1, "--ce-weight", 0,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "has 320 tokens, the data 270 of them" in outcome.err
    rows = metrics(tmp_path / "s")
    assert all(0 < row["teacher/absent"] < 0.5 for row in rows if "loss" in row)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert 0 < next(row["teacher/loss"] for row in rows if "teacher/loss" in row) < 20
    plain = GPT2LMHeadModel.from_pretrained(str(tmp_path / "s"))
    assert plain.config.vocab_size == len(load_tokenizer(str(tmp_path / "s"))) == 270


def test_the_first_loss_is_what_both_models_say(teacher: Path, cut: Path, short: Path, tmp_path: Path) -> None:
    """One block, by the models of transformers and sums over the names of tokens."""
    distill(
        DistillConfig(
            teacher=str(teacher), student=str(cut), data=str(short), out=str(tmp_path / "s"), max_steps=1,
            micro_batch_size=len(load_packed_dataset(str(short)).train), ce_weight=0.0, learning_rate=1e-9, log_every=1,
        )
    )  # fmt: skip
    row = next(row for row in metrics(tmp_path / "s") if "loss" in row)
    whole, small = load_tokenizer(str(teacher)), load_tokenizer(str(cut))
    old, new = (GPT2LMHeadModel.from_pretrained(str(path)).eval().double() for path in (teacher, cut))
    names = whole.convert_ids_to_tokens(range(320))
    alone = small.backend_tokenizer
    alone.pre_tokenizer = None
    alone.encode_special_tokens = False
    paths = [[small.convert_ids_to_tokens(one) for one in alone.encode(name).ids] for name in names]
    train = load_packed_dataset(str(short)).train
    total, count, absent = 0.0, 0, 0
    for block in train.batch(list(range(len(train)))).input_ids.long():
        text = small.convert_ids_to_tokens(block.tolist())
        end = small.eos_token
        parts = "".join("\0" + name + "\0" if name == end else name for name in text).split("\0")
        ids = [
            one
            for part in parts
            for one in (
                whole.convert_tokens_to_ids([end]) if part == end else
                encode(whole, [part.replace("\u0120", " ")])[0]
            )
        ]  # fmt: skip
        with torch.no_grad():
            theirs = old(torch.tensor([ids])).logits[0].softmax(-1)
            ours = new(block[None]).logits[0].log_softmax(-1)
        # where the tokens of both end, in letters
        ends = {len("".join(names[one] for one in ids[: at + 1])): at for at in range(len(ids))}
        inner = _incomplete(text)
        for place in range(len(text) - 1):
            begin = len("".join(text[: place + 1]))
            border = max((one for one in ends if one <= begin), default=0)
            read, rest = [], begin
            while rest > border:
                read.insert(0, text[place - len(read)])
                rest -= len(read[0])
            q = torch.zeros(270, dtype=torch.float64)
            if border == 0 or inner[place + 1]:
                q[block[place + 1]] = 1
                absent += 1
            else:
                for token, path in enumerate(paths):
                    if path[: len(read)] == read and len(path) > len(read):
                        q[small.convert_tokens_to_ids(path[len(read)])] += theirs[ends[border], token]
                q /= q.sum()
            total += float((torch.xlogy(q, q) - q * ours[place]).sum())
            count += 1
    assert row["teacher/absent"] == pytest.approx(absent / count)
    assert row["loss/prediction"] == pytest.approx(total / count, rel=1e-4)


def _incomplete(text: list[str]) -> list[bool]:
    """Return which tokens of a block are inside its first or last word; a word begins at a space or an end."""
    begins = [name.startswith("\u0120") or name == "<|endoftext|>" for name in text]
    starts = [
        place for place, new in enumerate(begins)
        if new or not place or text[place - 1] == "<|endoftext|>" or (text[place] == ".") != (text[place - 1] == ".")
    ]  # fmt: skip
    return [(starts[0] == 0 and place < starts[1]) or starts[-1] < place for place in range(len(text))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_weight": 1.0}, "--hidden-weight compares positions"),
        ({"attention_weight": 1.0}, "--attention-weight compares positions"),
        ({"prediction_loss": "reverse_kl"}, "infinite for tokens that cannot come next"),
        ({"prediction_loss": "jsd", "jsd_beta": 1.0}, "infinite for tokens that cannot come next"),
        ({"teacher_cache": "CACHE"}, "--teacher-cache needs the teacher's tokens"),
    ],
)
def test_what_needs_equal_tokens_is_refused(
    teacher: Path, cut: Path, short: Path, tmp_path: Path, options: dict, message: str, cli: Callable[..., Outcome]
) -> None:
    flags = [
        part for name, value in options.items()
        for part in (f"--{name.replace('_', '-')}", tmp_path / "c" if value == "CACHE" else value)
    ]  # fmt: skip
    given = ("--teacher", teacher, "--student", cut, "--data", short, "--out", tmp_path / "s")
    outcome = cli("distill", *given, *flags)
    assert (outcome.code, message in outcome.err) == (2, True), outcome.err


def test_cuts_with_other_tokens_than_the_data_are_not_planned(teacher: Path, short: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cuts that have the teacher's tokens"):
        plan_budget(DistillConfig(teacher=str(teacher), data=str(short), out=str(tmp_path / "s"), plan=True))


def test_a_tokenizer_that_is_no_cut_is_refused(
    teacher: Path, corpus: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    train_tokenizer(TrainTokenizerConfig(source=[str(corpus / "05.txt")], vocab_size=280, out=str(tmp_path / "t")))
    options = {"sequence_length": 32, "out": str(tmp_path / "d"), "tokenizer": str(tmp_path / "t")}
    pregenerate(PregenerateConfig(source=[str(corpus / "00.txt")], **options))
    student = make_model(tmp_path / "m", tmp_path / "t", vocab_size=280)
    outcome = cli(
        "distill", "--teacher", teacher, "--student", student, "--data", tmp_path / "d", "--out", tmp_path / "s"
    )
    assert outcome.code == 4, outcome.err
    assert "--vocab-size" in outcome.err
