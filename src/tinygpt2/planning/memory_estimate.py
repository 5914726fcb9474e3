"""Estimate the memory of a training step from the shapes of the models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tinygpt2.config.training import TrainOptions
from tinygpt2.models.activations import Activations
from tinygpt2.models.documents import Documents
from tinygpt2.models.lm_head import Head, default_chunk, head_operand, operand_rows
from tinygpt2.models.loading import random_model
from tinygpt2.models.parameters import count_parameters, set_dropout
from tinygpt2.models.teachers.ensemble import Ensemble
from tinygpt2.models.teachers.loading import as_teacher
from tinygpt2.models.teachers.teacher import GPT2Teacher, Shape, Teacher
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.runtime.devices import DTYPES, chosen_precision, current_device, on_cuda
from tinygpt2.training.step import Step


def saved_bytes(
    student: GPT2Config, teacher: Teacher | None, weights: LossWeights, config: TrainOptions, size: int, length: int
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
    precision = chosen_precision(config.precision)
    with FakeTensorMode():
        fake_teacher = None if teacher is None else _without_values(teacher)
        fake_student = random_model(student, 0)
        set_dropout(fake_student, config.dropout)
        step = Step(fake_student, fake_teacher, weights, plain)
        ids = torch.zeros(size, length, dtype=torch.int64)
        with (
            _Flash(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32"),
        ):
            step(ids)
        own = {parameter.untyped_storage()._cdata for parameter in step.parameters()}
    return sum(size for storage, size in kept.items() if storage not in own)


def _without_values(teacher: Teacher) -> Teacher:
    """Return a teacher for fake tensors. Of a GPT-2 it is a GPT-2, because attention is compared, too."""
    if isinstance(teacher, GPT2Teacher):
        return GPT2Teacher(random_model(teacher.model.config, 0).eval(), teacher.reading)
    if isinstance(teacher, Ensemble):
        return Ensemble([_without_values(one) for one in teacher.members if isinstance(one, Teacher)])
    return _Outline(teacher.model, teacher.shape, teacher.reading)


class _Outline(Teacher):
    """A teacher that is never run: it gives states and logits of the right sizes. Nothing else of it is saved."""

    def collect(
        self,
        input_ids: Int[Tensor, "B T"],
        states: Iterable[int],
        attention: Iterable[int] = (),
        documents: Documents | None = None,
    ) -> Activations:
        """See `Teacher`."""
        size, length, last = len(input_ids), self.covered(input_ids.shape[1]), self.shape.layers
        widths = {number: self.shape.last_width if number == last else self.shape.width for number in states}
        return Activations({number: torch.zeros(size, length, width) for number, width in widths.items()})

    def head(self) -> Head:
        """See `Teacher`."""
        return Head(head_operand(torch.zeros(self.vocabulary, self.shape.last_width)), self.vocabulary)


class _Flash(TorchFunctionMode):
    """Uses the attention kernel without T x T matrices, which PyTorch does not choose for fake tensors.

    Every device has one: on a GPU, `mixed_heads` pads the heads for which there would be none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or (kwargs["dropout_p"] and not on_cuda()):
            return func(*args, **kwargs)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, 0.0, True, scale=kwargs["scale"])[0]


def step_memory(
    student: GPT2LMHeadModel,
    teacher: Teacher | PreTrainedModel | None,
    weights: LossWeights,
    config: TrainOptions,
    length: int,
) -> tuple[int, int]:
    """Estimate the memory of a run in bytes: a fixed part, and a part for each block of the micro-batch.

    The fixed part is for weights, gradients, AdamW's two moments, the masters (--quantize) or the mean
    (--average-tail), the teacher and the logits of a chunk. The part for each block is what `saved_bytes` counts, plus
    the temporary tensors of one layer.
    """
    short = chosen_precision(config.precision) != "fp32"
    teacher = None if teacher is None else as_teacher(teacher)
    if teacher is None and weights.compares:  # from a cache of predictions, which takes as much as cross-entropy
        weights = replace(weights, prediction=0.0, ce=1.0)
    shape = None if teacher is None else teacher.shape
    each_weight = 20 if config.quantize or config.average_tail else 16  # bytes
    fixed = each_weight * count_parameters(student) + _loss_bytes(student.config, shape, weights, config)
    if teacher is not None:
        fixed += sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())
        # a run stores them in 16 bits: `cast_linear_layers`
        fixed -= 2 * teacher.cast_weights() if short and next(teacher.parameters()).itemsize == 4 else 0
    width = max(student.config.n_embd, shape.width if shape else 0)
    each = saved_bytes(student.config, teacher, weights, config, 1, length)
    if on_cuda():  # a part is saved only once. On a CPU it stays in `each`: a step that does not fit ends the process
        one, each = each, saved_bytes(student.config, teacher, weights, config, 2, length) - each
        fixed += one - each
    return fixed, each + 12 * length * width * (2 if short else 4)


def _loss_bytes(student: GPT2Config, teacher: Shape | None, weights: LossWeights, config: TrainOptions) -> int:
    """Return the bytes of the logits of a chunk, and on a GPU also of the output matrices as operands."""
    device = current_device().type
    rows: int = operand_rows(student.vocab_size, device)
    logits = rows * (config.logit_chunk or default_chunk(student.vocab_size, device))
    if device == "cpu":
        return 2 * 4 * logits
    if not weights.predicts:
        return 0
    learns = teacher is not None and weights.compares
    matrices = 3 if learns else 2  # the student's logits, their gradient, the teacher's logits
    widths: int = student.n_embd + (teacher.last_width if learns and teacher is not None else 0)
    return (matrices * logits + rows * widths) * (4 if chosen_precision(config.precision) == "fp32" else 2)
