"""Approximate likelihood matching: the likelihoods of spans under teacher and student, compared as binary events.

With P and Q the likelihoods of a span under teacher and student, each to the power of 1 / temperature, the loss of the
span is the KL between the Bernoulli distributions of P and Q, times the temperature. Without this factor it would
vanish at high temperatures. With it, it approaches a log(a / b) - a + b there, where a and b are the negative
logarithms of the likelihoods. Its derivative by the student's log-likelihood is (Q - P) / (1 - Q), which is never below
-1, that of the cross-entropy. So its gradient for the logits is that of the cross-entropy of the span's tokens, times
(P - Q) / (1 - Q).

Source: Minixhofer et al. 2025, arXiv:2503.20083, section 3, with KL as the divergence. Temperature 100 is the default
of the authors' program.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tinygpt2.alignment.spans import SpanHead
from tinygpt2.models.lm_head import head_operand, losses_of
from tinygpt2.objectives.divergences import IGNORED
from tinygpt2.objectives.logits import PredictionObjective, prediction_loss


def bernoulli_kl(
    teacher: Float[Tensor, " S"], student: Float[Tensor, " S"], temperature: float
) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """Return the loss of each span, in nats, and its derivative by the student's log-likelihood.

    Args:
        teacher, student: logarithms of the likelihoods.
    """
    least = torch.finfo(student.dtype).eps  # a model that is certain gives no likelihood to anything else
    log_p, log_q = ((one / temperature).clamp(max=-least) for one in (teacher, student))
    p, not_p, not_q = log_p.exp(), -log_p.expm1(), -log_q.expm1()
    value = p * (log_p - log_q) + not_p * (not_p / not_q).log()
    return temperature * value, (log_q.exp() - p) / not_q


def span_loss(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    teacher: tuple[Int[Tensor, "N 3"], SpanHead],
    objective: PredictionObjective,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return the weighted sum of the losses of spans and the next-token cross-entropy, and the terms unweighted.

    The losses of spans are summed and divided by the number of positions. To them is added the loss between
    predictions of events, if the head has some, or else the cross-entropy of the tokens that are in no span.

    Args:
        hidden, head, targets, objective: see `prediction_loss`.
        teacher: records, and what gives the likelihoods.

    Returns:
        The total, which has gradients, and the terms of `prediction_loss`; `spans` is the spans' part of `prediction`.
    """
    records, likelihoods = teacher
    matrix, real = head_operand(head.detach()), targets != IGNORED
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        found = likelihoods.spans(records)
        states, known = hidden.to(matrix.dtype), targets.where(real, 0)
        losses, _ = losses_of(states, known, lambda part: part @ matrix.mT, len(head))
        student = torch.zeros_like(found.teacher).to(losses.dtype)
        student.index_add_(0, found.numbers, -losses.where(found.inside, 0.0))
        pairs = [bernoulli_kl(found.teacher.to(student), student, one) for one in likelihoods.temperatures]
        values, slopes = (torch.stack(part).mean(0) for part in zip(*pairs, strict=True))
        spans = values.where(found.used, 0.0).sum() / len(targets)
        alone = likelihoods.events is None
        rows = (-slopes)[found.numbers].where(found.inside, float(alone))
        outside = losses.where(real & ~found.inside, 0.0).sum() / len(targets) if alone else torch.zeros_like(spans)
        # the gradient of the cross-entropy of each token, with the factors of all terms
        share = real.sum() / len(targets)
        factors = objective.ce_weight + objective.prediction_weight * rows * share
    events = 0.0 if alone else objective.prediction_weight
    inner = replace(objective, prediction_weight=events, ce_weight=1.0)
    total, terms = prediction_loss(hidden, head, targets, None if alone else teacher, inner, (None, factors))
    terms["prediction"] = terms.get("prediction", 0.0) + spans + outside
    value = objective.prediction_weight * terms["prediction"] + objective.ce_weight * terms["ce"]
    if not objective.ce_weight:
        del terms["ce"]
    return total + (value - total).detach(), terms | {"spans": spans}
