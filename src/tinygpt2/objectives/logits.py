"""Losses on predictions, computed for a chunk of tokens at a time, so that the full N x V logits are never held.

For each chunk, the logits of student and teacher are computed from their final hidden states and output matrices. The
same pass computes the loss and its gradients for the hidden states and the output matrix. A chunk is large enough for
fast matrix products. On a CPU, element-wise work handles a few rows of a chunk at a time, so that these rows stay in
its cache until all of that work is done. On a GPU, it is one compiled pass over the chunk: see `compilation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from tinygpt2.alignment.redistribution import AlignedHead
from tinygpt2.config.distillation import PredictionLoss
from tinygpt2.models.lm_head import Head, default_chunk, head_operand, rows_at_once, wide
from tinygpt2.objectives.compilation import compiled_or_eager, compiles_losses
from tinygpt2.objectives.divergences import IGNORED, MASKED, cross_entropy, divergence
from tinygpt2.objectives.sparse import SparseForm, SparseTargets, sparse_kl


@dataclass(frozen=True)
class PredictionObjective:
    """The losses to compute from logits. A loss whose weight is 0 is not computed.

    Attributes:
        prediction_weight, ce_weight: weights of the two losses in the returned total.
        loss: the loss between the predictions of student and teacher.
        skew, jsd_beta: settings of the losses that have them: see `divergences`.
        temperature: divides both models' logits; the loss is multiplied by its square.
        chunk: for how many tokens logits are held at a time; None uses `default_chunk`.
    """

    prediction_weight: float
    ce_weight: float
    loss: PredictionLoss = "forward_kl"
    temperature: float = 1.0
    chunk: int | None = None
    skew: float = 0.1
    jsd_beta: float = 0.5

    @property
    def amount(self) -> float:
        """The setting of the loss, if it has one."""
        return self.jsd_beta if self.loss == "jsd" else self.skew


def prediction_loss(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    teacher: tuple[Tensor, Float[Tensor, "W Dt"] | Head | SparseForm | AlignedHead] | None,
    objective: PredictionObjective,
    row_factors: tuple[Float[Tensor, " N"] | None, Float[Tensor, " N"] | None] = (None, None),
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return the weighted sum of the prediction loss and the next-token cross-entropy, and both terms unweighted.

    Args:
        hidden, head: the student's final hidden states and output matrix.
        targets: next tokens; `IGNORED` at positions without one.
        teacher: the teacher's final hidden states (N, Dt), and its head, or its output matrix as `head_operand`
            returns it; or records of its predictions (N, R) and their form, or what makes logits of them. None if only
            the cross-entropy is computed.
        objective: weights, loss, temperature and chunk.
        row_factors: for each token, by what the gradient of the prediction loss and that of the cross-entropy are
            multiplied. The values are not.

    Returns:
        The total, which has gradients, and the unweighted terms with a weight above 0: `prediction` is the mean over
        all N tokens, times the temperature squared; `ce` is the mean over the targets. If the head leaves out tokens,
        `teacher/left_out` is their mean probability.

    Raises:
        ValueError: the prediction loss has a weight above 0, but there is no teacher.
    """
    if teacher is None and objective.prediction_weight:
        raise ValueError("a prediction weight above 0 needs a teacher")
    teacher_hidden, teacher_head = teacher if teacher is not None else (None, None)
    if isinstance(teacher_head, Tensor):
        teacher_head = Head(teacher_head, len(head))
    total, prediction, ce, left_out = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, teacher_hidden, teacher_head, objective, *row_factors
    )
    terms = {}
    if objective.prediction_weight:
        terms["prediction"] = prediction
    if objective.ce_weight:
        terms["ce"] = ce
    if objective.prediction_weight and isinstance(teacher_head, Head) and teacher_head.others is not None:
        terms["teacher/left_out"] = left_out
    return total, terms


class _ChunkedLoss(torch.autograd.Function):
    """Computes the value and the gradients in one pass over chunks; backward only multiplies the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Head | SparseForm | AlignedHead | None,
        objective: PredictionObjective,
        *row_factors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device, count, vocabulary = hidden.device.type, len(hidden), len(head)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        matrix = head_operand(head)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        head_grad = torch.zeros_like(matrix, dtype=wide(head)) if needs_head else None
        states, judged = hidden.to(matrix.dtype), teacher_hidden if objective.prediction_weight else None
        if judged is not None and isinstance(teacher_head, Head):
            judged = judged.to(teacher_head.matrix.dtype)
        # Numbers of the host become tensors by filling, because a copy would wait for a GPU.
        counts = torch.stack([torch.full((), count, device=hidden.device), (targets != IGNORED).sum()])
        means = 1 / counts.clamp(min=1).to(wide(hidden))
        values, left_out = torch.zeros_like(means), torch.zeros_like(means[0])
        factor = objective.prediction_weight * objective.temperature
        scales = None if factor == 1 else torch.full_like(means[0], factor), objective.ce_weight * means[1] * count
        factors = _with_rows(scales[0], row_factors[0]), _with_rows(scales[1], row_factors[1])
        turns = max(1, math.ceil(count / (objective.chunk or default_chunk(vocabulary, device))))
        chunk = max(1, math.ceil(count / turns))  # chunks of equal size, because a small last one would be slow
        with torch.autocast(device, enabled=False):
            for start in range(0, count, chunk):
                part = slice(start, start + chunk)
                logits = states[part] @ matrix.mT
                soft: Tensor | SparseTargets | None = None
                if judged is not None and isinstance(teacher_head, SparseForm):
                    soft = teacher_head.unpack(judged[part])
                elif judged is not None and isinstance(teacher_head, AlignedHead):
                    soft = teacher_head.given(judged[part], logits)
                elif judged is not None and isinstance(teacher_head, Head):
                    soft = teacher_head.logits(judged[part])
                    left_out += teacher_head.left_out(judged[part], soft)
                wanted = targets[part] if objective.ce_weight else None
                found, gradient = _differentiate(logits, soft, wanted, objective, _part_of(factors, part), vocabulary)
                values += found
                if hidden_grad is not None:
                    hidden_grad[part] = gradient @ matrix
                if head_grad is not None:
                    _add_product(head_grad, gradient, states[part])
        prediction, ce = values * means
        # Apply the mean's 1/N only in backward: there, a loss scale has made the incoming gradient large.
        ctx.factor = 1 / max(1, count)
        ctx.rows, ctx.dtype = vocabulary, head.dtype
        ctx.save_for_backward(hidden_grad, head_grad)
        left_out = left_out * means[0]
        ctx.mark_non_differentiable(prediction, ce, left_out)
        return objective.prediction_weight * prediction + objective.ce_weight * ce, prediction, ce, left_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        factor = ctx.factor * grads[0]
        # In place: nobody else holds them, so torch refuses a second backward pass through the same graph.
        scaled = [None if grad is None else grad.mul_(factor) for grad in (hidden_grad, head_grad)]
        return scaled[0], None if scaled[1] is None else scaled[1][: ctx.rows].to(ctx.dtype), *[None] * 6


def _with_rows(scale: Tensor | None, rows: Float[Tensor, " N"] | None) -> Tensor | None:
    """Return a factor of all tokens, or (N, 1) one for each token."""
    if rows is None:
        return scale
    return rows[:, None] if scale is None else rows[:, None] * scale


def _part_of(factors: tuple[Tensor | None, ...], part: slice) -> tuple[Tensor | None, ...]:
    """Return the factors of some tokens."""
    return tuple(factor if factor is None or factor.dim() == 0 else factor[part] for factor in factors)


def _add_product(total: Float[Tensor, "V D"], gradient: Float[Tensor, "n V"], states: Float[Tensor, "n D"]) -> None:
    """Add gradient.T @ states to `total` in place, whose type is at least float32.

    The product is a sum over the chunk, not a mean, so float16 could not hold it: above 65504 it would be infinite
    whatever the loss scale.
    """
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.mT, states)
    elif gradient.device.type == "cuda" and torch.version.hip is None:
        if torch.__version__ >= "2.13":
            torch.addmm(total, gradient.mT, states, out_dtype=total.dtype, out=total)
        else:  # older versions want a 16-bit `total`, or cannot trace this call
            total += torch.mm(gradient.mT, states, out_dtype=total.dtype)
    elif gradient.dtype == torch.bfloat16:  # has float32's range, and a product of float32 takes longer
        total += gradient.mT @ states
    else:
        total.addmm_(gradient.mT.to(total.dtype), states.to(total.dtype))


def _differentiate(
    logits: Float[Tensor, "n W"],
    soft: Float[Tensor, "n W"] | SparseTargets | None,
    targets: Int[Tensor, " n"] | None,
    objective: PredictionObjective,
    factors: tuple[Tensor | None, ...],
    vocabulary: int,
) -> tuple[Float[Tensor, " 2"], Float[Tensor, "n W"]]:
    """Return the sums of the two losses, and the gradient of the weighted total for the student's logits.

    Softmax and sums use at least float32, whatever type the logits have. The gradient may overwrite the logits.

    Args:
        logits, soft: of student and teacher; W is V, or more if the output matrices are padded. Of a teacher, it may
            also be sparse targets.
        targets: next tokens, if the cross-entropy counts.
        factors: of the two losses' gradients, for all tokens or for each (n, 1); None stands for 1.
        vocabulary: V.
    """
    sparse = isinstance(soft, SparseTargets)
    if compiles_losses(logits.device.type) and not isinstance(logits, FakeTensor) and not sparse:
        settings = objective.loss, objective.amount, objective.temperature
        return compiled_or_eager(_whole_chunk, logits, soft, targets, factors, *settings, vocabulary)
    tau, rows = objective.temperature, rows_at_once(vocabulary, logits.device.type)
    values = logits.new_zeros(2, dtype=wide(logits))
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        student = logits[part, :vocabulary].to(values.dtype)
        softened: tuple[Tensor, Tensor | SparseTargets] | None = None
        if isinstance(soft, SparseTargets):
            softened = student if tau == 1 else student / tau, soft.part(part)
        elif soft is not None:
            teacher = soft[part, :vocabulary].to(values.dtype)
            softened = (student, teacher) if tau == 1 else (student / tau, teacher / tau)
        right = None if targets is None else targets[part]
        loss = objective.loss, objective.amount
        found, gradient = _weighted(student, softened, right, *loss, tau, _part_of(factors, part))
        values += found
        logits[part, :vocabulary] = gradient
    return values, logits


def _whole_chunk(
    logits: Tensor,
    soft: Tensor | None,
    targets: Tensor | None,
    factors: tuple[Tensor | None, ...],
    loss: PredictionLoss,
    amount: float,
    tau: float,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Do the same for all rows at once.

    Compiled, this is one kernel that stores nothing as large as the logits but the gradient.
    The columns of the padding are masked and not cut off, because rows of V numbers would not be aligned. Dividing by
    the temperature first keeps torch's compiler from its own treatment of a softmax of a quotient, which takes more
    passes.
    """
    real = torch.arange(logits.shape[-1], device=logits.device) < vocabulary

    def softened(x: Tensor, tau: float) -> Tensor:
        return (x.to(wide(x)) / tau).where(real, MASKED)

    pair = None if soft is None else (softened(logits, tau), softened(soft, tau))
    values, gradient = _weighted(softened(logits, 1.0), pair, targets, loss, amount, tau, factors)
    return values, gradient.to(logits.dtype)


def _weighted(
    student: Tensor,
    softened: tuple[Tensor, Tensor | SparseTargets] | None,
    targets: Tensor | None,
    loss: PredictionLoss,
    amount: float,
    tau: float,
    factors: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:
    """Return the sums of the two losses, unweighted, and the gradient of their weighted sum.

    Args:
        student: its logits.
        softened: the logits of student and teacher, divided by the temperature `tau`; or the student's, and targets
            that were made at this temperature.
    """
    values, gradients = [student.new_zeros(()), student.new_zeros(())], []
    if softened is not None:
        own, other = softened
        if isinstance(other, SparseTargets):
            value, gradient = sparse_kl(own, other)
        else:
            value, gradient = divergence(loss, own, other, amount)
        values[0] = value * tau**2
        gradients.append(gradient if factors[0] is None else gradient.mul_(factors[0]))
    if targets is not None:
        values[1], gradient = cross_entropy(student, targets)
        gradients.append(gradient if factors[1] is None else gradient.mul_(factors[1]))
    if not gradients:  # no loss counts at these positions, such as those of the data beside sampled text
        return torch.stack(values), torch.zeros_like(student)
    return torch.stack(values), gradients[0] if len(gradients) == 1 else gradients[0].add_(gradients[1])
