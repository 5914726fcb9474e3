"""Steps that go wrong: not finite, out of memory; and what is known of a run before it begins."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import GPT2Config

from tests.conftest import sentences
from tests.training.test_checkpoint import options
from tests.training.test_train import same
from tinygpt2 import DistillConfig, FinetuneConfig, PretrainConfig, plan_run, pretrain
from tinygpt2.config.training import TrainOptions
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.errors import ConfigError, DivergedError, ModelError
from tinygpt2.models.loading import load_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.planning import batch_size
from tinygpt2.planning.memory_estimate import saved_bytes
from tinygpt2.training import loop
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.throughput import layer_operations, step_operations

Spoil = Callable[..., None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the gradients of some steps, counted from 1, what no optimizer may see."""

    def at(*steps: int) -> None:
        calls = []
        real = loop.gradients

        def gradients(accelerator: object, module: torch.nn.Module, *rest: object) -> dict[str, torch.Tensor]:
            terms = real(accelerator, module, *rest)
            calls.append(1)
            if len(calls) in steps:
                next(module.parameters()).grad[0] = math.nan
            return terms

        monkeypatch.setattr(loop, "gradients", gradients)

    return at


def test_a_step_that_is_not_finite_says_all_that_helps(teacher: Path, data: Path, tmp_path: Path, spoil: Spoil) -> None:
    spoil(5)
    with pytest.raises(DivergedError) as caught:
        pretrain(options(teacher, data, tmp_path / "m"))
    blocks = Shuffle(len(load_packed_dataset(str(data)).train), 42)[16:20]
    assert "the loss or the gradient of step 5 is NaN or infinite: loss " in caught.value.message
    assert "loss/ce " in caught.value.message
    assert "gradient norm nan" in caught.value.message
    assert caught.value.message.endswith(f"training blocks {', '.join(map(str, blocks))}")
    assert caught.value.exit_code == 5
    assert (tmp_path / "m" / "checkpoints" / "step-4").is_dir()


def test_steps_that_are_not_finite_are_skipped_and_counted(
    teacher: Path, data: Path, tmp_path: Path, spoil: Spoil
) -> None:
    spoil(3, 5)
    pretrain(options(teacher, data, tmp_path / "m", skip_non_finite=2))
    assert [row.get("skipped", 0) for row in read_metrics(tmp_path / "m")] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert all(bool(torch.isfinite(p).all()) for p in load_model(str(tmp_path / "m"))[0].parameters())


def test_the_count_of_skipped_steps_outlives_a_resume(teacher: Path, data: Path, tmp_path: Path, spoil: Spoil) -> None:
    spoil(2, 4)
    with pytest.raises(DivergedError, match="step 4 is"):
        pretrain(options(teacher, data, tmp_path / "m", skip_non_finite=1, save_every=3))
    pretrain(options(teacher, data, tmp_path / "m", skip_non_finite=1, save_every=3, resume=True))
    assert read_metrics(tmp_path / "m")[-1]["skipped"] == 1


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_steps_that_overflow_in_fp16_lower_the_scale(
    teacher: Path, data: Path, tmp_path: Path, spoil: Spoil, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A loss scaler for the CPU: two steps overflow and change nothing, and only the third stops the run."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    prepare, scales, unchanged = Accelerator.prepare, [], []

    def scaled(self: Accelerator, *parts: object) -> object:
        self.scaler, self.native_amp = scaler, True
        self.state._mixed_precision = "fp16"
        monkeypatch.setattr(self, "autocast", nullcontext)
        return prepare(self, *parts)

    def counted(*args: object) -> bool:
        scales.append(scaler.get_scale())
        return real(*args)

    monkeypatch.setattr(Accelerator, "prepare", scaled)
    real = loop.may_step
    monkeypatch.setattr(loop, "may_step", counted)
    spoil(2, 3, 5)
    with pytest.raises(DivergedError, match="step 5 is"):
        pretrain(options(teacher, data, tmp_path / "m", optimizer=kind, save_every=1))
    assert scales == [4.0, 4.0, 2.0, 1.0, 1.0]
    saved = [load_file(tmp_path / "m" / "checkpoints" / f"step-{step}" / "model.safetensors") for step in range(1, 5)]
    for before, after in pairwise(saved):
        unchanged.append(all(torch.equal(before[name], after[name]) for name in before))
    assert unchanged == [True, True, False]
    assert [row.get("skipped", 0) for row in read_metrics(tmp_path / "m")] == [0] * 4


def test_out_of_memory_says_what_to_lower(teacher: Path, data: Path, tmp_path: Path) -> None:
    script = f"""
import resource, sys
from tinygpt2.cli.app import main
import torch, transformers.models.gpt2.modeling_gpt2, tinygpt2.workflows.train, psutil
limit = psutil.Process().memory_info().vms + 1_500_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main(["pretrain", "--model", {str(teacher)!r}, "--data", {str(data)!r}, "--out", {str(tmp_path / "m")!r},
      "--micro-batch-size", "16384", "--max-steps", "2"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    assert "out of memory in a step of 16384 x 32 tokens: the process held" in done.stderr
    assert "hint: lower --micro-batch-size" in done.stderr


def test_validate_only_says_what_a_run_takes_and_writes_nothing(teacher: Path, data: Path, tmp_path: Path) -> None:
    config = options(teacher, data, tmp_path / "m", max_steps=None, num_processes=2)
    found = plan_run(config)
    sequences = len(load_packed_dataset(str(data)).train)
    parameters = sum(p.numel() for p in load_model(str(teacher))[0].parameters())
    assert (found.parameters, found.train_sequences, found.processes) == (parameters, sequences, 2)
    assert found.steps == math.ceil(sequences / 8)
    assert found.tokens == found.steps * 8 * 32
    assert found.disk_bytes > 12 * parameters
    assert not (tmp_path / "m").exists()


def test_validate_only_finds_what_does_not_fit(teacher: Path, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    common = {"data": str(data), "out": str(tmp_path / "o"), "max_steps": 1}
    heads = tmp_path / "heads.yaml"
    heads.write_text(yaml.safe_dump({"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32}))
    with pytest.raises(ConfigError, match="2 heads, the teacher 4"):
        plan_run(DistillConfig(teacher=str(teacher), student=str(heads), recipe="tinygpt2", **common))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in teacher.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["transformer.wpe.weight"] = torch.zeros(8, 32)
    save_file(tensors, broken / "model.safetensors")
    expected = r"wpe.weight should have shape \[32, 32\] \(from config.json\), but the weight files have \[8, 32\]"
    with pytest.raises(ModelError, match=expected):
        plan_run(PretrainConfig(model=str(broken), **common))
    text = tmp_path / "mine.txt"
    text.write_text(sentences(100, seed=3))
    found = plan_run(FinetuneConfig(model=str(teacher), **{**common, "data": str(text)}))
    assert found.train_sequences > 10
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_compile_only_compiles_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump({"n_layer": 1, "n_embd": 32, "n_head": 4, "n_positions": 32}))
    command = [
        sys.executable, "-m", "tinygpt2", "pretrain", "--model-config", str(shape), "--data", str(data),
        "--out", str(tmp_path / "m"), "--compile-only", "--json",
    ]  # fmt: skip
    cache = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=cache)
    found = json.loads(done.stdout)
    assert found["compile_seconds"] > found["step_seconds"] > 0
    assert found["cache"] == str(tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.cpp"))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("free", "expected"), [(10**12, 8), (0, None), (None, 2)])
def test_auto_batch_size_keeps_the_global_batch(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int | None, expected: int | None
) -> None:
    config = options(teacher, data, tmp_path / "a", auto_batch_size=True, micro_batch_size=4,
                     gradient_accumulation_steps=2, dropout=0)  # fmt: skip
    if free is None:  # room for three blocks, of which two divide the batch
        model, _ = load_model(str(teacher))
        fixed, each = batch_size.step_memory(model, None, LossWeights(), config, 32)
        free = int((fixed + 3.5 * each) / batch_size._FILLED)
    monkeypatch.setattr(batch_size, "free_memory", lambda processes: free)
    said: list[str] = []
    monkeypatch.setattr(batch_size, "say", said.append)
    if expected is None:
        with pytest.raises(ConfigError, match="not even one block of 32 tokens fits"):
            pretrain(config)
        return
    pretrain(config)
    assert said == [f"--auto-batch-size: {expected} blocks in a micro-batch, {8 // expected} micro-batches in a step"]
    by_hand = {"micro_batch_size": expected, "gradient_accumulation_steps": 8 // expected, "dropout": 0}
    pretrain(options(teacher, data, tmp_path / "b", **by_hand))
    assert same(tmp_path / "a", tmp_path / "b")


def test_operations_are_those_of_the_matrix_products() -> None:
    shape = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_inner=40, vocab_size=100)
    per_weight = 16 * 48 + 16 * 16 + 16 * 40 + 40 * 16
    assert layer_operations(shape, 8) == 2 * per_weight + 2 * 8 * 16
    language = 3 * 2 * layer_operations(shape, 8) + 6 * 16 * 100
    assert step_operations(shape, None, LossWeights(), 8) == language
    taught = LossWeights(ce=0.0, prediction=1.0)
    assert step_operations(shape, shape, taught, 8) == language + 2 * layer_operations(shape, 8) + 2 * 16 * 100
    assert step_operations(shape, shape, taught, 8, cached=0.5) == language + layer_operations(shape, 8) + 2 * 16 * 100
    assert step_operations(shape, shape, taught, 8, cached=1.0) == language + 2 * 16 * 100


def test_what_a_step_keeps_is_counted_as_torch_counts_it() -> None:
    shape = GPT2Config(n_layer=3, n_embd=32, n_head=4, n_positions=64, vocab_size=50)
    options_ = TrainOptions(out="o")
    one, two = (saved_bytes(shape, None, LossWeights(), options_, size, 64) for size in (1, 2))
    again = saved_bytes(shape, None, LossWeights(), TrainOptions(out="o", gradient_checkpointing=True), 2, 64)
    layer = 64 * 32 * 4
    # the least that a layer must keep: its fused queries, keys and values, two hidden layers of the MLP, two inputs
    assert 3 * (3 + 8 + 2) * layer < two - one < 3 * (3 + 8 + 10) * layer
    assert again < two / 3
