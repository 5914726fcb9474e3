"""What only a card can show: values, kernels, memory, waits. Skipped where there is none."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config

from tinygpt2 import DistillConfig, PretrainConfig, distill, pretrain
from tinygpt2.config.training import TrainOptions
from tinygpt2.errors import MachineError
from tinygpt2.models.activations import collect_activations
from tinygpt2.models.loading import random_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.training import loop
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.step import Step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
DEVICE = "cuda"
WAITS = 1  # of the host for the GPU in a step
OBJECTIVES = {
    **{loss: LossWeights(prediction=1.0, ce=0.5, temperature=2.0, loss=loss)  # type: ignore[arg-type]
       for loss in ("soft_ce", "forward_kl", "reverse_kl", "jsd")},
    "language modelling": LossWeights(),
    "all": LossWeights(1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """No TF32, and no memory of the test before."""
    torch.set_float32_matmul_precision("highest")
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def model(layers: int, heads: int, width: int = 64) -> Any:
    shape = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, n_positions=96, vocab_size=1001, initializer_range=0.1,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return random_model(shape, layers)


def step_of(weights: LossWeights, device: str, precision: torch.dtype | None) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of one micro-batch on a device, and the gradients."""
    teacher = model(4, 4).eval().requires_grad_(False).to(device)
    options = PretrainConfig(data="", out="", shape="gpt2", dropout=0.0)
    module = Step(model(2, 4), teacher, weights, options).to(device).train()
    for one in module.student.modules():
        if isinstance(one, torch.nn.Dropout):
            one.p = 0.0
    ids = torch.randint(0, 1001, (4, 96), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device, precision or torch.bfloat16, enabled=precision is not None):
        loss, _ = module(ids)
    loss.backward()
    return float(loss.detach()), {
        name: one.grad.cpu() for name, one in module.named_parameters() if one.grad is not None
    }


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("precision", "far"), [(None, 1e-5), (torch.bfloat16, 1e-2)])
def test_losses_and_gradients_are_those_of_the_cpu(name: str, precision: torch.dtype | None, far: float) -> None:
    (loss, expected), (found, gradients) = (
        step_of(OBJECTIVES[name], "cpu", None),
        step_of(OBJECTIVES[name], DEVICE, precision),
    )
    assert found == pytest.approx(loss, rel=far)
    for parameter, gradient in gradients.items():
        distance = (gradient - expected[parameter]).norm() / expected[parameter].norm().clamp(min=1e-6)
        assert distance < 10 * far, parameter


def options(teacher: Path, data: Path, out: Path, **more: Any) -> PretrainConfig:
    fixed = {"micro_batch_size": 4, "max_steps": 8, "save_every": 2, "keep": 9, "log_every": 1, "precision": "fp32"}
    return PretrainConfig(**{**fixed, "model": str(teacher), "data": str(data), "out": str(out), **more})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fp16_takes_twenty_steps_without_a_skip(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    scales: list[float] = []
    may_step = loop.may_step

    def seen(accelerator: Any, *arguments: Any) -> bool:
        scales.append(accelerator.scaler.get_scale())
        assert may_step(accelerator, *arguments)
        return True

    monkeypatch.setattr(loop, "may_step", seen)
    distill(
        DistillConfig(
            teacher=str(teacher),
            student=str(teacher),
            data=str(data),
            out=str(tmp_path / "m"),
            max_steps=20,
            micro_batch_size=4,
            precision="fp16",
            optimizer=optimizer,
        )
    )
    assert len(scales) == 20
    assert len(set(scales)) == 1  # the scaler lowers its scale after a skipped step


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    teacher: Path, data: Path, tmp_path: Path, precision: str
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    pretrain(options(teacher, data, whole, precision=precision))
    shutil.copytree(whole, part)
    for step in (6, 8):
        shutil.rmtree(part / "checkpoints" / f"step-{step}")
    pretrain(options(teacher, data, part, precision=precision, resume=True))
    ends = read_metrics(whole)[-1], read_metrics(part)[-1]
    assert ends[0]["step"] == ends[1]["step"] == 8
    assert ends[1]["loss"] == pytest.approx(ends[0]["loss"], rel=1e-5 if precision == "fp32" else 1e-3)


def test_auto_batch_size_stops_before_memory_runs_out(teacher: Path, data: Path, tmp_path: Path) -> None:
    whole = 2**15
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(max(0, free - 2**30), dtype=torch.uint8, device=DEVICE)  # one GiB is left
    out = tmp_path / "m"
    pretrain(options(teacher, data, out, micro_batch_size=whole, auto_batch_size=True, max_steps=2))
    del taken
    (said,) = re.findall(r"micro_batch_size: (\d+)", (out / "config.yaml").read_text())
    assert 1 <= int(said) < whole
    assert len(read_metrics(out)) == 2


def test_lack_of_memory_is_explained(teacher: Path, data: Path, tmp_path: Path) -> None:
    torch.cuda.set_per_process_memory_fraction(0.01)
    with pytest.raises(MachineError, match=r"out of memory in a step of .* of the GPU's .* were in use") as raised:
        pretrain(options(teacher, data, tmp_path / "m", micro_batch_size=2**17))
    assert "--micro-batch-size" in raised.value.hint
    assert "--auto-batch-size" in raised.value.hint


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_train_as_one(teacher: Path, data: Path, tmp_path: Path, optimizer: str) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    pretrain(options(teacher, data, one, optimizer=optimizer, num_processes=1))
    pretrain(options(teacher, data, two, optimizer=optimizer, micro_batch_size=2, num_processes=2))
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "kernel"), [(torch.bfloat16, SDPBackend.FLASH_ATTENTION), (torch.float32, SDPBackend.EFFICIENT_ATTENTION)]
)
@pytest.mark.parametrize("width", [64, 104])  # heads of 16 and of 26
def test_attention_never_needs_t_x_t_matrices(dtype: torch.dtype, kernel: SDPBackend, width: int) -> None:
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card has no flash attention")
    one, ids = model(2, 4, width).to(DEVICE), torch.zeros(2, 96, dtype=torch.int64, device=DEVICE)
    with sdpa_kernel([kernel]), torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        states = collect_activations(one, ids, [2]).states[2]  # raises an error if the kernel cannot be used
        states.float().sum().backward()
    assert one.transformer.h[0].attn.c_attn.weight.grad.isfinite().all()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_hardly_waits_for_the_gpu(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """CUDA's own count of what tests/fake_gpu counts: its warnings from the third step to the fifth."""
    waits: list[list[str]] = []
    seed_step: Callable[..., None] = loop.seed_step

    def begin(*arguments: Any) -> None:
        torch.cuda.set_sync_debug_mode("warn" if arguments[1] in (2, 3) else "default")
        waits.append([])
        seed_step(*arguments)

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            waits[-1].append(str(message))

    monkeypatch.setattr(loop, "seed_step", begin)
    config: TrainOptions = options(
        teacher, data, tmp_path / "m", gradient_accumulation_steps=accumulation, max_steps=5, log_every=1000,
        save_every=1000, precision="bf16",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", note)
        try:
            pretrain(config)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for step in (2, 3):
        assert len(waits[step]) <= WAITS, waits[step]
