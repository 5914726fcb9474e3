"""Losses on predictions, chunk by chunk over tokens, so that no N x V tensor outlives its chunk.

Student and teacher logits are made from the last hidden states and the two output matrices for a few
tokens at a time; the loss and the gradients for hidden states and output matrix come out of the same pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tinygpt2.config import PredictionLoss

IGNORED = -100  # a target that is none: the last position of every block


def soft_ce(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> Float[Tensor, ""]:
    """Sum over tokens of the cross-entropy of the student under the teacher's distribution, in nats.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2. TinyBERT's code takes the mean over the
    vocabulary too, which makes the loss V times smaller.
    """
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum()


def forward_kl(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> Float[Tensor, ""]:
    """Sum over tokens of KL(teacher || student), in nats. Source: as `soft_ce`, less the teacher's entropy."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)


def reverse_kl(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> Float[Tensor, ""]:
    """Sum over tokens of KL(student || teacher), in nats. Source: MiniLLM, arXiv:2306.08543, section 2."""
    return forward_kl(teacher, student)


def jsd(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> Float[Tensor, ""]:
    """Sum over tokens of the Jensen-Shannon divergence, both sides weighed 1/2, in nats.

    Source: Agarwal et al. 2023, arXiv:2306.13649, eq. 1 with beta 1/2.
    """
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0, dtype=log_s.dtype, device=log_s.device))
    to_middle = [F.kl_div(log_m, side, reduction="sum", log_target=True) for side in (log_s, log_t)]
    return (to_middle[0] + to_middle[1]) / 2


LOSSES: dict[PredictionLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "soft_ce": soft_ce,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}


@dataclass(frozen=True)
class PredictionObjective:
    """What to compute from logits: weights of 0 cost nothing.

    Attributes:
        prediction_weight, ce_weight: weights in the returned total.
        loss: what compares student and teacher.
        temperature: divides both logits; the loss is multiplied by its square.
    """

    prediction_weight: float
    ce_weight: float
    loss: PredictionLoss = "forward_kl"
    temperature: float = 1.0


def prediction_loss(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    teacher: tuple[Float[Tensor, "N Dt"], Float[Tensor, "V Dt"]] | None,
    objective: PredictionObjective,
    chunk: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Weighted sum of the prediction loss and next-token cross-entropy, and the two terms by themselves.

    Args:
        hidden, head: the student's last hidden states and output matrix.
        targets: next tokens, `IGNORED` where there is none.
        teacher: the teacher's last hidden states and output matrix; None if only ce is asked for.
        objective: weights, loss and temperature.
        chunk: tokens at a time; by default as many as keep a chunk of logits near the cache.

    Returns:
        The total, with gradients; the unweighted terms: `prediction` is the mean over all N tokens, times
        temperature squared; `ce` the mean over the targets.
    """
    chunk = chunk or default_chunk(head)
    teacher_hidden, teacher_head = teacher if teacher is not None else (None, None)
    total, prediction, ce = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, teacher_hidden, teacher_head, objective, chunk
    )
    terms = {}
    if objective.prediction_weight:
        terms["prediction"] = prediction
    if objective.ce_weight:
        terms["ce"] = ce
    return total, terms


def default_chunk(head: Tensor) -> int:
    """Return how many tokens' logits are held at a time: 16 MB of float32 on a CPU, 512 MB on a GPU."""
    return max(64, (1 << (22 if head.device.type == "cpu" else 27)) // head.shape[0])


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
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        scale, (needs_hidden, needs_head) = objective.temperature**2, ctx.needs_input_grad[:2]
        count, target_count = len(hidden), max(int((targets != IGNORED).sum()), 1)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        head_grad = torch.zeros_like(head, dtype=wide) if needs_head else None
        prediction, ce = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
        with torch.autocast(device, enabled=False):
            states, matrix = hidden.to(dtype), head.to(dtype)
            soft_matrix = None if teacher_head is None else teacher_head.to(dtype)
            for start in range(0, count, chunk):
                part = slice(start, min(start + chunk, count))
                logits = (states[part] @ matrix.mT).to(wide).requires_grad_(needs_hidden or needs_head)
                with torch.enable_grad():
                    total = logits.new_zeros(())
                    if teacher_hidden is not None and soft_matrix is not None and objective.prediction_weight:
                        soft = (teacher_hidden[part].to(dtype) @ soft_matrix.mT).to(wide)
                        term = LOSSES[objective.loss](logits / objective.temperature, soft / objective.temperature)
                        prediction += term.detach() * (scale / count)
                        total = total + objective.prediction_weight * scale * term
                    if objective.ce_weight:
                        term = F.cross_entropy(logits, targets[part], ignore_index=IGNORED, reduction="sum")
                        ce += term.detach() / target_count
                        total = total + objective.ce_weight * (count / target_count) * term
                if needs_hidden or needs_head:
                    (grad,) = torch.autograd.grad(total, logits)
                    grad = grad.to(dtype)
                    if hidden_grad is not None:
                        hidden_grad[part] = grad @ matrix
                    if head_grad is not None:
                        head_grad += grad.mT @ states[part]
        # The mean's 1/N waits for backward, where a loss scale has made the incoming gradient large.
        ctx.factor = 1 / count
        ctx.save_for_backward(hidden_grad, None if head_grad is None else head_grad.to(head.dtype))
        ctx.mark_non_differentiable(prediction, ce)
        return objective.prediction_weight * prediction + objective.ce_weight * ce, prediction, ce

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        scaled = [None if grad is None else grad * (ctx.factor * grads[0]) for grad in (hidden_grad, head_grad)]
        return scaled[0], scaled[1], None, None, None, None, None
