"""MiniLLM's estimator against the reverse KL of whole texts, by enumerating all continuations in float64."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2 import DistillConfig
from tinygpt2.models.loading import random_model
from tinygpt2.objectives.policy_gradient import importance, later_returns
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.training.step import Step

V, N, PROMPT = 4, 3, 2
TEXTS = list(itertools.product(range(V), repeat=N))
WHERE = "transformer.h.0.mlp.c_fc.weight"


def made(seed: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=2, n_positions=N + 1, vocab_size=V, initializer_range=0.5, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return random_model(config, seed).double()


def log_probs(model: GPT2LMHeadModel, text: tuple[int, ...]) -> torch.Tensor:
    """The logs of all next-token probabilities before each token of a text: (N, V)."""
    return model(torch.tensor([[PROMPT, *text[:-1]]])).logits[0].log_softmax(-1)


def gradient(model: GPT2LMHeadModel, value: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, dict(model.named_parameters())[WHERE])[0]


def true_gradient(student: GPT2LMHeadModel, teacher: GPT2LMHeadModel) -> torch.Tensor:
    """Of KL(student || teacher) over all texts."""
    total = torch.zeros((), dtype=torch.float64)
    for text in TEXTS:
        at = range(N), text
        s, t = log_probs(student, text)[at].sum(), log_probs(teacher, text)[at].sum().detach()
        total = total + s.exp() * (s - t)
    return gradient(student, total)


def naive(
    student: GPT2LMHeadModel,
    teacher: GPT2LMHeadModel,
    text: tuple[int, ...],
    *,
    normalised: bool,
    share: float,
    clip: float = 0.0,
    old: GPT2LMHeadModel | None = None,
) -> torch.Tensor:
    """The estimator on one text, written as in the paper, step by step, with PPO's clipped objective for the ratios."""
    s, t = log_probs(student, text), log_probs(teacher, text).detach()
    before = s.detach() if old is None else log_probs(old, text).detach()
    total = torch.zeros((), dtype=torch.float64)
    for step, token in enumerate(text):
        drawn = share * float(t[step, token].exp()) + (1 - share) * float(before[step, token].exp())
        ratio = s[step, token].exp() / drawn
        later = [float(t[k, text[k]] - s[k, text[k]].detach()) for k in range(step + 1, N)]
        reward = sum(later) / max(1, len(later)) if normalised else sum(later)
        long, weight = ratio * reward, ratio.detach()
        if clip:
            long = torch.minimum(long, ratio.clamp(1 - clip, 1 + clip) * reward)
            weight = weight.clamp(max=1 + clip)
        total = total + weight * (s[step].exp() * (s[step] - t[step])).sum() - long
    return gradient(student, total)


def ours(
    student: GPT2LMHeadModel,
    teacher: GPT2LMHeadModel,
    text: tuple[int, ...],
    *,
    normalised: bool,
    share: float,
    clip: float = 0.0,
    old: GPT2LMHeadModel | None = None,
) -> torch.Tensor:
    """The gradient of the program's loss on a batch of one text; its mean over positions is made a sum."""
    weights = LossWeights(
        ce=0.0, own_text=1.0, own_text_loss="policy_gradient", mixture=share, normalise_returns=normalised,
        clip_ratio=clip,
    )  # fmt: skip
    config = DistillConfig(teacher="t", student="s", data="d", out="o", logit_chunk=2)
    step = Step(student, teacher, weights, config).train()
    counted, drawn = np.array([[False, True, True, True]]), None
    if old is not None:
        chances = chance_of(old, teacher, text, share)
        drawn = np.array([[0.0, *map(math.log, chances)]])
    loss, terms = step(torch.tensor([[PROMPT, *text]]), None, None, None, counted, None, np.array([True]), drawn)
    assert set(terms) == {"own_text", "sample/student_loss"}
    return N * gradient(student, loss)


def chance_of(student: GPT2LMHeadModel, teacher: GPT2LMHeadModel, text: tuple[int, ...], share: float) -> list[float]:
    """The probability with which the mixture of student and teacher draws each token of a text."""
    s, t = log_probs(student, text).detach().exp(), log_probs(teacher, text).detach().exp()
    return [float(share * t[k, token] + (1 - share) * s[k, token]) for k, token in enumerate(text)]


def mean(
    student: GPT2LMHeadModel,
    teacher: GPT2LMHeadModel,
    share: float,
    old: GPT2LMHeadModel | None = None,
    **how: float,
) -> torch.Tensor:
    """The estimator's mean over the texts that the student, an old one, or its mixture with the teacher samples."""
    total = torch.zeros_like(dict(student.named_parameters())[WHERE])
    for text in TEXTS:
        chance = math.prod(chance_of(old or student, teacher, text, share))
        total += chance * ours(student, teacher, text, share=share, old=old, **how)
    return total


def test_the_mean_is_the_gradient_of_the_reverse_kl_of_whole_texts() -> None:
    student, teacher = made(0), made(1)
    expected = true_gradient(student, teacher)
    torch.testing.assert_close(mean(student, teacher, 0.0, normalised=False), expected, rtol=1e-6, atol=1e-9)
    # each of the others brings a bias by itself
    for share, normalised in ((0.0, True), (0.4, False)):
        bias = (mean(student, teacher, share, normalised=normalised) - expected).norm() / expected.norm()
        assert 0.01 < float(bias) < 1.5


def moved(student: GPT2LMHeadModel, amount: float) -> GPT2LMHeadModel:
    """The student that it was some steps before."""
    other, direction = copy.deepcopy(student), made(9)
    with torch.no_grad():
        for mine, its in zip(other.parameters(), direction.parameters(), strict=True):
            mine.add_(amount * its)
    return other


def test_clipping_alone_brings_a_bias_that_shrinks_with_the_students_distance() -> None:
    student, teacher = made(0), made(1)
    expected = true_gradient(student, teacher)
    biases = []
    for amount in (0.6, 0.2, 0.0):
        old = moved(student, amount)
        plain, clipped = (mean(student, teacher, 0.0, old, normalised=False, clip=clip) for clip in (0.0, 0.2))
        biases.append(float((clipped - plain).norm() / expected.norm()))
    assert biases[0] > biases[1] > 0.001
    assert biases[0] < 1.5
    assert biases[2] == 0  # the student's own text of now is never clipped, and its mean is the true gradient
    torch.testing.assert_close(clipped, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("share", "clip"), [(0.0, 0.0), (0.2, 0.0), (0.2, 0.2)])
@pytest.mark.parametrize("distance", [0.0, 0.5])
def test_each_text_gives_the_papers_estimate(normalised: bool, share: float, clip: float, distance: float) -> None:
    student, teacher = made(2), made(3)
    old = moved(student, distance) if distance else None
    for text in TEXTS[::7]:
        how = {"normalised": normalised, "share": share, "clip": clip, "old": old}
        torch.testing.assert_close(
            ours(student, teacher, text, **how), naive(student, teacher, text, **how), rtol=1e-6, atol=1e-9
        )


def test_returns_of_texts_of_other_lengths() -> None:
    ratio = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert later_returns(ratio, [3, 1, 2], normalised=False).tolist() == [6, 4, 0, 0, 32, 0]
    assert later_returns(ratio, [3, 1, 2], normalised=True).tolist() == [3, 4, 0, 0, 32, 0]


def test_importance_is_bounded_and_its_mean_is_one() -> None:
    s, t = torch.randn(50).log_softmax(-1).double(), torch.randn(50).log_softmax(-1).double()
    found = importance(s, t, 0.2)
    assert float(found.max()) <= 1 / 0.8 + 1e-9
    assert float((found * (0.2 * t.exp() + 0.8 * s.exp())).sum()) == pytest.approx(1)
    assert importance(s, t, 0.0).eq(1).all()
