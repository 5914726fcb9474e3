"""A teacher's predictions in 200 bytes: against naive float64 loops, and unbiased."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tinygpt2.models.lm_head import Head
from tinygpt2.objectives.logits import PredictionObjective, prediction_loss
from tinygpt2.objectives.sparse import BYTES, SparseForm, SparseTargets, sparse_kl


def logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def naive(student: Tensor, targets: SparseTargets) -> Tensor:
    """The loss as its definition says, one position and one token after another, in float64."""
    total = student.new_zeros((), dtype=torch.float64)
    for row, tokens, weights, extra in zip(
        student.double(), targets.tokens, targets.weights, targets.extra, strict=True
    ):
        q = row.exp() / row.exp().sum()
        for token, weight in zip(tokens.tolist(), weights.double(), strict=True):
            total = total - weight * q[token].log()
            if targets.kind == "top" and weight > 0:
                total = total + weight * weight.log()
        if targets.kind == "samples":
            total = total - extra.double()
        else:
            kept = set(tokens.tolist())
            rest = q[[token for token in range(len(q)) if token not in kept]].sum()
            total = total + extra.double() * (extra.double().log() - rest.log())
    return total


@pytest.mark.parametrize("vocabulary", [300, 70_000])
@pytest.mark.parametrize("kind", ["samples", "top"])
def test_the_loss_equals_a_naive_one(kind: str, vocabulary: int) -> None:
    form = SparseForm(kind, vocabulary)
    rows = 4 if vocabulary < 1000 else 1  # the loop over the rest is slow
    targets = form.targets(logits(rows, vocabulary, 1).double(), torch.rand(rows))
    student = logits(rows, vocabulary, 2).double().requires_grad_()
    expected = naive(student, targets)
    (gradient,) = torch.autograd.grad(expected, student)
    value, found = sparse_kl(student.detach(), targets)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("vocabulary", [100, 5000])
def test_samples_are_unbiased(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random number runs over a fine grid, which integrates over it: the mean weights are the probabilities."""
    form, grid = SparseForm("samples", vocabulary, 1.5), 2000
    teacher = logits(3, vocabulary) * torch.tensor([[0.1], [0.5], [2.0]])
    start = ((torch.arange(grid) + 0.5) / grid).float()
    for row in teacher:
        targets = form.targets(row.expand(grid, -1), start)
        mean = torch.zeros(vocabulary, dtype=torch.float64)
        mean.index_add_(0, targets.tokens.flatten(), targets.weights.double().flatten() / grid)
        p = (row.double() / 1.5).softmax(-1)
        step = float(targets.weights[targets.weights > 0].min())
        assert (mean - p).abs().max() <= 3 * step / grid + 1e-6
        assert len(targets.tokens[0]) == form.kept < vocabulary
        torch.testing.assert_close(targets.weights.sum(-1), torch.ones(grid))
        student = logits(1, vocabulary, 5).double()
        whole = student.softmax(-1) - p
        average = sparse_kl(student.expand(grid, -1), targets)[1].mean(0)
        assert (average - whole[0]).abs().max() <= 3 * step / grid + 1e-6
        exact = (p * (p.log() - student.log_softmax(-1)[0])).sum()
        value = sparse_kl(student.expand(grid, -1), targets)[0] / grid
        assert float(value) == pytest.approx(float(exact), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "vocabulary"), [("samples", 50_257), ("top", 65_536), ("top", 128_000), ("samples", 9)]
)
def test_records_take_200_bytes_and_hold_the_targets(kind: str, vocabulary: int) -> None:
    form = SparseForm(kind, vocabulary)
    assert 2 * form.width <= BYTES
    targets = form.targets(logits(5, vocabulary), torch.rand(5))
    records = form.pack(targets)
    assert records.shape == (5, form.width)
    assert records.dtype == torch.int16
    found = form.unpack(records)
    assert torch.equal(found.tokens, targets.tokens)
    torch.testing.assert_close(found.weights, targets.weights, rtol=1e-3, atol=1e-12)
    assert torch.equal(found.extra, targets.extra)


def test_a_certain_teacher_and_a_tiny_vocabulary() -> None:
    certain = torch.full((1, 300), -60.0)
    certain[0, 7] = 60.0
    for form in (SparseForm("samples", 300), SparseForm("top", 300)):
        targets = form.unpack(form.pack(form.targets(certain, torch.tensor([0.3]))))
        value, gradient = sparse_kl(certain.clone(), targets)
        assert math.isfinite(float(value))
        assert gradient.abs().max() < 1e-5
    small = SparseForm("samples", 9)
    teacher, student = logits(4, 9), logits(4, 9, 3)
    value, gradient = sparse_kl(student, small.targets(teacher, torch.rand(4)))
    exact = teacher.softmax(-1)
    torch.testing.assert_close(gradient, student.softmax(-1) - exact)
    kl = (exact * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum()
    torch.testing.assert_close(value, kl, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["samples", "top"])
def test_the_chunked_loss_with_cross_entropy(kind: str) -> None:
    """Chunks of 3 positions, a temperature, and both terms: equal to autograd through the whole in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(300, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    states, matrix = torch.randn(2, 5, 8, generator=generator), torch.randn(300, 8, generator=generator)
    form = SparseForm(kind, 300, 2.0)
    records = form.records(Head(matrix, 300), states, torch.arange(10).view(2, 5)).flatten(0, 1)
    assert torch.equal(records, form.records(Head(matrix, 300), states, torch.arange(10).view(2, 5)).flatten(0, 1))
    labels = torch.randint(300, (10,), generator=generator)
    objective = PredictionObjective(0.7, 0.3, "forward_kl", 2.0, 3)
    total, terms = prediction_loss(hidden, head, labels, (records, form), objective)
    found = torch.autograd.grad(total, (hidden, head))
    whole = hidden @ head.mT
    kl = naive(whole / 2, form.unpack(records)) * 4 / 10
    ce = torch.nn.functional.cross_entropy(whole, labels)
    expected = torch.autograd.grad(0.7 * kl + 0.3 * ce, (hidden, head))
    torch.testing.assert_close(terms["prediction"], kl.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(terms["ce"], ce.detach())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
