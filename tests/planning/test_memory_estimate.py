"""What `--validate-only` says of memory on a GPU: the card's, with the chunks as they are set. The GPU is pretended."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from tests.training.test_checkpoint import options
from tinygpt2 import plan_run
from tinygpt2.config.training import TrainOptions
from tinygpt2.models.lm_head import default_chunk, operand_rows
from tinygpt2.models.loading import random_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.planning import dry_run
from tinygpt2.planning.memory_estimate import step_memory
from tinygpt2.runtime import memory
from tinygpt2.runtime.memory import free_memory, memory_in_use, peak_memory

SHAPE = GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=64, vocab_size=1000)
LANGUAGE = LossWeights()
TAUGHT = LossWeights(ce=0.0, prediction=1.0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (5 * 10**9, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 7)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device=None: 8)


def estimate(precision: str, weights: LossWeights = LANGUAGE, **more: object) -> tuple[int, int]:
    """Return the fixed part and that of a block, for a student of two layers and a teacher of its shape."""
    student = random_model(SHAPE, 0, hollow=True)
    teacher = random_model(SHAPE, 0, hollow=True) if weights.prediction else None
    return step_memory(student, teacher, weights, TrainOptions(out="o", precision=precision, **more), 64)


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
@pytest.mark.parametrize(("weights", "matrices"), [(LANGUAGE, 2), (TAUGHT, 3)])
def test_a_chunk_counts_as_it_is_set(
    gpu: None, precision: str, width: int, weights: LossWeights, matrices: int
) -> None:
    rows = operand_rows(1000, "cuda")
    small, large = (estimate(precision, weights, logit_chunk=chunk) for chunk in (256, 1024))
    assert large[0] - small[0] == matrices * 768 * rows * width
    assert large[1] == small[1]
    default = estimate(precision, weights)
    assert default[0] - small[0] == matrices * (default_chunk(1000, "cuda") - 256) * rows * width


def test_what_is_saved_once_does_not_count_for_every_block(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the output matrix (V x D in float32), and the linear layers in autocast's type."""
    on_card = estimate("bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert estimate("bf16")[1] - on_card[1] == pytest.approx(4 * 1000 * 64 + 2 * 2 * 12 * 64**2, rel=0.01)


def test_the_frozen_teacher_is_counted_as_it_is_cast(gpu: None) -> None:
    layers = sum(parameter.numel() for parameter in random_model(SHAPE, 0).transformer.h.parameters())
    exact, short = (estimate(precision, TAUGHT, logit_chunk=64)[0] for precision in ("fp32", "bf16"))
    alone = [estimate(precision, LANGUAGE, logit_chunk=64)[0] for precision in ("fp32", "bf16")]
    logits = 64 * operand_rows(1000, "cuda") * 2 + operand_rows(1000, "cuda") * 64 * 2
    assert (exact - short) - (alone[0] - alone[1]) == pytest.approx(2 * layers + logits, rel=0.02)


def test_without_logits_there_is_no_chunk(gpu: None) -> None:
    inner = LossWeights(ce=0.0, hidden=1.0)
    student, teacher = (random_model(SHAPE, 0, hollow=True) for _ in range(2))
    found = [
        step_memory(student, teacher, inner, TrainOptions(out="o", precision="bf16", logit_chunk=chunk), 64)
        for chunk in (64, 4096)
    ]
    assert found[0] == found[1]


def test_the_memory_is_the_cards_and_all_of_it_is_counted_alike(gpu: None) -> None:
    assert free_memory() == free_memory(processes=2) == 5 * 10**9
    assert (memory_in_use(), peak_memory()) == (7, 8)


def test_processes_share_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 10**9)
    assert (free_memory(), free_memory(processes=4)) == (10**9, 10**9 // 4)


def test_a_plan_reports_the_memory_that_the_run_may_take(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "free_memory", lambda processes: 123)
    assert plan_run(options(teacher, data, tmp_path / "m")).memory_available_bytes == 123


def test_random_weights_leave_the_generators_of_gpus_alone(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with several GPUs, torch would look for all of them, and warn."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = (random_model(SHAPE, seed).transformer.wte.weight for seed in (1, 1))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)
