"""Several processes: the numbers of one, no process that outlives another, errors as in one process."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import sentences
from tinygpt2 import DistillConfig, FinetuneConfig, PretrainConfig, TruncateStudentConfig, distill, finetune, pretrain
from tinygpt2.errors import ConfigError
from tinygpt2.models.quantization import rounded
from tinygpt2.runtime.launch import check_number
from tinygpt2.training.metrics import read_metrics

EXAMPLES = Path(__file__).parents[2] / "examples"


def close(one: Path, two: Path, far: float = 1e-5) -> None:
    """Compare the losses and evaluations of two runs, step by step."""
    left, right = read_metrics(one), read_metrics(two)
    assert len(left) == len(right) > 2
    for a, b in zip(left, right, strict=True):
        for key in a.keys() - {"tokens_per_second", "grad_norm", "total_steps"}:
            assert b[key] == pytest.approx(a[key], rel=far), (key, a["step"])
    assert right[-1]["eval/loss"] == pytest.approx(left[-1]["eval/loss"], rel=far / 10)


def test_two_processes_distil_as_one(teacher: Path, data: Path, tmp_path: Path) -> None:
    from tinygpt2 import truncate_student

    truncate_student(TruncateStudentConfig(teacher=str(teacher), num_layers=2, out=str(tmp_path / "cut")))
    base = {
        "teacher": str(teacher), "student": str(tmp_path / "cut"), "data": str(data), "recipe": "tinygpt2",
        "ce_weight": 0.5, "max_steps": 5, "log_every": 1, "eval_every": 2,
    }  # fmt: skip
    distill(DistillConfig(**base, out=str(tmp_path / "1"), micro_batch_size=8))
    two = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_processes": 2}
    distill(DistillConfig(**base, out=str(tmp_path / "2"), **two))
    close(tmp_path / "1", tmp_path / "2")


def test_two_processes_train_with_rounded_weights_as_one(teacher: Path, data: Path, tmp_path: Path) -> None:
    base = {"model": str(teacher), "data": str(data), "max_steps": 6, "log_every": 1, "eval_every": 2}
    base |= {"quantize": "q4_0", "learning_rate": 1e-3}
    pretrain(PretrainConfig(**base, out=str(tmp_path / "1"), micro_batch_size=8))
    pretrain(PretrainConfig(**base, out=str(tmp_path / "2"), micro_batch_size=4, num_processes=2))
    # a sum in another order may round a weight to its other neighbour
    close(tmp_path / "1", tmp_path / "2", far=1e-3)
    saved = load_file(tmp_path / "2" / "model.safetensors")
    assert all(torch.equal(rounded(name, weight, "q4_0"), weight) for name, weight in saved.items())


def test_two_processes_with_shared_state_finetune_a_text_as_one(teacher: Path, tmp_path: Path) -> None:
    """Two processes with Muon's state in parts, and one process that continues from their checkpoint."""
    text = tmp_path / "mine.txt"
    text.write_text(sentences(200, seed=5), encoding="utf-8")
    base = {
        "model": str(teacher), "data": str(text), "log_every": 1, "eval_every": 2, "eval_task": str(text),
        "optimizer": "muon", "lr_schedule": "constant",
    }  # fmt: skip
    one = finetune(FinetuneConfig(**base, out=str(tmp_path / "1"), micro_batch_size=4, max_steps=6))
    two = {**base, "out": str(tmp_path / "2")}
    finetune(FinetuneConfig(**two, micro_batch_size=2, max_steps=4, num_processes=2, shard_optimizer=True))
    last = finetune(FinetuneConfig(**two, micro_batch_size=4, max_steps=6, resume=True))
    close(tmp_path / "1", tmp_path / "2", far=1e-4)
    assert last.tasks == {"mine.txt": pytest.approx(one.tasks["mine.txt"], rel=1e-4)}


@pytest.mark.slow
def test_two_processes_pretrain_as_one_and_end_with_who_started_them(data: Path, tmp_path: Path) -> None:
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump({"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32}))
    base = {"model_config": str(shape), "data": str(data), "log_every": 1, "eval_every": 2}
    pretrain(PretrainConfig(**base, out=str(tmp_path / "1"), micro_batch_size=4, max_steps=4))
    pretrain(PretrainConfig(**base, out=str(tmp_path / "2"), micro_batch_size=2, max_steps=4, num_processes=2))
    close(tmp_path / "1", tmp_path / "2")
    out = tmp_path / "3"
    command = [
        sys.executable, "-m", "tinygpt2", "pretrain", "--model-config", str(shape), "--data", str(data), "--out", str(out),
        "--max-steps", "100000", "--num-processes", "2", "--log-every", "1",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not read_metrics(out):
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children()
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_an_error_in_a_process_is_the_error_of_the_call(teacher: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious.txt").write_text("x")
    with pytest.raises(ConfigError, match="not empty") as caught:
        pretrain(PretrainConfig(model=str(teacher), data=str(data), out=str(tmp_path / "m"), num_processes=2))
    assert caught.value.hint is not None


def test_another_launchers_number_counts(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="--num-processes 2, but 4 processes were launched"):
        pretrain(PretrainConfig(model=str(teacher), data=str(data), out=str(tmp_path / "m"), num_processes=2))


def test_processes_are_no_more_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="--num-processes 3, but there are 2 GPUs"):
        check_number(3)
    check_number(2)
    check_number(None)


@pytest.mark.slow
def test_two_processes_killed_stopped_and_resumed(teacher: Path, data: Path, tmp_path: Path) -> None:
    """One killed ends the other; a signal to the whole saves; resumed twice, no step is missing and none is there twice."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({
        "model": str(teacher), "data": str(data), "num_processes": 2, "micro_batch_size": 2, "max_steps": 90, "log_every": 1,
        "save_every": 10, "dropout": 0.1, "resume": True,
    }))  # fmt: skip
    out = tmp_path / "m"
    command = [sys.executable, "-m", "tinygpt2", "pretrain", "--config", str(file), "--out", str(out)]
    for harm, step in (("kill one", 12), ("ask all", 45)):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while not (rows := read_metrics(out)) or rows[-1]["step"] < step:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            if harm == "kill one":
                workers = [
                    child
                    for child in psutil.Process(process.pid).children()
                    if "spawn_main" in " ".join(child.cmdline())
                ]
                assert len(workers) == 2
                workers[-1].kill()
            else:
                os.kill(process.pid, signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        if harm == "kill one":
            assert process.returncode == 6  # it may have been for memory
            assert "was killed by SIGKILL; the others were stopped" in errors, errors
        else:
            assert process.returncode == 130
            assert "hint: add --resume" in errors
        assert errors.count("error: ") == (harm == "kill one"), errors
    alone = {**yaml.safe_load(file.read_text()), "num_processes": None, "micro_batch_size": 4, "out": str(out)}
    pretrain(PretrainConfig(**alone))
    assert [row["step"] for row in read_metrics(out)] == list(range(1, 91))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("launch", ["fsdp", "deepspeed", "deepspeed --zero_stage 3"])
def test_sharded_processes_distil_as_one(
    launch: str, precision: str, teacher: Path, data: Path, tmp_path: Path
) -> None:
    """By the example files themselves: the losses of one process, and the same weights when resumed."""
    by, *options = launch.split()
    if by == "deepspeed":
        pytest.importorskip("deepspeed", reason="not a dependency: nox -s deepspeed")
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump({"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32}))
    base = {
        "teacher": str(teacher), "student": str(shape), "data": str(data), "recipe": "tinygpt2", "ce_weight": 0.5,
        "optimizer": "adamw", "max_steps": 5, "log_every": 1, "eval_every": 3, "save_every": 2, "keep": 3,
        "precision": precision,
    }  # fmt: skip
    one = distill(DistillConfig(**base, out=str(tmp_path / "1"), micro_batch_size=8))
    two = DistillConfig(**base, out=str(tmp_path / "2"), micro_batch_size=2, gradient_accumulation_steps=2)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / f"accelerate-{by}.yaml"),
        "--num_processes", "2", *options, str(Path(__file__).parents[1] / "sharded_on_cpu.py"), "distill",
    ]  # fmt: skip
    weights: list[bytes] = []
    for resumed in (False, True)[: 2 if precision == "fp32" else 1]:
        done = subprocess.run(
            [*command, *shlex.split(two.flags()), *(["--resume"] if resumed else [])],
            capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"2 processes by {by.upper()}" in done.stderr
        close(tmp_path / "1", tmp_path / "2", 1e-5 if precision == "fp32" else 1e-3)
        assert ("resuming from" in done.stderr) == resumed
        weights.append((tmp_path / "2" / "model.safetensors").read_bytes())
        assert f"| parameters | {one.parameters:,} |" in (tmp_path / "2" / "README.md").read_text()
        shutil.rmtree(tmp_path / "2" / "checkpoints" / "step-5")
    assert weights[0] == weights[-1]
