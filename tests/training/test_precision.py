"""`--precision auto`: what the device has, what a run was begun with, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.training.test_checkpoint import options
from tests.training.test_train import same
from tinygpt2 import DistillConfig, PretrainConfig, plan_budget, plan_run, pretrain
from tinygpt2.config.training import TrainOptions
from tinygpt2.config.yaml_files import read_yaml
from tinygpt2.errors import ConfigError
from tinygpt2.runtime import cpu
from tinygpt2.runtime.devices import chosen_precision
from tinygpt2.training import preparation, resuming
from tinygpt2.training.resuming import with_precision


@pytest.mark.parametrize(
    ("gpu", "has_bf16", "expected"), [(True, True, "bf16"), (True, False, "fp16"), (False, True, "fp32")]
)
def test_auto_is_what_the_device_has(gpu: bool, has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that torch only names; emulated bfloat16 does not count."""

    def supported(*, including_emulation: bool) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert chosen_precision("auto") == expected
    assert chosen_precision("fp32") == "fp32"
    assert with_precision(TrainOptions(out="none")).precision == expected


def test_the_resolved_precision_is_recorded_planned_and_printed(
    teacher: Path, data: Path, tmp_path: Path, cli: Callable
) -> None:
    assert PretrainConfig(model="m", data="d", out="o").precision == "auto"
    run = options(teacher, data, tmp_path / "m", max_steps=1)
    assert plan_run(run).precision == "fp32"
    assert plan_run(run.model_copy(update={"precision": "bf16"})).precision == "bf16"
    pretrain(run)
    assert read_yaml(tmp_path / "m" / "config.yaml")["precision"] == "fp32"
    plan = {"teacher": str(teacher), "data": str(data), "out": str(tmp_path / "s"), "micro_batch_size": 2}
    found = plan_budget(DistillConfig(**plan, plan=True, budget_minutes=0.02))
    assert found.precision == "fp32"
    assert "--precision fp32" in found.commands[1]
    outcome = cli("pretrain", "--model", teacher, "--data", data, "--out", tmp_path / "n", "--validate-only")
    assert "precision" in outcome.out
    assert "fp32" in outcome.out


def test_a_resumed_run_keeps_the_precision_it_was_begun_with(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine where `auto` means something else, and for runs from before `auto` was the default."""
    pretrain(options(teacher, data, tmp_path / "a", precision="bf16", max_steps=2, lr_schedule="constant"))
    pretrain(options(teacher, data, tmp_path / "a", max_steps=4, lr_schedule="constant", resume=True))
    assert read_yaml(tmp_path / "a" / "config.yaml")["precision"] == "bf16"
    pretrain(options(teacher, data, tmp_path / "b", precision="bf16", max_steps=4, lr_schedule="constant"))
    assert same(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(resuming, "chosen_precision", lambda asked: "fp16")
    assert with_precision(options(teacher, data, tmp_path / "a", resume=True)).precision == "bf16"
    assert with_precision(options(teacher, data, tmp_path / "new", resume=True)).precision == "fp16"
    with pytest.raises(ConfigError, match="--precision differ"):
        pretrain(options(teacher, data, tmp_path / "a", precision="fp32", max_steps=5, resume=True))


def test_bf16_units_of_a_cpu_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(resuming, "say", said.append)
    for unit, told in (("avx512_bf16", 1), ("amx_bf16", 1), ("avx512_f", 0)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda unit=unit: {unit: True}, raising=False)
        assert cpu.has_bf16_units() == bool(told)
        said.clear()
        resuming._tell_precision.cache_clear()
        for precision in ("auto", "auto", "fp32"):
            with_precision(TrainOptions(out="none", device="cpu", precision=precision))
        assert len(said) == told
    assert "--precision bf16" in "".join(said) or not said


@pytest.mark.parametrize(("fast", "told"), [(False, 1), (True, 0)])
def test_slow_bf16_is_told_once(fast: bool, told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(resuming, "say", said.append)
    monkeypatch.setattr(resuming, "has_fast_bf16", lambda device: fast)
    resuming._tell_slow_bf16.cache_clear()
    for precision in ("fp32", "bf16", "bf16"):
        with_precision(TrainOptions(out="none", device="cpu", precision=precision))
    assert len(said) == told


def test_machines_whose_gpus_differ_are_refused(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "gather_object", lambda own: [*own, "fp16"])
    with pytest.raises(ConfigError, match="GPUs of the machines differ"):
        pretrain(options(teacher, data, tmp_path / "m"))
