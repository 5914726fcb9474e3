"""--print-config: values that rules give, from files alone, are those of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import make_model
from tinygpt2 import DistillConfig, FinetuneConfig, GenerateConfig, PretrainConfig, plan_run
from tinygpt2.planning.known_values import known_options


@pytest.mark.parametrize("student", ["weights", "preset", "file"])
def test_what_is_known_is_what_the_run_uses(student: str, teacher: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "shape.json"
    file.write_text('{"n_layer": 1, "n_embd": 96, "n_head": 2, "n_positions": 32, "n_inner": 100}')
    names = {"weights": str(teacher), "preset": "distilgpt2", "file": str(file)}
    config = DistillConfig(teacher=str(teacher), student=names[student], data=str(data), out=str(tmp_path / "o"))
    known, unknown = known_options(config)
    run, again = plan_run(config), plan_run(known)
    assert unknown == []
    assert known.learning_rate == run.learning_rate == again.learning_rate
    assert run.steps == again.steps
    assert 1 <= known.num_epochs <= 4


@pytest.mark.parametrize(
    ("start", "optimizer", "rate"),
    [
        ("shape", "muon", 2.5 / 768),
        ("shape", "adamw", 0.5 / 768),
        ("model", "muon", 0.3 / 96),
        ("model", "adamw", 0.2 / 96),
    ],
)
def test_the_rate_is_that_of_the_run(
    start: str, optimizer: str, rate: float, tokenizer_dir: Path, data: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "m", tokenizer_dir, n_layer=1, n_embd=96)
    base = {"optimizer": optimizer, "data": str(data), "out": str(tmp_path / "o")}
    configs = [PretrainConfig(**{start: {"shape": "gpt2", "model": str(model)}[start]}, **base)]
    configs += [FinetuneConfig(model=str(model), **base)] if start == "model" else []
    for config in configs:
        known, unknown = known_options(config)
        # a rate that is given later has to change those that follow from it, too
        assert (unknown, known.learning_rate, known.embedding_learning_rate) == ([], rate, None)
        assert plan_run(config).learning_rate == plan_run(known).learning_rate == rate


def test_a_printed_plan_runs_again(cli: Callable, teacher: Path, data: Path, tmp_path: Path) -> None:
    command = ["pretrain", "--model", teacher, "--data", data, "--out", tmp_path / "o"]
    (tmp_path / "run.yaml").write_text(cli(*command, "--plan", "--print-config").out)
    printed = cli("pretrain", "--config", tmp_path / "run.yaml", "--print-config")
    assert printed.code == 0
    assert yaml.safe_load(printed.out)["num_epochs"] is None


def test_a_length_between_one_and_four_passes(teacher: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "shape.yaml"
    file.write_text(yaml.safe_dump({"n_layer": 1, "n_embd": 4, "n_head": 1, "n_positions": 32}))
    config = DistillConfig(teacher=str(teacher), student=str(file), data=str(data), out="o", micro_batch_size=1)
    known, _ = known_options(config)
    assert 1 < known.num_epochs < 4
    assert plan_run(known).steps == plan_run(config).steps


def test_what_is_not_there_is_left_open(data: Path) -> None:
    _, unknown = known_options(DistillConfig(teacher="t", student="nowhere", data="d", out="o"))
    assert unknown == ["learning_rate", "num_epochs"]
    known, unknown = known_options(DistillConfig(teacher="t", student="distilgpt2", data="d", out="o", max_steps=3))
    assert (unknown, known.num_epochs, known.max_steps) == ([], None, 3)
    known, unknown = known_options(PretrainConfig(model="m", data="d", out="o"))
    assert (unknown, known.learning_rate, known.num_epochs) == (["learning_rate"], None, 1.0)
    known, unknown = known_options(FinetuneConfig(model="m", data="d", out="o"))
    assert (unknown, known.learning_rate, known.num_epochs) == (["learning_rate"], None, 1.0)
    tuning = FinetuneConfig(model="m", data="d", out="o", learning_rate=5e-4, vector_learning_rate=1e-3)
    known, unknown = known_options(tuning)
    assert (unknown, known.learning_rate, known.num_epochs) == ([], 5e-4, 1.0)
    assert (known.embedding_learning_rate, known.vector_learning_rate) == (None, 1e-3)
    other = GenerateConfig(model="m")
    assert known_options(other) == (other, [])


def test_print_config_says_what_is_open_and_a_length_wins_over_the_file(
    cli: Callable, teacher: Path, data: Path, tmp_path: Path
) -> None:
    base = ["distill", "--teacher", teacher, "--student", teacher, "--data", data, "--out", tmp_path / "o"]
    printed = cli(*base, "--print-config").out
    assert yaml.safe_load(printed)["learning_rate"] == 4e-3
    assert not printed.startswith("#")
    (tmp_path / "run.yaml").write_text(printed)
    shorter = yaml.safe_load(cli("distill", "--config", tmp_path / "run.yaml", "--max-steps", 2, "--print-config").out)
    assert (shorter["max_steps"], shorter["num_epochs"]) == (2, None)
    open_ = cli("distill", "--teacher", "t", "--student", "s", "--data", "d", "--out", "o", "--print-config").out
    assert open_.startswith("# null: the run computes learning_rate and num_epochs from its model and data\n")
