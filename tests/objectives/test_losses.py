"""Single losses: values and gradients against naive references, and what must hold for any input."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from types import ModuleType
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.references import naive_divergence, naive_prediction, naive_relation, naive_scores
from tinygpt2.config.distillation import PredictionLoss
from tinygpt2.errors import ConfigError
from tinygpt2.models import lm_head
from tinygpt2.models.lm_head import head_operand, operand_rows
from tinygpt2.objectives import attention as attention_module
from tinygpt2.objectives import compilation, divergences
from tinygpt2.objectives import logits as prediction_module
from tinygpt2.objectives.attention import attention_loss, relation_loss
from tinygpt2.objectives.divergences import cross_entropy, divergence
from tinygpt2.objectives.hidden import cosine_loss, hidden_loss
from tinygpt2.objectives.layer_maps import layer_pairs, state_pairs
from tinygpt2.objectives.logits import PredictionObjective, prediction_loss

V = 50
LOSSES = sorted(get_args(PredictionLoss))


def padded_rows(vocabulary: int, device: str) -> int:
    """What `operand_rows` returns on a GPU, on any device."""
    return operand_rows(vocabulary, "cuda")


def doubles(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def assert_same(ours: torch.Tensor, naive: torch.Tensor, *inputs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, naive)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(naive, inputs))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 3), st.integers(0, 10**6))
def test_scores_of_any_length_equal_full_matrices(length: int, heads: int, seed: int) -> None:
    q, k, tq, tk = doubles(seed, *[(2, heads, length, width) for width in (3, 3, 5, 5)])
    q.requires_grad_(), k.requires_grad_()
    ours = attention_loss((q, k), (tq, tk), 0.5, 0.4)
    assert_same(ours, naive_scores((q, k), (tq, tk), 0.5, 0.4), q, k)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 200), st.integers(1, 3), st.integers(0, 10**6))
def test_relations_of_any_length_equal_full_matrices(length: int, heads: int, seed: int) -> None:
    mine, theirs = doubles(seed, (2, heads, length, 3), (2, heads, length, 5))
    mine.requires_grad_()
    assert_same(relation_loss(mine, theirs), naive_relation(mine, theirs), mine)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_block_size_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, tq, tk = doubles(1, *[(2, 2, 21, width) for width in (3, 3, 5, 5)])
    q.requires_grad_(), k.requires_grad_()
    whole = attention_loss((q, k), (tq, tk), 0.5, 0.4), relation_loss(k, tk)
    monkeypatch.setattr(attention_module, "ROWS", rows)
    blocks = attention_loss((q, k), (tq, tk), 0.5, 0.4), relation_loss(k, tk)
    for a, b in zip(whole, blocks, strict=True):
        assert_same(a, b, k)


def test_gradcheck_of_every_loss() -> None:
    q, k, tq, tk = doubles(2, *[(1, 2, 5, width) for width in (3, 3, 4, 4)])
    q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: attention_loss((q, k), (tq, tk), 0.5, 0.4), (q, k))
    assert torch.autograd.gradcheck(lambda k: relation_loss(k, tk), (k,))
    mine, theirs = doubles(3, (2, 3, 4), (2, 3, 4))
    mine.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hidden_loss(x, theirs, "none"), (mine,))
    assert torch.autograd.gradcheck(lambda x: hidden_loss(x, theirs, "variance"), (mine,))
    assert torch.autograd.gradcheck(lambda x: cosine_loss(x, theirs), (mine,))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_predictions_equal_finite_differences(name: str) -> None:
    hidden, head, teacher_hidden, teacher_head = doubles(4, (6, 3), (7, 3), (6, 4), (7, 4))
    targets = torch.tensor([0, 6, -100, 3, 3, -100])
    objective = PredictionObjective(0.6, 0.4, name, 1.5, 4, skew=0.3, jsd_beta=0.3)

    def total(*both: torch.Tensor) -> torch.Tensor:
        return prediction_loss(*both, targets, (teacher_hidden, teacher_head), objective)[0]

    both = hidden.requires_grad_(), head.requires_grad_()
    gradients = torch.autograd.grad(total(*both), both)
    for which, gradient in enumerate(gradients):
        for place in range(gradient.numel()):
            step = torch.zeros(gradient.numel(), dtype=torch.float64)
            step[place] = 1e-6
            ends = []
            for sign in (1, -1):
                moved = [x.detach().clone() for x in both]
                moved[which] += sign * step.view_as(gradient)
                ends.append(float(total(*moved)))
            slope = (ends[0] - ends[1]) / 2e-6
            assert float(gradient.flatten()[place]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.6, 0.4)])
@pytest.mark.parametrize("chunk", [1, 5, 37, None])
@pytest.mark.parametrize("path", ["as on a CPU", "padded", "as on a GPU"])
def test_predictions_equal_whole_logits(
    name: str, tau: float, weights: tuple[float, float], chunk: int | None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_module, "rows_at_once", lambda vocabulary, device: 4)
    if path != "as on a CPU":
        monkeypatch.setattr(lm_head, "operand_rows", padded_rows)
    if path == "as on a GPU":  # the same function as on a GPU, without its compiler
        monkeypatch.setattr(prediction_module, "compiles_losses", lambda device: True)
        monkeypatch.setattr(prediction_module, "compiled_or_eager", lambda function, *arguments: function(*arguments))
    hidden, head, *teacher = doubles(0, (37, 8), (V, 8), (37, 12), (V, 12))
    hidden.requires_grad_(), head.requires_grad_()
    targets = torch.randint(0, V, (37,), generator=torch.Generator().manual_seed(1))
    targets[::7] = -100
    objective = PredictionObjective(*weights, name, tau, chunk, skew=0.3, jsd_beta=0.3)
    total, terms = prediction_loss(hidden, head, targets, (teacher[0], head_operand(teacher[1])), objective)
    logits = hidden @ head.T, teacher[0] @ teacher[1].T
    naive = naive_prediction(name, tau, weights, *logits, targets.tolist(), 0.3)
    assert_same(total, naive, hidden, head)
    assert set(terms) == {name for name, weight in zip(("prediction", "ce"), weights, strict=True) if weight}


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(LOSSES), st.floats(0.01, 0.99), st.floats(-50, 50), st.integers(0, 10**6))
def test_divergences_vanish_at_equality_and_ignore_shifts(name: str, amount: float, shift: float, seed: int) -> None:
    a, b = doubles(seed, (4, 9), (4, 9))
    value, gradient = divergence(name, a, b, amount)
    shifted, same = divergence(name, a + shift, b - shift, amount)
    assert float(shifted) == pytest.approx(float(value), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(same, gradient)
    assert float(value) == pytest.approx(float(naive_divergence(name, a, b, amount)), rel=1e-9)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(4, dtype=torch.float64))
    at_equality, flat = divergence(name, a, a.clone(), amount)
    torch.testing.assert_close(flat, torch.zeros_like(flat))
    if name != "soft_ce":
        assert float(at_equality) == pytest.approx(0, abs=1e-12)
        assert float(value) > 0


def test_the_limits_of_jsd_are_forward_and_reverse_kl() -> None:
    a, b = doubles(6, (4, 9), (4, 9))
    for end, near, name in ((0.0, 1e-6, "forward_kl"), (1.0, 1 - 1e-6, "reverse_kl")):
        expected = divergence(name, a, b, 0.0)
        torch.testing.assert_close(divergence("jsd", a, b, end), expected, rtol=0, atol=0)
        scaled = [x / (near * (1 - near)) for x in divergence("jsd", a, b, near)]
        torch.testing.assert_close(scaled, list(expected), rtol=1e-4, atol=1e-4)


def test_losses_leave_their_inputs_alone() -> None:
    a, b = doubles(5, (4, 9), (4, 9))
    before = a.clone(), b.clone()
    for loss in LOSSES:
        divergence(loss, a, b, 0.3)
    cross_entropy(a, torch.tensor([0, 1, -100, 3]))
    torch.testing.assert_close((a, b), before, rtol=0, atol=0)


def plain_copy(module: ModuleType) -> ModuleType:
    """Load a module again without the tests' checks of shapes, which cannot be compiled."""
    name = f"{module.__name__}_to_compile"
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    again = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return again


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports its own old modules
@pytest.mark.parametrize(("loss", "tau"), [("forward_kl", 1.0), ("jsd", 2.0), ("skewed_reverse_kl", 1.0)])
def test_compiled_losses_equal_eager_ones(loss: str, tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph serves chunks of any size, for operands with padding."""
    plain, losses = plain_copy(prediction_module), plain_copy(divergences)
    plain.divergence, plain.cross_entropy = losses.divergence, losses.cross_entropy
    monkeypatch.setattr(lm_head, "operand_rows", padded_rows)
    monkeypatch.setattr(plain, "compiles_losses", lambda device: True)
    monkeypatch.setattr(compilation, "warn", pytest.fail)  # it would have run eagerly
    hidden, head, *teacher = (x.float() for x in doubles(0, (37, 8), (V, 8), (37, 12), (V, 12)))
    hidden.requires_grad_(), head.requires_grad_()
    targets = torch.randint(0, V, (37,), generator=torch.Generator().manual_seed(1))
    targets[::7] = -100
    naive = naive_prediction(loss, tau, (0.6, 0.4), hidden @ head.T, teacher[0] @ teacher[1].T, targets.tolist())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for chunk in (37, 10):  # 10: three chunks of 10 and one of 7
        objective = plain.PredictionObjective(0.6, 0.4, loss, tau, chunk, skew=0.5)
        total, _ = plain.prediction_loss(hidden, head, targets, (teacher[0], head_operand(teacher[1])), objective)
        assert_same(total, naive, hidden, head)
        naive = naive_prediction(loss, tau, (0.6, 0.4), hidden @ head.T, teacher[0] @ teacher[1].T, targets.tolist())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_losses_that_cannot_be_compiled_run_eagerly_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(compilation, "warn", warnings.append)
    monkeypatch.setattr(compilation, "_compiled", lambda function: no_compiler)
    monkeypatch.setattr(prediction_module, "compiles_losses", lambda device: True)

    def no_compiler(*_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("Failed to find C compiler")

    hidden, head = doubles(0, (37, 8), (V, 8))
    hidden.requires_grad_(), head.requires_grad_()
    targets = torch.randint(0, V, (37,), generator=torch.Generator().manual_seed(1))
    total, _ = prediction_loss(hidden, head, targets, None, PredictionObjective(0.0, 1.0, chunk=10))
    assert_same(total, torch.nn.functional.cross_entropy(hidden @ head.T, targets), hidden, head)
    assert len(warnings) == 1
    assert "Failed to find C compiler" in warnings[0]
    compilation._failed.clear()


def in_bfloat16(
    hidden: torch.Tensor, head: torch.Tensor, teacher: list[torch.Tensor], targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the total and the gradient for the output matrix."""
    with torch.autocast("cpu", torch.bfloat16):
        labels = (teacher[0], head_operand(teacher[1]))
        total, _ = prediction_loss(hidden, head, targets, labels, PredictionObjective(1.0, 1.0, chunk=10))
    return total.detach(), torch.autograd.grad(total, head)[0]


def test_bfloat16_keeps_softmax_sums_and_the_weight_gradient_in_float32() -> None:
    hidden, head, *teacher = (x.float() for x in doubles(6, (300, 8), (V, 8), (300, 12), (V, 12)))
    hidden.requires_grad_(), head.requires_grad_()
    targets = torch.randint(0, V, (300,), generator=torch.Generator().manual_seed(1))
    total, gradient = in_bfloat16(hidden, head, teacher, targets)
    # the same rounded logits, everything after them in float64
    states, matrix, *labels = (x.detach() for x in (hidden, head - head.mean(0), teacher[0], teacher[1]))
    labels[1] = labels[1] - labels[1].mean(0)
    logits = (states.bfloat16() @ matrix.bfloat16().T).double().requires_grad_()
    soft = (labels[0].bfloat16() @ labels[1].bfloat16().T).double()
    exact = naive_prediction("forward_kl", 1.0, (1.0, 1.0), logits, soft, targets.tolist())
    assert total.dtype == gradient.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=1e-5)
    (of_logits,) = torch.autograd.grad(exact, logits)
    expected = of_logits.T @ states.bfloat16().double()
    # thirty chunks, each product rounded to eight bits once: sums in bfloat16 would be off by several per cent
    error = (gradient.double() - expected).norm() / expected.norm()
    assert float(error) < 0.005


def test_a_large_offset_of_all_logits_costs_bfloat16_nothing() -> None:
    hidden, head, *teacher = (x.float() for x in doubles(6, (300, 8), (V, 8), (300, 12), (V, 12)))
    hidden, teacher[0] = hidden + 3, teacher[0] + 3
    hidden.requires_grad_(), head.requires_grad_()
    targets = torch.randint(0, V, (300,), generator=torch.Generator().manual_seed(1))
    logits, labels = (a.double() @ b.double().T for a, b in ((hidden, head), teacher))
    exact = naive_prediction("forward_kl", 1.0, (1.0, 1.0), logits, labels, targets.tolist())
    (expected,) = torch.autograd.grad(exact, head)
    far_head, far_teacher = (head - 5).detach().requires_grad_(), [teacher[0], teacher[1] - 5]
    assert float((hidden @ far_head.T).mean().detach()) < -100
    for student_head, labels in ((head, teacher), (far_head, far_teacher)):
        total, gradient = in_bfloat16(hidden, student_head, labels, targets)
        assert total.item() == pytest.approx(exact.item(), rel=0.01)
        assert float((gradient - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_the_output_matrix_gradient_of_many_tokens_does_not_overflow(precision: torch.dtype) -> None:
    """One dimension of the states is large in every token, as in GPT-2: its sum over a chunk is beyond float16."""
    count, width, large = 2048, 8, 1000.0
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=generator)
    hidden[:, 0] = large
    head = torch.randn(V, width, generator=generator) * 0.02
    head[:, 0] = 0
    hidden.requires_grad_(), head.requires_grad_()
    targets = torch.randint(0, V, (count,), generator=generator)
    targets[::5] = 7  # a token that is a fifth of the text
    with torch.autocast("cpu", precision):
        total, _ = prediction_loss(hidden, head, targets, None, PredictionObjective(0.0, 1.0))
    gradients = torch.autograd.grad(total, (hidden, head))
    exact_hidden, exact_head = (x.detach().double().requires_grad_() for x in (hidden, head))
    exact = torch.nn.functional.cross_entropy(exact_hidden @ exact_head.T, targets)
    expected = torch.autograd.grad(exact, (exact_hidden, exact_head))
    assert float(expected[1].abs().max()) * count > 65504  # the sum, which float16 cannot hold
    near = 0.002 if precision == torch.float16 else 0.01
    for ours, reference in zip(gradients, expected, strict=True):
        assert float((ours - reference).norm() / reference.norm()) < near


def test_backward_multiplies_the_gradients_in_place() -> None:
    hidden, head = torch.randn(64, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    total, _ = prediction_loss(hidden, head, torch.zeros(64, dtype=torch.long), None, PredictionObjective(0.0, 1.0))
    kept = [x.data_ptr() for x in total.grad_fn.saved_tensors]
    given = torch.autograd.grad(3 * total, (hidden, head), retain_graph=True)
    assert [x.data_ptr() for x in given] == kept
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_no_logit_matrix_outlives_its_chunk() -> None:
    """Nothing of N x V numbers is ever allocated: only chunks are."""
    n, v = 512, 4000
    hidden, head = torch.randn(n, 4, requires_grad=True), torch.randn(v, 4, requires_grad=True)
    targets, teacher = torch.zeros(n, dtype=torch.long), (hidden.detach(), head.detach())
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        total, _ = prediction_loss(hidden, head, targets, teacher, PredictionObjective(1.0, 1.0, chunk=32))
        total.backward()
    largest = max((event.self_device_memory_usage or event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < largest < n * v * 4 / 4


def test_no_score_matrix_outlives_its_block() -> None:
    q, k, tq, tk = (torch.randn(1, 2, 1024, 4, requires_grad=index < 2) for index in range(4))
    with torch.profiler.profile(profile_memory=True) as profile:
        (attention_loss((q, k), (tq, tk), 0.5, 0.5) + relation_loss(k, tk)).backward()
    largest = max((event.self_device_memory_usage or event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < largest <= 2 * 128 * 1024 * 4


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, [3, 6, 9, 12]), ("uniform", 6, 12, [2, 4, 6, 8, 10, 12]), ("uniform", 2, 3, [2, 3]),
        ("last", 4, 12, [9, 10, 11, 12]), ("first", 4, 12, [1, 2, 3, 4]), ("3,6,9,12", 4, 12, [3, 6, 9, 12]),
    ],
)  # fmt: skip
def test_layer_maps(rule: str, student: int, teacher: int, expected: list[int]) -> None:
    assert layer_pairs(rule, student, teacher) == list(enumerate(expected, 1))


@pytest.mark.parametrize(
    ("rule", "student", "teacher"), [("1,2", 3, 12), ("1,13", 2, 12), ("0,1", 2, 12), ("first", 5, 4)]
)
def test_impossible_layer_maps(rule: str, student: int, teacher: int) -> None:
    with pytest.raises(ConfigError):
        layer_pairs(rule, student, teacher)


@pytest.mark.parametrize("rule", ["3", "0,2=13", "1,1=6"])
def test_impossible_hidden_maps(rule: str) -> None:
    with pytest.raises(ConfigError, match="--hidden-map"):
        state_pairs(rule, [(1, 6), (2, 12)], 12)
