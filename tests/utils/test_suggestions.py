"""What is meant by an unknown name."""

from __future__ import annotations

import pytest

from tinygpt2.utils.suggestions import closest, did_you_mean

TRAINING = [
    "learning_rate",
    "lr_schedule",
    "micro_batch_size",
    "auto_batch_size",
    "max_steps",
    "max_tokens",
    "log_every",
]


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("lr", TRAINING, ["learning_rate"]),
        ("batch_size", TRAINING, ["micro_batch_size", "auto_batch_size"]),
        ("--batch-size", [f"--{name.replace('_', '-')}" for name in TRAINING],
         ["--micro-batch-size", "--auto-batch-size"]),
        ("max_step", TRAINING, ["max_steps"]),
        ("steps", TRAINING, ["max_steps"]),
        ("learning-rate", TRAINING, ["learning_rate"]),
        ("train", ["pretrain", "finetune", "ppl"], ["pretrain", "finetune"]),
        ("gpt2-smal", ["gpt2", "gpt2-xl"], ["gpt2", "gpt2-xl"]),
        ("xyzzy", TRAINING, []),
    ],
)  # fmt: skip
def test_habits_come_first_then_spellings(name: str, known: list[str], meant: list[str]) -> None:
    assert closest(name, known) == meant


def test_the_end_of_a_message() -> None:
    assert did_you_mean("destill", ["distill", "ppl"]) == ", did you mean 'distill'?"
    assert did_you_mean("xyzzy", ["distill", "ppl"]) == ""
