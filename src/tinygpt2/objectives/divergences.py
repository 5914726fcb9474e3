"""Losses between two distributions over the next token, and the cross-entropy, with their gradients.

Each takes logits and returns its sum over the tokens and the gradient of that sum for the student's logits. In what
follows, T and S are the distributions of teacher and student. If a loss is the sum of f(S) over the vocabulary, the
gradient for the logits is S (f'(S) - sum of S f'(S)).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tinygpt2.config.distillation import PredictionLoss

IGNORED = -100  # stands for "no target", such as at the last position of every block
MASKED = -1e30  # acts as minus infinity in a softmax, but differences of masked logits stay finite


def soft_ce(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> tuple[Float[Tensor, ""], Tensor]:
    """Return the cross-entropy of the student under the teacher's distribution, summed over tokens, in nats.

    Args:
        student, teacher: logits.

    Returns:
        The sum, and its gradient for the student's logits. The other losses return the same two values.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2. TinyBERT's code also takes the mean over the
    vocabulary, which makes the loss V times smaller.
    """
    p_t = _softmax(teacher)
    return -_dot(p_t, student.log_softmax(-1)), _softmax(student).sub_(p_t)


def forward_kl(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> tuple[Float[Tensor, ""], Tensor]:
    """Return KL(teacher || student), summed over tokens, in nats, and its gradient.

    Source: as `soft_ce`, minus the teacher's entropy.
    """
    p_t = _softmax(teacher)
    value = _dot(p_t, teacher.log_softmax(-1).sub_(student.log_softmax(-1)))
    return value, _softmax(student).sub_(p_t)


def reverse_kl(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> tuple[Float[Tensor, ""], Tensor]:
    """Return KL(student || teacher), summed over tokens, in nats, and its gradient.

    Source: MiniLLM, arXiv:2306.08543, section 2.
    """
    log_s = student.log_softmax(-1)
    p_s = log_s.exp()
    ratio = log_s.sub_(teacher.log_softmax(-1))
    rows = (p_s * ratio).sum(-1, keepdim=True)
    return rows.sum(), ratio.sub_(rows).mul_(p_s)


def jsd(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], beta: float) -> tuple[Float[Tensor, ""], Tensor]:
    """Return the generalised Jensen-Shannon divergence, summed over tokens, in nats, and its gradient.

    It is beta KL(T || M) + (1 - beta) KL(S || M), where M = beta T + (1 - beta) S. At 0 and 1 it would vanish. Divided
    by beta (1 - beta) its limits there are the forward and the reverse KL, which stand for it.

    Source: Agarwal et al. 2023, arXiv:2306.13649, eq. 1.
    """
    if beta in (0, 1):
        return forward_kl(student, teacher) if beta == 0 else reverse_kl(student, teacher)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = _log_mixture(log_t, log_s, beta)
    p_s, ratio = log_s.exp(), log_s.sub_(log_m)
    rows = (p_s * ratio).sum(-1, keepdim=True)
    value = (1 - beta) * rows.sum() + beta * _dot(log_t.exp(), log_t - log_m)
    return value, ratio.sub_(rows).mul_(p_s).mul_(1 - beta)


def skewed_forward_kl(
    student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], skew: float
) -> tuple[Float[Tensor, ""], Tensor]:
    """Return KL(T || skew T + (1 - skew) S), summed over tokens, in nats, and its gradient.

    Source: DistiLLM, arXiv:2402.03898, section 3.1.
    """
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = _log_mixture(log_t, log_s, skew)
    p_t, p_s, ratio = log_t.exp(), log_s.exp(), log_t.sub_(log_m)
    slope = ratio.exp().mul_(skew - 1)  # -(1 - skew) T / M
    return _dot(p_t, ratio), _through_softmax(slope, p_s)


def skewed_reverse_kl(
    student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], skew: float
) -> tuple[Float[Tensor, ""], Tensor]:
    """Return KL(S || (1 - skew) T + skew S), summed over tokens, in nats, and its gradient.

    Source: DistiLLM, arXiv:2402.03898, section 3.1.
    """
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = _log_mixture(log_s, log_t, skew)
    p_s, ratio = log_s.exp(), log_s.sub_(log_m)
    slope = ratio - ratio.exp().mul_(skew)  # without a constant, which the softmax's gradient removes
    return _dot(p_s, ratio), _through_softmax(slope, p_s)


def total_variation(student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"]) -> tuple[Float[Tensor, ""], Tensor]:
    """Return half of the sum of |T - S|, summed over tokens (at most 1 for each), and its gradient.

    Source: Wen et al. 2023, arXiv:2307.15190, section 3.
    """
    p_s = _softmax(student)
    difference = p_s - _softmax(teacher)
    return difference.abs().sum() / 2, _through_softmax(difference.sign_().div_(2), p_s)


def _log_mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return log(share P + (1 - share) Q) of log P and log Q."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def _through_softmax(slope: Float[Tensor, "N V"], p_s: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """Return the gradient for the logits of the gradient for their probabilities; overwrites `slope`."""
    return slope.sub_((p_s * slope).sum(-1, keepdim=True)).mul_(p_s)


Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
LOSSES: dict[PredictionLoss, Loss] = {
    "soft_ce": soft_ce,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
}
WITH_AMOUNT: dict[PredictionLoss, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "jsd": jsd,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
}


def divergence(
    loss: PredictionLoss, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], amount: float
) -> tuple[Float[Tensor, ""], Tensor]:
    """Return a loss and its gradient by the loss's name.

    Args:
        student, teacher: logits.
        amount: beta of `jsd`, or the skew of the skewed losses.
    """
    if loss in WITH_AMOUNT:
        return WITH_AMOUNT[loss](student, teacher, amount)
    return LOSSES[loss](student, teacher)


def cross_entropy(
    student: Float[Tensor, "N V"], targets: Int[Tensor, " N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "N V"]]:
    """Return -log p(target), summed over targets, in nats, and its gradient. `IGNORED` targets add nothing."""
    real = (targets != IGNORED).unsqueeze(-1)
    index = targets.unsqueeze(-1).where(real, 0)
    value = -(student.log_softmax(-1).gather(-1, index) * real).sum()
    gradient = _softmax(student)
    if torch.compiler.is_compiling():  # a scatter would be a pass of its own; in eager mode, a comparison would be
        gradient -= torch.arange(student.shape[-1], device=student.device) == index
    else:
        gradient.scatter_add_(-1, index, torch.full_like(index, -1, dtype=student.dtype))
    return value, gradient.mul_(real)


def _softmax(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """Return probabilities, in the way that is faster: compiled, the sums of a log-softmax serve this one, too."""
    return logits.log_softmax(-1).exp() if torch.compiler.is_compiling() else logits.softmax(-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a * b; overwrites `b`. On a CPU, oneDNN's torch.dot takes ten times as long."""
    return b.mul_(a).sum()
