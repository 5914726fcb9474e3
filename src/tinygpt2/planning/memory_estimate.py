"""What a training step costs, from shapes alone: floating-point operations, memory, and a device's rate."""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.config.training import TrainOptions
from tinygpt2.models.loading import count_parameters, random_model, set_dropout
from tinygpt2.objectives.combined import Weights
from tinygpt2.training.step import Step

# Dense peaks of the makers' data sheets, in 10^12 operations per second: float32 (TF32 off), bfloat16 or float16
PEAKS = {
    "H200": (67, 989), "H100 PCIe": (51, 756), "H100": (67, 989), "GH200": (67, 989), "B200": (75, 2250),
    "A100": (19.5, 312), "A40": (37.4, 149.7), "A10": (31.2, 125), "L40S": (91.6, 362), "L4": (30.3, 121),
    "V100": (15.7, 125), "T4": (8.1, 65), "RTX 4090": (82.6, 165.2), "RTX 3090": (35.6, 71),
}  # fmt: skip


def device_peak(device: torch.device, precision: str) -> float | None:
    """Return a device's peak in operations per second, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
    return None if found is None else found[precision != "fp32"] * 1e12


def layer_operations(shape: GPT2Config, length: int) -> int:
    """Return one layer's forward operations per token: two per weight, and causal attention."""
    width: int = shape.n_embd
    inner: int = shape.n_inner or 4 * width
    return 2 * (4 * width * width + 2 * width * inner) + 2 * length * width


def step_operations(student: GPT2Config, teacher: GPT2Config | None, weights: Weights, length: int) -> int:
    """Return the operations per token of one training step.

    The student's forward pass counts three times (backward costs twice as much: Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1), the teacher's once, as deep as it is at all; element-wise work is not counted.
    """
    logits = weights.ce or weights.prediction
    total: int = 3 * student.n_layer * layer_operations(student, length)
    total += 6 * student.n_embd * student.vocab_size if logits else 0
    if teacher is not None:
        total += teacher.n_layer * layer_operations(teacher, length)
        total += 2 * teacher.n_embd * teacher.vocab_size if weights.prediction else 0
    if teacher is not None and weights.attention:
        total += student.n_layer * length * (3 * student.n_embd + teacher.n_embd)
    return total


def saved_bytes(
    student: GPT2Config, teacher: GPT2Config | None, weights: Weights, config: TrainOptions, size: int, length: int
) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, parameters left out.

    One micro-batch goes through the real step with tensors that have shapes and no content, so every objective,
    precision and gradient checkpointing count as they are.

    Args:
        size, length: blocks in the micro-batch, and tokens in a block.

    Raises:
        ConfigError: the shapes do not fit an objective.
    """
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    plain = config.model_copy(update={"compile": False, "compile_only": False})
    with FakeTensorMode():
        taught = None if teacher is None else random_model(teacher, 0).eval()
        learner = random_model(student, 0)
        set_dropout(learner, config.dropout)
        step = Step(learner, taught, weights, plain)
        ids = torch.zeros(size, length, dtype=torch.int64)
        with (
            _Flash(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=config.precision != "fp32"),
        ):
            step(ids)
        own = {parameter.untyped_storage()._cdata for parameter in step.parameters()}
    return sum(size for storage, size in kept.items() if storage not in own)


class _Flash(TorchFunctionMode):
    """Takes the attention kernel without T x T matrices, which tensors without content do not find by themselves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or (kwargs["dropout_p"] and not torch.cuda.is_available()):
            return func(*args, **kwargs)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, 0.0, True, scale=kwargs["scale"])[0]


def step_memory(
    student: GPT2LMHeadModel, teacher: GPT2LMHeadModel | None, weights: Weights, config: TrainOptions, length: int
) -> tuple[int, int]:
    """Estimate the memory of a run in bytes: what it takes whatever the micro-batch, and per block of one.

    The first is weights, gradients, AdamW's two moments, the teacher and the logits of a chunk; the second what
    `saved_bytes` counts and as much as one layer works with.
    """
    fixed = 16 * count_parameters(student) + 4 * (2**29 if torch.cuda.is_available() else 2**26)
    if teacher is not None:
        fixed += sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())
    taught = None if teacher is None else teacher.config
    width = max(student.config.n_embd, taught.n_embd if taught else 0)
    passing = 12 * length * width * (2 if config.precision != "fp32" else 4)
    return fixed, saved_bytes(student.config, taught, weights, config, 1, length) + passing


def measured_rate(device: torch.device, precision: str) -> float:
    """Return the operations per second of a matrix product on this device, measured within a moment."""
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
