"""Hidden states through one learned map, and DistilGPT2's cosine of the last ones."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tinygpt2.config.distillation import HiddenScale
from tinygpt2.models.lm_head import wide


def hidden_loss(
    student: Float[Tensor, "*N D"], teacher: Float[Tensor, "*N D"], scale: HiddenScale
) -> Float[Tensor, ""]:
    """Mean squared error between one hidden state of the student and one of the teacher.

    Args:
        student: mapped to the teacher's width.
        teacher: as it is.
        scale: `variance` divides by the teacher state's variance over all its entries: a pre-LN residual
            stream grows with depth, and deep states would drown the rest. Its entries are those of the
            micro-batch, so another split of the same global batch divides by slightly other numbers.
    Source: TinyBERT, arXiv:1909.10351, eq. 8; scaling: TinyGPT2's README, "Objective scaling".
    """
    mapped, target = student.to(wide(student)), teacher.to(wide(student))
    loss = F.mse_loss(mapped, target)
    return loss / target.var(correction=0) if scale == "variance" else loss


def cosine_loss(student: Float[Tensor, "*N D"], teacher: Float[Tensor, "*N D"]) -> Float[Tensor, ""]:
    """Mean over positions of 1 - cos between last hidden states, in [0, 2].

    Raises:
        ValueError: the widths differ.
    Source: DistilBERT, arXiv:1910.01108, section 3; used for DistilGPT2.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"cosine needs equal widths, not {student.shape[-1]} and {teacher.shape[-1]}")
    return 1 - F.cosine_similarity(student.to(wide(student)), teacher.to(wide(student)), dim=-1).mean()
