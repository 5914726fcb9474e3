"""A wrong command line: the message names the option or command that was probably meant, without a library's words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WRONG = [
    ("distill --lr 3", "No such option: --lr, did you mean --learning-rate?\n"),
    ("distill --batch-size 3", "did you mean --micro-batch-size"),
    ("distill --epochs=3", "did you mean --num-epochs?"),
    ("pretrain --steps 3", "did you mean --max-steps?"),
    ("pregenerate --seq-len 3", "did you mean --sequence-length?"),
    ("generate --max-tokens 3", "did you mean --max-new-tokens or --draft-tokens?"),
    ("ppl --batch 3", "did you mean --batch-size?"),
    ("finetune --output-dir x", "did you mean --out?"),
    ("distill --no-such-thing", "No such option: --no-such-thing\nhint: tinygpt2 distill --help-all lists the options"),
    ("distill -x", "begin with two dashes"),
    ("--teacher gpt2 distill", "the options of a command come after its name"),
    ("destill", "No such command 'destill', did you mean 'distill'?"),
    ("train", "did you mean 'pretrain' or 'finetune'?"),
    ("evaluate", "did you mean 'ppl' or 'evaluate-text'?"),
    ("tokenize", "did you mean 'pregenerate' or"),
    ("xyzzy", "No such command 'xyzzy'\nhint: tinygpt2 --help lists the commands"),
    ("distill --out", "--out needs a value"),
    ("distill --json=yes", "--json is a switch: it takes no value"),
    ("presets three", "unexpected words: three"),
    ("pretrain --max-steps x", "--max-steps: expected a whole number, got 'x'"),
    ("pretrain --max-steps 1.5", "--max-steps: expected a whole number, got 1.5"),
    ("pretrain --learning-rate fast", "--learning-rate: expected a number, got 'fast'"),
    ("pretrain --learning-rate inf", "--learning-rate: expected a finite number, got inf"),
    ("pretrain --dropout 1", "--dropout: expected less than 1, got 1"),
    ("pretrain --precision fp8", "--precision: expected auto, fp32, bf16 or fp16, got 'fp8'"),
    ("pretrain --report-to tensorbord", "--report-to: expected tensorboard or wandb, got 'tensorbord'"),
    ("distill --recipe defautl", "did you mean 'default'?"),
]


@pytest.mark.parametrize(("line", "part"), WRONG)
def test_a_mistake_is_explained(cli: Callable, line: str, part: str) -> None:
    outcome = cli(*line.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert part in outcome.err
    for words in ("Possible options", "Input should be", "unable to parse", "Got unexpected", "requires an argument"):
        assert words not in outcome.err
    assert outcome.err.count("error: ") == 1


@pytest.mark.parametrize(
    ("key", "meant"),
    [("lr: 1", "learning_rate"), ("batch_size: 1", "micro_batch_size"), ("epochs: 1", "num_epochs"),
     ("steps: 1", "max_steps"), ("output_dir: x", "out"), ("max_step: 1", "max_steps")],
)  # fmt: skip
def test_a_wrong_key_of_a_file_too(cli: Callable, tmp_path: Path, key: str, meant: str) -> None:
    (tmp_path / "run.yaml").write_text(f"model: m\ndata: d\n{key}\n")
    outcome = cli("pretrain", "--config", tmp_path / "run.yaml", "--out", "o")
    assert outcome.code == 2
    assert f"unknown option '{key.split(':')[0]}', did you mean '{meant}'" in outcome.err


def test_a_home_directory_is_known_in_every_place(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("ce_weight: 1e0\nlearning_rate: 1e-3\n")
    (tmp_path / "run.yaml").write_text("recipe: ~/recipe.yaml\nstudent: ~/s\ndata: ['~/a:0.5', '~/b:0.5']\nout: ~/o\n")
    printed = cli("distill", "--config", "~/run.yaml", "--teacher", "~/t", "--max-steps", "1e3", "--print-config").out
    assert "~" not in printed
    for part in (f"recipe: {tmp_path}/recipe.yaml", f"- {tmp_path}/a:0.5", "learning_rate: 0.001", "max_steps: 1000"):
        assert part in printed


def test_a_wrong_value_names_the_list_of_options(cli: Callable) -> None:
    found = json.loads(cli("generate", "--num-beams", "x", "--json").out)["error"]
    assert found["hint"] == "tinygpt2 generate --help-all lists the options"
    assert "--model is required: a local directory" in found["message"]


@pytest.mark.parametrize("arguments", [["ppl", "--list-tasks"], ["--help"]])
def test_a_closed_pipe_ends_quietly(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tinygpt2", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
