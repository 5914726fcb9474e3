"""Losses on hidden states: the squared error after one learned map, and DistilGPT2's cosine of the final states."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tinygpt2.config.distillation import HiddenScale
from tinygpt2.models.lm_head import wide


def hidden_loss(
    student: Float[Tensor, "*N D"], teacher: Float[Tensor, "*N D"], scale: HiddenScale
) -> Float[Tensor, ""]:
    """Return the mean squared error between one hidden state of the student and one of the teacher.

    Args:
        student: the student's state, mapped to the teacher's width.
        teacher: the teacher's state, unchanged.
        scale: `variance` divides the error by the variance of the teacher's state over all its entries. The residual
            stream of a pre-LN model grows with depth, so without this the deep states would dominate the loss. The
            variance is that of the micro-batch, so splitting the same global batch differently gives slightly
            different losses.
    Source: TinyBERT, arXiv:1909.10351, eq. 8; scaling: TinyGPT2's README, "Objective scaling".
    """
    mapped, target = student.to(wide(student)), teacher.to(wide(student))
    loss = F.mse_loss(mapped, target)
    return loss / target.var(correction=0) if scale == "variance" else loss


def cosine_loss(student: Float[Tensor, "*N D"], teacher: Float[Tensor, "*N D"]) -> Float[Tensor, ""]:
    """Return 1 - cos between the final hidden states, as the mean over positions, in [0, 2].

    Raises:
        ValueError: the widths differ.
    Source: DistilBERT, arXiv:1910.01108, section 3; used for DistilGPT2.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"the cosine loss needs equal hidden sizes, not {student.shape[-1]} and {teacher.shape[-1]}")
    return 1 - F.cosine_similarity(student.to(wide(student)), teacher.to(wide(student)), dim=-1).mean()
