"""Estimate the memory of a training step from the shapes of the models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.config.training import TrainOptions
from tinygpt2.models.loading import random_model
from tinygpt2.models.parameters import count_parameters, set_dropout
from tinygpt2.objectives.combined import LossWeights
from tinygpt2.runtime.devices import chosen_precision, on_cuda
from tinygpt2.training.step import Step


def saved_bytes(
    student: GPT2Config, teacher: GPT2Config | None, weights: LossWeights, config: TrainOptions, size: int, length: int
) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, without the parameters.

    The real training step runs on one micro-batch of fake tensors, which have shapes but no values. So the result
    includes the effects of objectives, precision and gradient checkpointing.

    Args:
        size: blocks in the micro-batch.
        length: tokens in a block.

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
        fake_teacher = None if teacher is None else random_model(teacher, 0).eval()
        fake_student = random_model(student, 0)
        set_dropout(fake_student, config.dropout)
        step = Step(fake_student, fake_teacher, weights, plain)
        ids = torch.zeros(size, length, dtype=torch.int64)
        with (
            _Flash(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=chosen_precision(config.precision) != "fp32"),
        ):
            step(ids)
        own = {parameter.untyped_storage()._cdata for parameter in step.parameters()}
    return sum(size for storage, size in kept.items() if storage not in own)


class _Flash(TorchFunctionMode):
    """Uses the attention kernel without T x T matrices, which PyTorch does not choose for fake tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or (kwargs["dropout_p"] and not on_cuda()):
            return func(*args, **kwargs)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, 0.0, True, scale=kwargs["scale"])[0]


def step_memory(
    student: GPT2LMHeadModel, teacher: GPT2LMHeadModel | None, weights: LossWeights, config: TrainOptions, length: int
) -> tuple[int, int]:
    """Estimate the memory of a run in bytes: a fixed part, and a part for each block of the micro-batch.

    The fixed part is for weights, gradients, AdamW's two moments, the teacher and the logits of a chunk. The part for
    each block is what `saved_bytes` counts, plus the temporary tensors of one layer.
    """
    fixed = 16 * count_parameters(student) + 4 * (2**29 if on_cuda() else 2**26)
    if teacher is not None:
        fixed += sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())
    shape = None if teacher is None else teacher.config
    width = max(student.config.n_embd, shape.n_embd if shape else 0)
    passing = 12 * length * width * (2 if chosen_precision(config.precision) != "fp32" else 4)
    return fixed, saved_bytes(student.config, shape, weights, config, 1, length) + passing
