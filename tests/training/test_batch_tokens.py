"""`--batch-tokens`: the micro-batch and the accumulation that follow, what is refused, what is recorded and proposed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.test_checkpoint import options
from tests.training.test_train import same
from tinygpt2 import DistillConfig, PretrainConfig, compile_step, plan_budget, plan_run, pretrain
from tinygpt2.config.training import TrainOptions
from tinygpt2.config.yaml_files import read_yaml
from tinygpt2.errors import ConfigError
from tinygpt2.planning import dry_run
from tinygpt2.training.schedule import batch_of, proposed_batch_tokens


@pytest.mark.parametrize(
    ("given", "processes", "expected"),
    [
        ({"batch_tokens": 16 * 32}, 1, (8, 2)),  # the default micro-batch, twice
        ({"batch_tokens": 4 * 32}, 1, (4, 1)),
        ({"batch_tokens": 12 * 32}, 1, (6, 2)),  # the largest micro-batch up to the default that divides it
        ({"batch_tokens": 11 * 32}, 1, (1, 11)),
        ({"batch_tokens": 16 * 32}, 2, (8, 1)),
        ({"batch_tokens": 16 * 32, "micro_batch_size": 2}, 2, (2, 4)),
        ({"batch_tokens": 16 * 32, "micro_batch_size": 16}, 1, (16, 1)),
        ({"batch_tokens": 16 * 32, "auto_batch_size": True}, 1, (16, 1)),  # as far as it fits
        ({"batch_tokens": 16 * 32, "auto_batch_size": True, "micro_batch_size": 4}, 1, (4, 4)),
        ({"batch_tokens": 16 * 32, "micro_batch_size": 4, "gradient_accumulation_steps": 4}, 1, (4, 4)),
        ({"micro_batch_size": 3, "gradient_accumulation_steps": 5}, 1, (3, 5)),
        ({}, 4, (8, 1)),
    ],
)
def test_micro_batch_and_accumulation_follow(given: dict, processes: int, expected: tuple[int, int]) -> None:
    config = batch_of(TrainOptions(out="o", **given), 32, processes)
    assert (config.micro_batch_size, config.gradient_accumulation_steps) == expected
    assert batch_of(config, 32, processes) == config


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"batch_tokens": 100}, "must be a multiple of 64", "give 64 or 128"),
        ({"batch_tokens": 5}, "must be a multiple of 64", "give 64"),
        ({"batch_tokens": 640, "micro_batch_size": 4}, "10 blocks in each process, which micro-batches of 4", "2 or 5"),
        (
            {"batch_tokens": 640, "micro_batch_size": 5, "gradient_accumulation_steps": 3},
            "needs --gradient-accumulation-steps 2, not 3",
            "leave --gradient-accumulation-steps out",
        ),
    ],
)
def test_what_no_whole_number_of_micro_batches_makes_is_refused(given: dict, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        batch_of(TrainOptions(out="o", **given), 32, 2)
    assert hint in str(caught.value.hint)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's compiler, when it is imported
def test_the_step_that_is_compiled_is_one_of_the_run(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = list[tuple[int, ...]]()
    monkeypatch.setattr(dry_run, "step_seconds", lambda *place, steps: timed.append(place[4:]) or [0.0] * steps)
    compile_step(PretrainConfig(model=str(teacher), data=str(data), out=str(tmp_path / "o"), batch_tokens=12 * 32))
    assert timed == [(6, 6)]


def test_a_run_is_the_one_with_the_factors_and_can_be_run_again(teacher: Path, data: Path, tmp_path: Path) -> None:
    base = {"model": str(teacher), "data": str(data), "max_steps": 3, "lr_schedule": "constant"}
    pretrain(PretrainConfig(**base, out=str(tmp_path / "a"), batch_tokens=12 * 32))
    pretrain(PretrainConfig(**base, out=str(tmp_path / "b"), micro_batch_size=6, gradient_accumulation_steps=2))
    assert same(tmp_path / "a", tmp_path / "b")
    recorded = read_yaml(tmp_path / "a" / "config.yaml")
    assert recorded["batch_tokens"] == 12 * 32
    assert (recorded["micro_batch_size"], recorded["gradient_accumulation_steps"]) == (6, 2)
    again = PretrainConfig(**{**recorded, "out": str(tmp_path / "c")})
    pretrain(again)
    assert same(tmp_path / "a", tmp_path / "c")
    # the option may be added or left out on --resume, as long as the batch is the same
    more = {**base, "max_steps": 4, "resume": True}
    pretrain(PretrainConfig(**more, out=str(tmp_path / "b"), batch_tokens=12 * 32))
    pretrain(PretrainConfig(**more, out=str(tmp_path / "a"), micro_batch_size=4, gradient_accumulation_steps=3))
    with pytest.raises(ConfigError, match="steps of 12 sequences, now they have 1"):
        pretrain(PretrainConfig(**{**more, "max_steps": 5}, out=str(tmp_path / "b"), batch_tokens=32))


def test_plans_count_it(teacher: Path, data: Path, tmp_path: Path) -> None:
    run = {"model": str(teacher), "data": str(data), "out": str(tmp_path / "m"), "max_tokens": 1024}
    plan = plan_run(PretrainConfig(**run, batch_tokens=16 * 32, num_processes=4))
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps, plan.steps) == (4, 1, 2)


def test_the_proposal_grows_with_the_run_and_is_whole_micro_batches(teacher: Path, data: Path, tmp_path: Path) -> None:
    # by hand, with Kaplan's constants: loss 2.98, critical size 1.11 million tokens
    assert proposed_batch_tokens(85_000_000, 10**9) == pytest.approx(111_000, rel=0.01)
    sizes = [proposed_batch_tokens(10**7, 10**power) for power in range(6, 11)]
    assert sizes == sorted(sizes)
    options_ = options(teacher, data, tmp_path / "m")
    assert options_.batch_tokens is None
    base = {"teacher": str(teacher), "data": str(data), "out": str(tmp_path / "s"), "micro_batch_size": 2}
    found = plan_budget(DistillConfig(**base, plan=True, budget_minutes=0.02))
    for one in found.candidates:
        assert one.batch_tokens % (2 * 32) == 0
        assert one.batch_tokens > 0
    timed = plan_budget(DistillConfig(**base, batch_tokens=6 * 32, plan=True, budget_minutes=0.02))
    assert all(one.tokens == one.steps * 6 * 32 for one in timed.candidates)


def test_what_is_printed_runs_again(cli: Callable, teacher: Path, data: Path, tmp_path: Path) -> None:
    command = ["pretrain", "--model", teacher, "--data", data, "--out", tmp_path / "m", "--max-steps", 1]
    printed = cli(*command, "--batch-tokens", 96, "--print-config").out
    (tmp_path / "run.yaml").write_text(printed)
    found = cli("pretrain", "--config", tmp_path / "run.yaml", "--json")
    assert found.code == 0, found.err
    assert found.json["tokens"] == 96
