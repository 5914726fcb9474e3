"""Cuts to a target: scores and times beside plain computations, and the search from end to end."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.conftest import Outcome
from tinygpt2 import (
    TruncateStudentConfig,
    VerifyConfig,
    cut_to_target,
    truncate_student,
    verify,
)
from tinygpt2.compression.sizes import Shape, Space
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import ConfigError, InterruptedRunError
from tinygpt2.models.loading import load_model
from tinygpt2.workflows.cuts import search as module
from tinygpt2.workflows.cuts import timing, vocabularies
from tinygpt2.workflows.cuts.results import CutCandidate, best_of_each_depth
from tinygpt2.workflows.cuts.scoring import CutScore, Judge, accepted_share, expected_speedup
from tinygpt2.workflows.cuts.search import between
from tinygpt2.workflows.cuts.timing import predicted_milliseconds, token_milliseconds

TEACHER = Space(Shape(4, 32, 4, 128), 320, 32, tied=True)


def test_the_speedup_of_a_draft_is_what_a_simulation_gives() -> None:
    acceptance, cost, drafted = 0.8, 0.1, 5
    pick = random.Random(0)
    tokens = rounds = 0
    for _ in range(40_000):
        accepted = 0
        while accepted < drafted and pick.random() < acceptance:
            accepted += 1
        tokens, rounds = tokens + accepted + 1, rounds + 1
    at_five = tokens / (rounds * (drafted * cost + 1))
    assert expected_speedup(acceptance, cost) == pytest.approx(at_five, rel=0.02)
    assert expected_speedup(acceptance, cost) >= sum(acceptance**i for i in range(6)) / 1.5 - 1e-9
    assert expected_speedup(0.5, 2.0) == 1.0  # a draft that is slower than the teacher is not used
    assert expected_speedup(1.0, 0.0) == 17.0


def test_scores_are_losses_and_overlaps_of_plain_softmaxes(teacher: Path, trained: Path) -> None:
    one, other = (GPT2LMHeadModel.from_pretrained(str(path)).double().eval() for path in (trained, teacher))
    ids = [torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    with torch.no_grad():
        p, q = (torch.cat([model(x).logits for x in ids]).softmax(-1) for model in (one, other))
    overlap = torch.minimum(p, q).sum(-1).mean()
    losses = [-x[:, :-1].gather(-1, torch.cat(ids)[:, 1:, None]).log().mean() for x in (p, q)]
    fast = [load_model(str(path))[0] for path in (trained, teacher)]
    assert accepted_share(*fast, ids) == pytest.approx(float(overlap), rel=1e-5)
    assert Judge(fast[0], ids, "loss", 1.0).score(fast[1], 1.0) == CutScore(
        pytest.approx(float(losses[1] - losses[0]), rel=1e-5)
    )
    draft = Judge(fast[0], ids, "draft", 2.0).score(fast[1], 0.5)
    assert draft.acceptance == pytest.approx(float(overlap), rel=1e-5)
    assert draft.speedup == pytest.approx(expected_speedup(float(overlap), 0.25), rel=1e-5)
    assert draft.rank == -draft.speedup


def test_times_are_predicted_by_what_is_read() -> None:
    def truth(shape: Shape) -> float:
        inside = shape.n_layer * shape.n_embd * (4 * shape.n_embd + 2 * shape.n_inner)
        return 0.3 + 0.2 * shape.n_layer + 5e-6 * inside + 2e-6 * 320 * shape.n_embd

    predict = predicted_milliseconds(TEACHER, truth)
    for shape in (Shape(2, 16, 4, 40), Shape(3, 28, 4, 100), Shape(4, 32, 4, 128)):
        assert predict(shape) == pytest.approx(truth(shape), rel=1e-6)
    falling = predicted_milliseconds(TEACHER, lambda shape: 9.0 - shape.n_layer)  # noise must not look like a gain
    assert falling(Shape(4, 32, 4, 128)) >= falling(Shape(1, 32, 4, 128))


def test_a_token_takes_time(teacher: Path) -> None:
    assert 0 < token_milliseconds(load_model(str(teacher))[0]) < 1000


def test_rounds_shrink_every_size_by_the_same_factor() -> None:
    space = Space(Shape(6, 256, 8, 1024), 8192, 256, tied=True)
    for shape in (Shape(2, 128, 4, 300), Shape(1, 16, 8, 8), Shape(6, 64, 8, 1024)):
        shapes = between(space, shape, 3)
        assert shapes[-1] == shape
        for one, after in zip([space.teacher, *shapes], shapes, strict=False):
            assert one.n_layer >= after.n_layer
            assert one.n_embd >= after.n_embd
            assert one.n_head >= after.n_head
            assert one.n_inner >= after.n_inner
            assert after.n_embd % after.n_head == 0
    assert between(space, Shape(6, 64, 8, 256), 2)[0] == Shape(6, 128, 8, 512)


def test_finalists_have_several_depths() -> None:
    ranked = [
        CutCandidate(depth, 32, 4, inner, 320, 1, 1, 1.0, CutScore(float(number)))
        for number, (depth, inner) in enumerate([(4, 10), (4, 11), (4, 12), (4, 13), (3, 20), (2, 30)])
    ]
    assert [(one.n_layer, one.n_inner) for one in best_of_each_depth(ranked, 4)] == [(4, 10), (4, 11), (3, 20), (2, 30)]
    assert [one.n_inner for one in best_of_each_depth(ranked, 5)] == [10, 11, 20, 30, 12]
    assert len(best_of_each_depth(ranked, 9)) == 6


def test_a_target_is_met(trained: Path, data: Path, tmp_path: Path, cli: Callable[..., Outcome], small: None) -> None:
    out = tmp_path / "s"
    given = ("truncate-student", "--teacher", trained, "--data", data, "--out", out)
    outcome = cli(*given, "--target-params", "40k", "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    plain = GPT2LMHeadModel.from_pretrained(str(out))
    assert 0.98 * 40_000 <= plain.num_parameters() == result["parameters"] <= 40_000
    shape = plain.config
    assert (len(result["layers"]), result["n_embd"], result["n_head"]) == (shape.n_layer, shape.n_embd, shape.n_head)
    assert result["n_inner"] == (shape.n_inner or 4 * shape.n_embd)
    assert (result["steps"], result["tokens"]) == (3, 3 * 128)
    assert result["rounds" if "rounds" in result else "layers"] == result["layers"]
    found = result["candidates"]
    assert len(found) <= 6
    assert sum(one.get("trained") is not None for one in found) == 2
    best = min(one["trained"]["loss"] for one in found if one.get("trained"))
    assert result["score"]["loss"] == best == found[0]["trained"]["loss"]
    assert all(0.98 * 40_000 <= one["parameters"] <= 40_000 for one in found)
    assert verify(VerifyConfig(path=str(out))).ok
    assert (out / "front.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "report.html").read_text()
    assert "after distillation" in page
    assert str(tmp_path) not in page
    assert "distilled for 3 steps" in (out / "README.md").read_text()
    assert "above the teacher after the fit, " in outcome.err
    assert "step 1/3" not in outcome.err
    assert "shapes, then 2 of them distilled for 3 steps each: about" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]
    shown = cli(*given[:-1], tmp_path / "t", "--config", out / "config.yaml")
    assert shown.code == 0, shown.err
    assert "losses in nats per token above the teacher's" in shown.out


def test_a_target_is_met_with_fewer_tokens(trained: Path, data: Path, tmp_path: Path, small: None) -> None:
    out = tmp_path / "s"
    config = TruncateStudentConfig(
        teacher=str(trained), data=str(data), out=str(out), target_params=38_000, vocab_size=270
    )
    result = cut_to_target(config)
    plain = GPT2LMHeadModel.from_pretrained(str(out))
    assert plain.config.vocab_size == len(load_tokenizer(str(out))) == 270
    assert 0.98 * 38_000 <= plain.num_parameters() == result.parameters <= 38_000
    assert verify(VerifyConfig(path=str(out))).ok


def test_small_students_are_also_cut_in_rounds_and_the_better_one_stays(
    trained: Path, data: Path, tmp_path: Path, small: None
) -> None:
    config = TruncateStudentConfig(
        teacher=str(trained), data=str(data), out=str(tmp_path / "s"), target_mb=0.07, purpose="draft"
    )
    result = cut_to_target(config)
    assert 0.98 * 70_000 <= (tmp_path / "s" / "model.safetensors").stat().st_size <= 70_000
    assert 0.97 * 70_000 <= result.bytes <= 70_000
    assert result.rounds is not None
    assert result.rounds.rounds == len(result.rounds.shapes) == 2
    assert result.score in (result.rounds.one, result.rounds.several)
    assert result.score.speedup == max(result.rounds.one.speedup, result.rounds.several.speedup)
    assert result.steps == 6
    assert result.layers == sorted(set(result.layers))
    assert max(result.layers) < 4
    assert GPT2LMHeadModel.from_pretrained(str(tmp_path / "s")).config.n_layer == len(result.layers)
    assert verify(VerifyConfig(path=str(tmp_path / "s"))).ok


def test_a_time_is_met(trained: Path, data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that follow from the sizes, so that no other program can change them."""

    def milliseconds(model: GPT2LMHeadModel) -> float:
        shape = model.config
        return shape.n_layer * (0.3 + 1e-4 * shape.n_embd * (shape.n_inner or 4 * shape.n_embd) ** 0.9)

    for place in (module, timing, vocabularies):
        monkeypatch.setattr(place, "token_milliseconds", milliseconds)
    config = TruncateStudentConfig(teacher=str(trained), data=str(data), out=str(tmp_path / "s"), target_ms=1.0)
    result = cut_to_target(config)
    student = GPT2LMHeadModel.from_pretrained(str(tmp_path / "s"))
    assert milliseconds(student) == result.milliseconds <= 1.0
    assert result.milliseconds >= 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-params", "100"), "too small: the smallest student of this teacher has 1,534 parameters"),
        (("--target-mb", "1"), "is not smaller than the teacher, which has"),
        (("--target-params", "9000", "--num-layers", "2"), "cannot be combined with --num-layers"),
        (("--target-params", "9000", "--target-ms", "2"), "cannot be combined"),
        (("--num-layers", "2", "--for", "draft"), "--for needs --target-params"),
        (("--target-ms", "1e-9"), "too small: the smallest student"),
    ],
)
def test_targets_that_cannot_be_met(
    teacher: Path, data: Path, tmp_path: Path, cli: Callable[..., Outcome], small: None, options: tuple, message: str
) -> None:
    outcome = cli("truncate-student", "--teacher", teacher, "--data", data, "--out", tmp_path / "s", *options)
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert list(tmp_path.iterdir()) == []


def test_students_with_fewer_positions_than_the_blocks_are_refused(teacher: Path, data: Path, tmp_path: Path) -> None:
    config = TruncateStudentConfig(
        teacher=str(teacher), data=str(data), out=str(tmp_path / "s"), target_params=9000, n_positions=16
    )
    with pytest.raises(ConfigError, match="--n-positions 16: the search distils on blocks of 32 tokens"):
        cut_to_target(config)


def test_the_other_function_is_named(teacher: Path, data: Path, tmp_path: Path) -> None:
    base = {"teacher": str(teacher), "data": str(data), "out": str(tmp_path / "s")}
    with pytest.raises(ConfigError, match="asks for a search") as caught:
        truncate_student(TruncateStudentConfig(**base, target_params=9000))
    assert "cut_to_target" in caught.value.hint
    with pytest.raises(ConfigError, match="no target"):
        cut_to_target(TruncateStudentConfig(**base, num_layers=2))


@pytest.mark.parametrize("training", [True, False])
def test_ctrl_c_leaves_nothing(
    trained: Path, data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    def interrupt(*given: object, **more: object) -> None:
        if training:
            raise InterruptedRunError("stopped", "add --resume")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "distill" if training else "refit", interrupt)
    config = TruncateStudentConfig(teacher=str(trained), data=str(data), out=str(tmp_path / "s"), target_params=30000)
    with pytest.raises((InterruptedRunError, KeyboardInterrupt)) as caught:
        cut_to_target(config)
    assert training is ("nothing was written" in str(caught.value))
    assert list(tmp_path.iterdir()) == []


def test_results_are_json(trained: Path) -> None:
    from tinygpt2.cli.output.render import to_json

    one = CutCandidate(1, 4, 1, 2, 9, 3, 4, 5.0, CutScore(1.0))
    assert json.loads(json.dumps(to_json(replace(one, fitted=CutScore(0.5)))))["fitted"]["loss"] == 0.5
