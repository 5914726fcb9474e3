"""`--profile`: the steps that are traced, the file, the table; a run that is too short says so."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from tests.training.test_checkpoint import options
from tests.training.test_train import same
from tinygpt2 import pretrain
from tinygpt2.runtime import profiling
from tinygpt2.runtime.profiling import kernel_table, profiled


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(profiling, "say", lines.append)
    return lines


def test_a_run_is_traced_and_computes_the_same(teacher: Path, data: Path, tmp_path: Path, said: list[str]) -> None:
    pretrain(options(teacher, data, tmp_path / "a", max_steps=6, profile=2))
    with gzip.open(tmp_path / "a" / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}  # counted from 0
    assert any("addmm" in str(event.get("name")) for event in events)
    assert "trace.json.gz" in said[0]
    assert 3 < len(said) <= 12
    assert "operation" in said[1]
    pretrain(options(teacher, data, tmp_path / "b", max_steps=6))
    assert same(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b" / "profile").exists()


def test_a_run_that_ends_before_the_trace_says_so(teacher: Path, data: Path, tmp_path: Path, said: list[str]) -> None:
    pretrain(options(teacher, data, tmp_path / "m", max_steps=2, profile=2))
    assert said == ["--profile: the run ended before the trace began, after step 3"]
    assert not (tmp_path / "m" / "profile").exists()


def test_a_run_that_ends_during_the_trace_writes_what_there_is(
    teacher: Path, data: Path, tmp_path: Path, said: list[str]
) -> None:
    pretrain(options(teacher, data, tmp_path / "m", max_steps=5, profile=10))
    assert (tmp_path / "m" / "profile" / "trace.json.gz").is_file()


def test_only_the_first_process_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setattr(profiling, "rank", lambda: 1)
    with profiled(1, tmp_path / "profile") as profiler:
        for _ in range(5):
            profiler.step()
    assert not said
    assert not (tmp_path / "profile").exists()


def test_the_table_shows_the_kernels_of_a_gpu_if_there_are_any() -> None:
    def event(key: str, device: DeviceType, cpu: float, gpu: float) -> SimpleNamespace:
        return _Event(key=key, device_type=device, self_cpu_time_total=cpu, self_device_time_total=gpu, count=3)

    host = [event("aten::mm", DeviceType.CPU, 9000.0, 0.0), event("ProfilerStep*", DeviceType.CPU, 1e6, 0.0)]
    card = [event(f"kernel{n}", DeviceType.CUDA, 0.0, 1000.0 * n) for n in range(1, 13)]
    card.append(event("void " + "x" * 200, DeviceType.CUDA, 0.0, 22000.0))
    table = kernel_table([*host, *card])
    assert len(table) == 11
    assert table[1].split()[:3] == ["22.0%", "22.00", "3"]
    assert all(len(line) < 100 for line in table)
    assert "aten::mm" not in "".join(table)
    assert [line.split()[-1] for line in kernel_table(host)] == ["operation", "aten::mm"]


class _Event(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def test_the_command_line_shows_the_table(teacher: Path, data: Path, tmp_path: Path, cli: Callable) -> None:
    outcome = cli(
        "pretrain", "--model", teacher, "--data", data, "--out", tmp_path / "m", "--max-steps", 5, "--profile", 1
    )
    assert outcome.code == 0, outcome.err
    assert "ui.perfetto.dev" in outcome.err
    assert "aten::" in outcome.err
    assert "aten::" not in outcome.out
