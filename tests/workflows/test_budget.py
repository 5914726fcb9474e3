"""`--plan`: candidates timed, one chosen, commands that run."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config

from tests.conftest import Outcome, make_model
from tinygpt2 import DistillConfig, PretrainConfig, TruncateStudentConfig, pretrain, truncate_student
from tinygpt2.data.dataset import Blocks, load_packed_dataset
from tinygpt2.errors import ConfigError, MachineError
from tinygpt2.models.loading import load_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.training.optimizers import make_optimizer
from tinygpt2.training.step import Step
from tinygpt2.training.throughput import step_seconds
from tinygpt2.workflows import budget
from tinygpt2.workflows.budget import cuts, plan_budget


@pytest.mark.parametrize(("layers", "expected"), [(12, [9, 6, 4, 2]), (6, [4, 3, 2, 1]), (2, [1]), (1, [])])
def test_the_depths_that_are_tried(layers: int, expected: list[int]) -> None:
    assert cuts(GPT2Config(n_layer=layers)) == expected


def test_the_largest_cut_that_sees_enough_is_taken(teacher: Path, data: Path, tmp_path: Path, cli: object) -> None:
    """And the printed commands are run as they stand, with fewer steps."""
    out = tmp_path / "student"
    base = {"teacher": str(teacher), "data": str(data), "out": str(out), "micro_batch_size": 4, "temperature": 2.0}
    found = plan_budget(DistillConfig(**base, plan=True, budget_minutes=0.02))
    assert not out.exists()
    assert [one.num_layers for one in found.candidates] == cuts(GPT2Config(n_layer=4))
    for one in found.candidates:
        assert one.tokens == one.steps * 4 * 32
        assert one.steps <= 0.9 * 1.2 * one.tokens_per_second / (4 * 32)
    assert [one.parameters for one in found.candidates] == sorted(
        (one.parameters for one in found.candidates), reverse=True
    )
    enough = [one.student for one in found.candidates if one.tokens >= one.parameters]
    assert found.chosen == (enough or [one.student for one in reversed(found.candidates)])[0]
    assert found.search_seconds is None  # the time is too short
    assert "--temperature 2.0" in found.commands[1]
    assert "--plan" not in found.commands[1]
    for command in found.commands:
        words = shlex.split(command)[1:]
        if "--max-steps" in words:
            words[words.index("--max-steps") + 1] = "2"
        outcome: Outcome = cli(*words)  # type: ignore[operator]
        assert outcome.code == 0, outcome.err
    assert (out / "model.safetensors").is_file()


def test_cuts_are_measured_on_one_text(teacher: Path, data: Path, corpus: Path, tmp_path: Path) -> None:
    base = {
        "teacher": str(teacher),
        "data": str(data),
        "out": f"{tmp_path / 's'}/",
        "eval_data": str(corpus / "00.txt"),
    }
    found = plan_budget(DistillConfig(**base, plan=True, budget_minutes=600, freeze=["transformer.wpe.*"]))
    assert len(found.candidates) == 3
    assert max(one.passes for one in found.candidates) <= 4.1  # whatever the time
    assert f"--out {tmp_path / 's'}-start" in found.commands[0]
    chosen = next(one for one in found.candidates if one.student == found.chosen)
    assert found.search_seconds == pytest.approx(2 * 12 * 50 * 2048 / chosen.tokens_per_second)
    assert f"--target-params {chosen.parameters} " in found.commands[0]
    seconds = chosen.tokens / chosen.tokens_per_second + found.search_seconds + chosen.evaluation_seconds
    assert seconds < 600 * 60
    with pytest.raises(ConfigError, match="matches no parameter"):
        plan_budget(DistillConfig(**base, plan=True, freeze=["nothing"]))


def test_a_teacher_of_one_layer_cannot_be_cut(tokenizer_dir: Path, data: Path, tmp_path: Path) -> None:
    small = make_model(tmp_path / "m", tokenizer_dir, n_layer=1)
    with pytest.raises(ConfigError, match="cannot be cut in depth"):
        plan_budget(DistillConfig(teacher=str(small), data=str(data), out=str(tmp_path / "s"), plan=True))


def test_a_given_student_is_timed_alone(teacher: Path, data: Path, tmp_path: Path) -> None:
    truncate_student(TruncateStudentConfig(teacher=str(teacher), num_layers=1, out=str(tmp_path / "cut")))
    base = {"teacher": str(teacher), "data": str(data), "out": str(tmp_path / "s"), "student": str(tmp_path / "cut")}
    found = plan_budget(DistillConfig(**base, plan=True))
    assert [one.student for one in found.candidates] == [found.chosen] == [str(tmp_path / "cut")]
    assert found.minutes == 60
    (command,) = found.commands
    assert f"--max-steps {found.candidates[0].steps}" in command
    with pytest.raises(ConfigError, match="not one step fits"):
        plan_budget(DistillConfig(**base, plan=True, budget_minutes=1e-6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--student is required"),
        ({"plan": True, "teacher": None, "recipe": "truncation"}, "--teacher is required"),
        (
            {"plan": True, "validate_only": True, "max_steps": 3},
            "cannot be combined with --validate-only and --max-steps",
        ),
        ({"plan": True, "num_processes": 2}, "--plan uses one process"),
        ({"student": "s", "budget_minutes": 3}, "no effect without --plan"),
    ],
)
def test_what_cannot_be_planned(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**{"teacher": "t", "data": "d", "out": "o", **options})


def test_timed_steps_train_on_the_global_batches_in_order(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PretrainConfig(model=str(teacher), data=str(data), out=str(tmp_path), dropout=0, learning_rate=1e-3)
    blocks = load_packed_dataset(str(data)).train
    taken: list[int] = []
    whole = Blocks.batch
    monkeypatch.setattr(Blocks, "batch", lambda self, rows: [taken.extend(rows), whole(self, rows)][1])
    for optimizing in (False, True):
        taken.clear()
        module = Step(load_model(str(teacher))[0], None, LossWeights(ce=1.0), config).train()
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        optimizer = make_optimizer(module, config) if optimizing else None
        sequences = len(blocks) // 2 // 3 * 3
        seconds = step_seconds(Accelerator(cpu=True), module, optimizer, blocks, sequences, size=3, steps=3)
        assert len(seconds) == 3
        assert min(seconds) > 0
        assert taken == [row % len(blocks) for row in range(3 * sequences)]
        assert optimizing != all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_every_training_command_plans(command: str, teacher: Path, data: Path, tmp_path: Path, cli: Callable) -> None:
    out = tmp_path / "o"
    base = [command, "--model", teacher, "--data", data, "--out", out, "--eval-every", 5, "--eval-blocks", 2]
    outcome = cli(*base, "--plan", "--budget-minutes", 0.01)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[0].endswith("  evaluation")
    assert not out.exists()
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("tinygpt2 ")]
    words = shlex.split(line)
    assert words[1] == command
    assert "--plan" not in words
    assert int(words[words.index("--max-steps") + 1]) > 0


def test_evaluations_take_their_share_of_the_time(teacher: Path, data: Path, tmp_path: Path) -> None:
    base = {"model": str(teacher), "data": str(data), "out": str(tmp_path / "o"), "plan": True}
    (rare,) = plan_budget(PretrainConfig(**base, budget_minutes=0.05)).candidates
    (often,) = plan_budget(PretrainConfig(**base, budget_minutes=0.05, eval_every=1)).candidates
    assert often.evaluation_seconds > rare.evaluation_seconds > 0
    assert often.steps < rare.steps


def test_steps_are_timed_with_their_sampling(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"teacher": str(teacher), "student": str(teacher), "data": str(data), "out": str(tmp_path / "o")}
    widths, original = [], budget.OwnText.into

    def seen(self: budget.OwnText, *where: object) -> object:
        found = original(self, *where)
        widths.append(int(found[0].own_text.sum()))
        return found

    monkeypatch.setattr(budget.OwnText, "into", seen)
    (one,) = plan_budget(DistillConfig(**base, plan=True, on_policy_fraction=0.5, micro_batch_size=4)).candidates
    assert one.steps > 0
    assert len(widths) == 4
    assert all(widths)


def test_a_student_that_does_not_fit_is_a_line(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    timed, limit = budget._timed, [3]

    def short_of_memory(name: str, layers: int, *rest: object) -> object:
        if layers >= limit[0]:
            raise MemoryError
        return timed(name, layers, *rest)

    monkeypatch.setattr(budget, "_timed", short_of_memory)
    monkeypatch.setattr(budget, "say", said.append)
    config = DistillConfig(teacher=str(teacher), data=str(data), out=str(tmp_path / "s"), plan=True)
    assert [one.num_layers for one in plan_budget(config).candidates] == [2, 1]
    assert said[0].startswith("3 of 4 layers is left out: out of memory")
    limit[0] = 0
    with pytest.raises(MachineError, match="out of memory"):
        plan_budget(config)


def test_pilots_predict_the_loss_of_the_planned_run(
    teacher: Path, data: Path, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = tmp_path / "shape.yaml"
    shape.write_text("{n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32}")
    base = {"model_config": str(shape), "data": str(data), "out": str(tmp_path / "m"), "micro_batch_size": 2}
    config = PretrainConfig(**base, plan=True, pilot=True, budget_minutes=60, target_perplexity=300)
    plan = plan_budget(config)
    (one,), found = plan.candidates, plan.prediction
    assert not (tmp_path / "m").exists()
    assert [tokens for tokens, _ in found.pilots] == [max(2, round(one.steps / n)) * 64 for n in (48, 24, 12)]
    losses = [loss for _, loss in found.pilots]
    assert losses == sorted(losses, reverse=True)
    assert found.loss < losses[-1]
    assert found.error > 0
    assert "--pilot" not in plan.commands[0]
    short = pretrain(PretrainConfig(**base, max_steps=max(2, round(one.steps / 48))))
    assert short.eval.loss == losses[0]  # a pilot is a plain run of its length
    other, timed = {**base, "out": str(tmp_path / "other")}, budget._timed
    monkeypatch.setattr(budget, "_timed", lambda *arguments: replace(timed(*arguments), steps=20))
    options = (f"--{name.replace('_', '-')}={value}" for name, value in other.items())
    printed = cli("pretrain", *options, "--plan", "--pilot", "--budget-minutes", 1)
    assert printed.code == 0, printed.err
    assert "too short to be predicted" in printed.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pilot": True}, "--pilot has no effect without --plan"),
        ({"plan": True, "target_perplexity": 20}, "--target-perplexity has no effect without --pilot"),
        ({"plan": True, "pilot": True, "student": None}, "--pilot needs --student"),
    ],
)
def test_what_a_pilot_needs(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**{"teacher": "t", "student": "s", "data": "d", "out": "o", **options})
