"""Losses that compare attention layers, on the lower triangle of the attention matrix.

`attention_loss` is the squared difference of attention scores (TinyBERT). `relation_loss` is the divergence of the
relations between queries, between keys and between values (MiniLM). Both handle `ROWS` query rows at a time, so they
never hold a T x T matrix, and they compute the student's gradients in the same pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinygpt2.models.activations import ROWS
from tinygpt2.models.lm_head import wide
from tinygpt2.objectives.divergences import MASKED, forward_kl


def attention_loss(
    student: tuple[Float[Tensor, "B H T Ks"], Float[Tensor, "B H T Ks"]],
    teacher: tuple[Float[Tensor, "B H T Kt"], Float[Tensor, "B H T Kt"]],
    student_scale: float,
    teacher_scale: float,
) -> Float[Tensor, ""]:
    """Return the mean squared difference of causal attention scores, in squared units of the scores.

    Args:
        student, teacher: queries and keys. Head widths may differ; the numbers of heads must be equal.
        student_scale, teacher_scale: the factor that q.k is multiplied by; 1/sqrt(K) in GPT-2.

    Raises:
        ValueError: the batch sizes or the numbers of heads or positions differ.
    Source: TinyGPT2 (TLB-MISS/TinyGPT2), README, "Attention objective"; TinyBERT, arXiv:1909.10351, eq. 7.
    """
    _require_equal(student[0], teacher[0])
    loss: Tensor = _AttentionLoss.apply(  # type: ignore[no-untyped-call]
        *student, *teacher, student_scale, teacher_scale
    )
    return loss


def relation_loss(student: Float[Tensor, "B H T Ks"], teacher: Float[Tensor, "B H T Kt"]) -> Float[Tensor, ""]:
    """Return KL(teacher || student) between causal self-relations in nats, as the mean over heads and positions.

    The relation of a position is the softmax of x.x / sqrt(K) over this position and all earlier ones.

    Args:
        student, teacher: queries, keys or values. Head widths may differ; the numbers of heads must be equal.

    Raises:
        ValueError: the batch sizes or the numbers of heads or positions differ.
    Source: MiniLMv2, arXiv:2012.15828, section 3.1 (relation heads; q-q, k-k and v-v); MiniLM,
    arXiv:2002.10957, section 3.2 (v-v).
    """
    _require_equal(student, teacher)
    loss: Tensor = _RelationLoss.apply(student, teacher)  # type: ignore[no-untyped-call]
    return loss


def _require_equal(student: Tensor, teacher: Tensor) -> None:
    if student.shape[:3] != teacher.shape[:3]:
        raise ValueError(
            "student and teacher need equal batch sizes, numbers of heads and positions, "
            f"not {tuple(student.shape[:3])} and {tuple(teacher.shape[:3])}"
        )


class _AttentionLoss(torch.autograd.Function):
    """Computes the value and the gradients in one pass; backward only multiplies the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        teacher_q: Tensor,
        teacher_k: Tensor,
        scale: float,
        teacher_scale: float,
    ) -> Tensor:
        batch, heads, length, _ = q.shape
        pairs = batch * heads * (length * (length + 1) // 2)
        # One product gives the difference of the scores: [scale q, -teacher_scale teacher_q] . [k, teacher_k].
        left = torch.cat([q * scale, teacher_q.to(q.dtype) * -teacher_scale], dim=-1).flatten(0, 1)
        right = torch.cat([k, teacher_k.to(k.dtype)], dim=-1).flatten(0, 1)  # (B H, T, Ks + Kt)
        queries, keys = q.flatten(0, 1), k.flatten(0, 1)
        q_grad, k_grad = torch.empty_like(queries), torch.zeros_like(keys, dtype=wide(k))
        total = q.new_zeros((), dtype=wide(q))
        # float16 overflows above 65504, so its sums over positions are scaled down here; ctx.factor undoes that.
        shrink = 1 / length if q.dtype == torch.float16 else 1.0
        for start in range(0, length, ROWS):
            stop = min(start + ROWS, length)
            # Contiguous before transposing, for oneDNN: see models/activations.py.
            difference = torch.bmm(left[:, start:stop], right[:, :stop].contiguous().mT)  # (B H, rows, keys)
            difference[:, :, start:].tril_()
            total += difference.to(total.dtype).square().sum()
            if any(ctx.needs_input_grad):
                difference = difference if shrink == 1 else difference * shrink
                torch.bmm(difference, keys[:, :stop], out=q_grad[:, start:stop])
                k_grad[:, :stop] += torch.bmm(difference.mT, queries[:, start:stop])
        # Apply the small factor only in backward: there, a loss scale has made the incoming gradient large.
        ctx.factor = 2 * scale / pairs / shrink
        ctx.save_for_backward(q_grad.view_as(q), k_grad.to(k.dtype).view_as(k))
        return total / pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_grad, k_grad = ctx.saved_tensors
        factor = ctx.factor * grads[0]
        return q_grad * factor, k_grad * factor, None, None, None, None


class _RelationLoss(torch.autograd.Function):
    """Computes the value and the gradient in one pass; backward only multiplies the gradient."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        length = student.shape[2]
        vectors, teacher_vectors = (x.to(student.dtype).flatten(0, 1) for x in (student, teacher))  # (B H, T, K)
        gradient = torch.zeros_like(vectors, dtype=wide(student))
        total = student.new_zeros((), dtype=wide(student))
        for start in range(0, length, ROWS):
            stop = min(start + ROWS, length)
            future = torch.ones(stop - start, stop, dtype=torch.bool, device=student.device).triu(start + 1)
            relations = (
                (x[:, start:stop] @ x[:, :stop].contiguous().mT)
                .to(total.dtype)
                .mul_(x.shape[-1] ** -0.5)
                .masked_fill_(future, MASKED)
                for x in (vectors, teacher_vectors)
            )
            value, difference = forward_kl(*(relation.flatten(0, 1) for relation in relations))
            total += value
            difference = difference.view(len(vectors), stop - start, stop).to(vectors.dtype)
            gradient[:, start:stop] += difference @ vectors[:, :stop]
            gradient[:, :stop] += difference.mT @ vectors[:, start:stop]
        rows = len(vectors) * length
        ctx.factor = vectors.shape[-1] ** -0.5 / rows
        ctx.save_for_backward(gradient.to(student.dtype).view_as(student))
        return total / rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (ctx.factor * grads[0]), None
