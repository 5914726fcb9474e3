"""Losses on predictions, chunk by chunk over tokens, so that no N x V tensor outlives its chunk.

Student and teacher logits are made from the last hidden states and the two output matrices for some tokens
at a time; the loss and the gradients for hidden states and output matrix come out of the same pass. A chunk
is large enough for fast matrix products; within it, the element-wise work goes over a few rows at a time,
which stay in a CPU's cache from the first pass over them to the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinygpt2.config.distillation import PredictionLoss
from tinygpt2.models.lm_head import default_chunk, head_operand, rows_at_once, wide

IGNORED = -100  # a target that is none: the last position of every block


def soft_ce(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> tuple[Float[Tensor, ""], Tensor]:
    """Sum over tokens of the cross-entropy of the student under the teacher's distribution, in nats.

    Args:
        student, teacher: logits.

    Returns:
        The sum, and its gradient for the student's logits; so do the other losses.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2. TinyBERT's code takes the mean over the
    vocabulary too, which makes the loss V times smaller.
    """
    p_t = teacher.softmax(-1)
    return -_dot(p_t, student.log_softmax(-1)), student.softmax(-1).sub_(p_t)


def forward_kl(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> tuple[Float[Tensor, ""], Tensor]:
    """Sum over tokens of KL(teacher || student), in nats. Source: as `soft_ce`, less the teacher's entropy."""
    p_t = teacher.softmax(-1)
    value = _dot(p_t, teacher.log_softmax(-1).sub_(student.log_softmax(-1)))
    return value, student.softmax(-1).sub_(p_t)


def reverse_kl(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> tuple[Float[Tensor, ""], Tensor]:
    """Sum over tokens of KL(student || teacher), in nats. Source: MiniLLM, arXiv:2306.08543, section 2."""
    log_s = student.log_softmax(-1)
    p_s = log_s.exp()
    ratio = log_s.sub_(teacher.log_softmax(-1))
    rows = (p_s * ratio).sum(-1, keepdim=True)
    return rows.sum(), ratio.sub_(rows).mul_(p_s)


def jsd(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> tuple[Float[Tensor, ""], Tensor]:
    """Sum over tokens of the Jensen-Shannon divergence, both sides weighed 1/2, in nats.

    Source: Agarwal et al. 2023, arXiv:2306.13649, eq. 1 with beta 1/2.
    """
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logaddexp(log_s, log_t).sub_(math.log(2))
    p_s, ratio = log_s.exp(), log_s.sub_(log_m)
    rows = (p_s * ratio).sum(-1, keepdim=True)
    value = (rows.sum() + _dot(log_t.exp(), log_t - log_m)) / 2
    return value, ratio.sub_(rows).mul_(p_s).div_(2)


LOSSES: dict[PredictionLoss, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "soft_ce": soft_ce,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}


def cross_entropy(
    student: Float[Tensor, "N V"], targets: Int[Tensor, " N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "N V"]]:
    """Sum over targets of -log p(target), in nats, and its gradient for the logits; `IGNORED` targets count nothing."""
    real = (targets != IGNORED).unsqueeze(-1)
    index = targets.unsqueeze(-1).where(real, 0)
    value = -(student.log_softmax(-1).gather(-1, index) * real).sum()
    gradient = student.softmax(-1).scatter_add_(-1, index, torch.full_like(index, -1, dtype=student.dtype))
    return value, gradient.mul_(real)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of the products; uses `b` up. On a CPU oneDNN's torch.dot takes ten times as long."""
    return b.mul_(a).sum()


@dataclass(frozen=True)
class PredictionObjective:
    """What to compute from logits: weights of 0 cost nothing.

    Attributes:
        prediction_weight, ce_weight: weights in the returned total.
        loss: what compares student and teacher.
        temperature: divides both logits; the loss is multiplied by its square.
        chunk: tokens whose logits are held at a time; None takes `default_chunk`.
    """

    prediction_weight: float
    ce_weight: float
    loss: PredictionLoss = "forward_kl"
    temperature: float = 1.0
    chunk: int | None = None


def prediction_loss(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    teacher: tuple[Float[Tensor, "N Dt"], Float[Tensor, "V Dt"]] | None,
    objective: PredictionObjective,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Weighted sum of the prediction loss and next-token cross-entropy, and the two terms by themselves.

    Args:
        hidden, head: the student's last hidden states and output matrix.
        targets: next tokens, `IGNORED` where there is none.
        teacher: the teacher's last hidden states, and its output matrix as `head_operand` returns it; None if only
            ce is asked for.
        objective: weights, loss, temperature and chunk.

    Returns:
        The total, with gradients; the unweighted terms: `prediction` is the mean over all N tokens, times
        temperature squared; `ce` the mean over the targets.
    """
    if teacher is None and objective.prediction_weight:
        raise ValueError("a prediction weight above 0 needs a teacher")
    teacher_hidden, teacher_head = teacher if teacher is not None else (None, None)
    total, prediction, ce = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, teacher_hidden, teacher_head, objective
    )
    terms = {}
    if objective.prediction_weight:
        terms["prediction"] = prediction
    if objective.ce_weight:
        terms["ce"] = ce
    return total, terms


class _ChunkedLoss(torch.autograd.Function):
    """Value and gradients in one pass over chunks; backward only multiplies."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        objective: PredictionObjective,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device, count = hidden.device.type, len(hidden)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        head_grad = torch.zeros_like(head, dtype=wide(head)) if needs_head else None
        matrix = head_operand(head)
        states, teacher = hidden.to(matrix.dtype), None
        if teacher_hidden is not None and teacher_head is not None and objective.prediction_weight:
            teacher = (teacher_hidden.to(teacher_head.dtype), teacher_head)
        means = 1 / torch.stack([targets.new_tensor(count), (targets != IGNORED).sum()]).clamp(min=1).to(wide(hidden))
        values = torch.zeros_like(means)
        turns = max(1, math.ceil(count / (objective.chunk or default_chunk(len(head), device))))
        chunk = max(1, math.ceil(count / turns))  # equal chunks: a small last one would be slow
        with torch.autocast(device, enabled=False):
            for start in range(0, count, chunk):
                part = slice(start, start + chunk)
                logits = states[part] @ matrix.mT
                soft = None if teacher is None else teacher[0][part] @ teacher[1].mT
                values += _differentiate(logits, soft, targets[part], objective, means[1] * count)
                if hidden_grad is not None:
                    hidden_grad[part] = logits @ matrix
                if head_grad is not None and head_grad.dtype == logits.dtype:
                    head_grad.addmm_(logits.mT, states[part])
                elif head_grad is not None:
                    head_grad += logits.mT @ states[part]
        prediction, ce = values * means
        # The mean's 1/N waits for backward, where a loss scale has made the incoming gradient large.
        ctx.factor = 1 / max(1, count)
        ctx.save_for_backward(hidden_grad, None if head_grad is None else head_grad.to(head.dtype))
        ctx.mark_non_differentiable(prediction, ce)
        return objective.prediction_weight * prediction + objective.ce_weight * ce, prediction, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        scaled = [None if grad is None else grad * (ctx.factor * grads[0]) for grad in (hidden_grad, head_grad)]
        return scaled[0], scaled[1], None, None, None, None


def _differentiate(
    logits: Tensor,
    soft: Tensor | None,
    targets: Tensor,
    objective: PredictionObjective,
    ce_scale: Tensor,
) -> Tensor:
    """Replace the student's logits by the gradient of the weighted sum of the two sums; return these.

    The softmax and the sums are taken in float32 at least, whatever the logits' type.
    """
    tau, rows = objective.temperature, rows_at_once(logits.shape[-1], logits.device.type)
    values = logits.new_zeros(2, dtype=wide(logits))
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        student, parts = logits[part].to(values.dtype), []
        if soft is not None:
            teacher = soft[part].to(values.dtype)
            softened = (student, teacher) if tau == 1 else (student / tau, teacher / tau)
            value, gradient = LOSSES[objective.loss](*softened)
            values[0] += value * tau**2
            factor = objective.prediction_weight * tau
            parts.append(gradient if factor == 1 else gradient.mul_(factor))
        if objective.ce_weight:
            value, gradient = cross_entropy(student, targets[part])
            values[1] += value
            parts.append(gradient.mul_(objective.ce_weight * ce_scale))
        logits[part] = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
    return values
