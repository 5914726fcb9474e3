"""`--device`: refused where there is none, used by every command, and float64 only where it exists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tinygpt2.cli.commands import COMMANDS
from tinygpt2.config.models import DeviceOptions
from tinygpt2.runtime import devices, memory
from tinygpt2.runtime.devices import current_device, device_chosen, float64_device, on_cuda


def test_every_command_that_computes_has_the_option() -> None:
    having = {command.name for command in COMMANDS if issubclass(command.config, DeviceOptions)}
    training = {"quickstart", "pretrain", "distill", "finetune"}
    assert having == training | {"truncate-student", "teach", "sample", "ppl", "evaluate-text", "generate", "bench"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused_before_anything_is_written(
    data: Path, teacher: Path, tmp_path: Path, cli: Callable
) -> None:
    out = tmp_path / "out"
    for arguments in (
        ("pretrain", "--model", teacher, "--data", data, "--out", out),
        ("truncate-student", "--teacher", teacher, "--num-layers", 2, "--out", out),
        ("ppl", "--model", teacher, "--task", data),
        ("generate", "--model", teacher, "--prompt", "the"),
    ):
        outcome = cli(*arguments, "--device", "cuda")
        assert outcome.code == 2
        assert "--device cuda: torch" in outcome.err
        assert "finds no CUDA GPU on this machine" in outcome.err
    assert not out.exists()


def test_the_cpu_can_be_chosen(data: Path, teacher: Path, tmp_path: Path, cli: Callable) -> None:
    outcome = cli(
        "finetune", "--model", teacher, "--data", data, "--out", tmp_path / "m", "--max-steps", 1, "--device", "cpu"
    )
    assert outcome.code == 0, outcome.err
    assert "device: cpu" in (tmp_path / "m" / "config.yaml").read_text()


def test_a_choice_ends_with_its_block_and_auto_keeps_the_one_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with both kinds of GPU, which torch only names."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert current_device().type == "cuda"
    with device_chosen("mps"):
        assert current_device().type == "mps"
        assert not on_cuda()
        with device_chosen("cpu"):
            assert current_device().type == "cpu"
        with device_chosen("auto"):
            assert current_device().type == "mps"
    assert current_device().type == "cuda"
    assert devices._chosen == "auto"


def test_float64_is_computed_on_the_cpu_for_apples_gpus() -> None:
    assert float64_device(torch.device("mps")) == torch.device("cpu")
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_a_gpu_that_only_emulates_bfloat16_is_slow_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for real in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation, real=real: real)
        assert devices.has_fast_bf16(torch.device("cuda")) == real


def test_files_that_the_system_keeps_in_memory_are_free_in_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {"memory.max": "1000000\n", "memory.current": "900000\n"}
    numbers["memory.stat"] = "anon 300000\ninactive_file 400000\nactive_file 100000\n"
    for name, text in numbers.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path)
    assert memory.available_memory() == 600_000
