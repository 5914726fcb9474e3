"""Naive references that share no code with what they check: whole matrices, plain autograd."""

from __future__ import annotations

import math

import torch


def naive_scores(
    student: tuple[torch.Tensor, torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor],
    student_scale: float,
    teacher_scale: float,
) -> torch.Tensor:
    """Mean squared difference of full score matrices over the lower triangle."""
    (q, k), (tq, tk) = student, teacher
    mask = torch.ones(q.shape[2], q.shape[2]).tril().bool()
    gap = q @ k.transpose(-1, -2) * student_scale - tq @ tk.transpose(-1, -2) * teacher_scale
    return (gap[:, :, mask] ** 2).mean()


def naive_relation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over heads and positions of the divergence between rows of full relation matrices, row by row."""
    batch, heads, length, _ = student.shape
    total = torch.zeros((), dtype=student.dtype)
    for row in range(length):
        logs = []
        for x in (student, teacher):
            products = (x[:, :, row : row + 1] * x[:, :, : row + 1]).sum(-1) / math.sqrt(x.shape[-1])
            logs.append(products - torch.logsumexp(products, -1, keepdim=True))
        total = total + (logs[1].exp() * (logs[1] - logs[0])).sum()
    return total / (batch * heads * length)


def naive_divergence(name: str, student: torch.Tensor, teacher: torch.Tensor, amount: float) -> torch.Tensor:
    """Sum over tokens of a prediction loss, from probabilities. `amount` is beta of jsd, or the skew."""
    q = student.exp() / student.exp().sum(-1, keepdim=True)
    p = teacher.exp() / teacher.exp().sum(-1, keepdim=True)
    m, towards_q = amount * p + (1 - amount) * q, (1 - amount) * p + amount * q
    per_token = {
        "soft_ce": -p * q.log(),
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jsd": amount * p * (p / m).log() + (1 - amount) * q * (q / m).log(),
        "skewed_forward_kl": p * (p / m).log(),
        "skewed_reverse_kl": q * (q / towards_q).log(),
        "total_variation": (p - q).abs() / 2,
    }
    return per_token[name].sum()


def naive_prediction(
    name: str,
    tau: float,
    weights: tuple[float, float],
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: list[int],
    amount: float = 0.5,
) -> torch.Tensor:
    """Weighted sum of a prediction loss and cross-entropy over whole logits; a target below 0 counts nothing."""
    prediction = naive_divergence(name, student / tau, teacher / tau, amount) * tau**2 / len(student)
    real = [row for row, target in enumerate(targets) if target >= 0]
    logs = student.log_softmax(-1)
    ce = -sum((logs[row, targets[row]] for row in real), torch.zeros((), dtype=student.dtype)) / len(real)
    return weights[0] * prediction + weights[1] * ce
