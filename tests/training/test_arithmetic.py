"""TF32 in training only, `--deterministic`, and that a run leaves torch's settings as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.test_checkpoint import options
from tests.training.test_train import same
from tinygpt2 import pretrain
from tinygpt2.config.training import TrainOptions
from tinygpt2.errors import ConfigError
from tinygpt2.models.loading import load_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.runtime.devices import PEAKS, device_peak, repeatable
from tinygpt2.training import preparation, step
from tinygpt2.training.preparation import training_arithmetic


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that torch only names: its settings exist on every machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def tf32() -> bool:
    """Return whether products are in TF32, by both of torch's settings, which must agree."""
    assert torch.backends.cuda.matmul.allow_tf32 == (torch.backends.cuda.matmul.fp32_precision == "tf32")
    return bool(torch.backends.cuda.matmul.allow_tf32)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"precision": "fp32"}, True),
        ({"precision": "fp32", "deterministic": True}, False),
        ({"precision": "bf16"}, False),
    ],
)
def test_training_in_float32_uses_tf32_and_comparisons_do_not(gpu: None, given: dict, expected: bool) -> None:
    with training_arithmetic(TrainOptions(out="o", **given)):
        assert tf32() == expected
        with fast_products():  # as in `ppl`, which measures the trained model
            assert not tf32()
        assert tf32() == expected
    assert not tf32()


def test_evaluation_during_training_is_exact(gpu: None, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = step.target_losses
    monkeypatch.setattr(step, "target_losses", lambda *args, **more: (seen.append(tf32()), real(*args, **more))[1])
    module = step.Step(load_model(str(teacher))[0], None, LossWeights(), TrainOptions(out="o")).eval()
    with training_arithmetic(TrainOptions(out="o", precision="fp32")):
        module(torch.zeros(1, 8, dtype=torch.int64))
        assert tf32()
    assert seen == [False]


def test_deterministic_says_what_it_costs(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(preparation, "say", said.append)
    for precision in ("fp32", "bf16"):
        with training_arithmetic(TrainOptions(out="o", precision=precision, deterministic=True)):
            pass
    assert ["TF32" in line for line in said] == [True, False]


def test_only_repeatable_algorithms_are_allowed_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.deterministic
    with repeatable(wanted=False):
        assert not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with repeatable(wanted=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic == before
    assert torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_a_cpu_gives_the_same_bits_with_and_without(teacher: Path, data: Path, tmp_path: Path) -> None:
    pretrain(options(teacher, data, tmp_path / "a", max_steps=2))
    pretrain(options(teacher, data, tmp_path / "b", max_steps=2, deterministic=True))
    assert same(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConfigError, match="--deterministic differ"):
        pretrain(options(teacher, data, tmp_path / "b", max_steps=2, resume=True))


@pytest.mark.parametrize(
    ("name", "float32", "short"),
    [
        ("NVIDIA H100 80GB HBM3", 67, 989), ("NVIDIA H100 NVL", 60, 835), ("NVIDIA H100 PCIe", 51, 756),
        ("NVIDIA H200", 67, 989), ("NVIDIA H200 NVL", 60, 835), ("NVIDIA H20", 44, 148), ("NVIDIA B200", 75, 2250),
        ("NVIDIA GB200", 80, 2500), ("NVIDIA A100-SXM4-80GB", 19.5, 312), ("NVIDIA A10", 31.2, 125),
        ("NVIDIA A10G", 31.5, 70), ("NVIDIA L4", 30.3, 121), ("NVIDIA L40", 90.5, 181), ("NVIDIA L40S", 91.6, 362),
        ("NVIDIA RTX A6000", 38.7, 154.8), ("NVIDIA RTX 6000 Ada Generation", 91.1, 364.2), ("Tesla T4", 8.1, None),
        ("NVIDIA GeForce RTX 5090", 104.8, 209.5), ("NVIDIA GeForce RTX 4090", 82.6, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None), ("Tesla V100-SXM2-16GB", 15.7, None),
        ("NVIDIA GeForce GTX 1080", None, None),
    ],
)  # fmt: skip
def test_the_peak_of_a_card_by_its_name(
    gpu: None, name: str, float32: float | None, short: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V100 and T4 only emulate bfloat16, and a laptop's chip is not the desktop's."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    card = torch.device("cuda")
    assert device_peak(card, "fp32") == (None if float32 is None else float32 * 1e12)
    assert device_peak(card, "bf16") == (None if short is None else short * 1e12)


def test_the_peak_of_training_in_float32_is_that_of_tf32(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a run could reach more than its peak."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    with training_arithmetic(TrainOptions(out="o", precision="fp32")):
        assert device_peak(torch.device("cuda"), "fp32") == 156e12
    assert device_peak(torch.device("cuda"), "fp32") == 19.5e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert device_peak(torch.device("cuda"), "fp16") == 65e12
    assert all(rates == tuple(sorted(rates)) for rates in PEAKS.values())
