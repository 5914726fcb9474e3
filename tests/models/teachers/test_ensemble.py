"""Several teachers as one, against means of probabilities in float64 that are computed without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.conftest import make_model
from tinygpt2 import DistillConfig, distill, plan_run
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.errors import ConfigError
from tinygpt2.models import lm_head
from tinygpt2.models.lm_head import head_operand
from tinygpt2.models.loading import load_model
from tinygpt2.models.teachers.ensemble import Ensemble
from tinygpt2.models.teachers.loading import as_teacher
from tinygpt2.objectives import logits as prediction_module
from tinygpt2.objectives.logits import PredictionObjective, prediction_loss
from tinygpt2.training.metrics import read_metrics


@pytest.fixture(scope="module")
def models(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two teachers of different sizes, and a student."""
    root = tmp_path_factory.mktemp("models")
    shapes = [{"n_layer": 3, "n_embd": 32}, {"n_layer": 1, "n_embd": 24}, {"n_layer": 1, "n_embd": 16}]
    return [make_model(root / str(seed), tokenizer_dir, seed=seed, **shape) for seed, shape in enumerate(shapes)]


def doubles(path: Path) -> GPT2LMHeadModel:
    return load_model(str(path))[0].double().eval()


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
@pytest.mark.parametrize(("tau", "chunk", "padded"), [(1.0, None, False), (2.0, 7, False), (1.0, 5, True)])
def test_a_student_learns_the_mean_of_the_probabilities(
    models: list[Path], loss: str, tau: float, chunk: int | None, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_module, "rows_at_once", lambda vocabulary, device: 4)
    if padded:
        monkeypatch.setattr(lm_head, "operand_rows", lambda vocabulary, device: vocabulary + 13)
    *teachers, student = map(doubles, models)
    ids = torch.randint(0, 320, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        mean = (teachers[0](ids).logits.softmax(-1) + teachers[1](ids).logits.softmax(-1)) / 2
        states = student.transformer(ids).last_hidden_state.flatten(0, 1)
    t = mean.flatten(0, 1).pow(1 / tau)
    t = t / t.sum(-1, keepdim=True)
    head = student.lm_head.weight.detach().clone().requires_grad_()
    s = (states @ head.T / tau).softmax(-1)
    m = (t + s) / 2
    naive = {
        "forward_kl": (t * (t / s).log()).sum(),
        "reverse_kl": (s * (s / t).log()).sum(),
        "jsd": ((t * (t / m).log()).sum() + (s * (s / m).log()).sum()) / 2,
        "total_variation": (s - t).abs().sum() / 2,
    }[loss] * tau**2 / len(states)  # fmt: skip
    (expected,) = torch.autograd.grad(naive, head)
    both = Ensemble([as_teacher(one) for one in teachers])
    last = both.shape.layers
    judged = both.collect(ids, [last]).states[last].flatten(0, 1)
    objective = PredictionObjective(1.0, 0.0, loss, tau, chunk)
    targets = torch.full((len(states),), -100)
    total, _ = prediction_loss(states, head, targets, (judged.detach(), both.head()), objective)
    (gradient,) = torch.autograd.grad(total, head)
    torch.testing.assert_close(total, naive, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-12)


def test_the_same_teacher_twice_is_that_teacher(models: list[Path]) -> None:
    one = as_teacher(doubles(models[0]))
    twice = Ensemble([one, as_teacher(doubles(models[0]))])
    ids = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(5))
    losses = [teacher.losses(teacher.head(), ids)[0] for teacher in (one, twice)]
    torch.testing.assert_close(losses[1], losses[0])
    assert head_operand(doubles(models[0]).lm_head.weight).shape == twice.head().matrix.shape


def test_distill_learns_from_two_and_says_so(models: list[Path], data: Path, tmp_path: Path) -> None:
    first, second, student = map(str, models)
    config = DistillConfig(
        teacher=[first, second], student=student, data=str(data), out=str(tmp_path / "m"), max_steps=3,
        micro_batch_size=2, log_every=1, save_every=1, keep=9,
    )  # fmt: skip
    plan = plan_run(config)
    assert plan.teacher_parameters == sum(doubles(path).num_parameters() for path in models[:2])
    result = distill(config)
    with torch.no_grad():
        blocks = load_packed_dataset(str(data)).test
        ids = blocks.batch(list(range(len(blocks)))).input_ids
        mean = sum(doubles(path)(ids).logits.softmax(-1) for path in models[:2]) / 2
        expected = -mean[:, :-1].gather(-1, ids[:, 1:, None]).log().mean()
    row = next(iter(read_metrics(tmp_path / "m")))
    assert row["teacher/loss"] == pytest.approx(float(expected), rel=1e-4)
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"{Path(first).name} and {Path(second).name}" in card
    again = distill(config.model_copy(update={"resume": True}))
    assert again.loss == result.loss
    with pytest.raises(ConfigError, match="--teacher"):
        distill(config.model_copy(update={"teacher": [second, first], "resume": True}))


def test_what_several_teachers_cannot_give_is_refused(cli: Callable, models: list[Path], data: Path) -> None:
    first, second, student = models
    base = ["distill", "--teacher", first, "--teacher", second, "--data", data, "--out", "o"]
    for options, message in (
        (["--student", student, "--hidden-weight", 0.1], "set --hidden-weight to 0"),
        (["--student", student, "--cosine-weight", 0.1], "set --cosine-weight to 0"),
        (["--student", student, "--teacher-cache", "c"], "--teacher-cache holds the outputs of one teacher"),
        (["--plan"], "--student is required with several teachers"),
    ):
        outcome = cli(*base, *options)
        assert (outcome.code, message in outcome.err) == (2, True), outcome.err
