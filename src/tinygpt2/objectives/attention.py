"""Attention scores on the lower triangle, block by block over query rows.

The loss is the mean over the L(L+1)/2 causal positions (and heads and batch) of the squared difference of
scores before mask and softmax. Nothing of size L x L is held for more than one block of rows, and the
gradients for the student's queries and keys come out of the same pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

ROWS = 128  # query rows in a block: large enough for fast products, small against L x L


def attention_loss(
    student: tuple[Float[Tensor, "B H T Ks"], Float[Tensor, "B H T Ks"]],
    teacher: tuple[Float[Tensor, "B H T Kt"], Float[Tensor, "B H T Kt"]],
    student_scale: float,
    teacher_scale: float,
) -> Float[Tensor, ""]:
    """Mean squared difference of causal attention scores, in the scores' own squared unit.

    Args:
        student, teacher: queries and keys; head widths may differ, head counts may not.
        student_scale, teacher_scale: what q.k is multiplied by, 1/sqrt(K) in GPT-2.

    Raises:
        ValueError: different numbers of heads or positions.
    Source: TinyGPT2 (TLB-MISS/TinyGPT2), README, "Attention objective"; TinyBERT, arXiv:1909.10351, eq. 7.
    """
    if student[0].shape[:3] != teacher[0].shape[:3]:
        raise ValueError(
            f"scores of shape {tuple(student[0].shape[:3])} and {tuple(teacher[0].shape[:3])} do not compare"
        )
    loss: Tensor = _AttentionLoss.apply(  # type: ignore[no-untyped-call]
        *student, *teacher, student_scale, teacher_scale
    )
    return loss


class _AttentionLoss(torch.autograd.Function):
    """Value and gradients in one pass; backward only multiplies."""

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
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        needs_grad = q.requires_grad or k.requires_grad
        q_grad, k_grad = (torch.zeros_like(q), torch.zeros_like(k, dtype=wide)) if needs_grad else (None, None)
        total = q.new_zeros((), dtype=wide)
        for start in range(0, length, ROWS):
            stop = min(start + ROWS, length)
            rows, keys = slice(start, stop), slice(0, stop)
            difference = (q[:, :, rows] @ k[:, :, keys].mT) * scale
            difference -= (teacher_q[:, :, rows] @ teacher_k[:, :, keys].mT).to(difference.dtype) * teacher_scale
            difference = difference.tril(diagonal=start)  # (B, H, rows, keys)
            total += difference.to(wide).square().sum()
            if q_grad is not None and k_grad is not None:
                q_grad[:, :, rows] = difference @ k[:, :, keys]
                k_grad[:, :, keys] += difference.mT @ q[:, :, rows]
        # The small factor waits for backward, where a loss scale has made the incoming gradient large.
        ctx.factor = 2 * scale / pairs
        ctx.save_for_backward(q_grad, None if k_grad is None else k_grad.to(k.dtype))
        return total / pairs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_grad, k_grad = ctx.saved_tensors
        factor = ctx.factor * grads[0]
        return q_grad * factor, k_grad * factor, None, None, None, None
