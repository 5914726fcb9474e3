"""Sampled text that several steps use: which steps share it, that a run resumes bit for bit, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import make_model, stopped_after
from tests.training.test_own_text import config, source, weights
from tinygpt2 import distill
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.models.loading import load_model
from tinygpt2.training.metrics import read_metrics

MINILLM = {
    "sampler": "mixture", "on_policy_loss": "policy_gradient", "prediction_weight": 0, "ce_weight": 1,
    "on_policy_weight": 1, "steps_per_sample": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def student(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("student") / "m", tokenizer_dir, seed=8, n_layer=2, n_embd=24)


def test_steps_share_texts_and_know_with_which_probability_they_were_drawn(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    packed = load_packed_dataset(str(data))
    own = source(config(teacher, student, data, tmp_path, **MINILLM), packed)
    found = []
    for step in range(4):
        indices = list(range(4 * step, 4 * step + 4))
        batch, _ = own.into(packed.train.batch(indices), indices, step)
        data_rows = [place for place, own_text in enumerate(batch.own_text) if not own_text]
        assert len(data_rows) == 2
        for place in data_rows:  # the data goes on
            assert batch.input_ids[place].tolist() == packed.train.row(indices[place]).tolist()
        found.append(batch)
    for again in found[1:3]:
        assert (again.own_text == found[0].own_text).all()
        assert torch.equal(again.input_ids[again.own_text], found[0].input_ids[again.own_text])
        assert (again.drawn == found[0].drawn).all()
    assert not torch.equal(found[3].input_ids[found[3].own_text], found[0].input_ids[found[0].own_text])
    with torch.no_grad():
        other, mine = (load_model(str(name))[0](found[0].input_ids).logits.softmax(-1) for name in (teacher, student))
    mixed = (0.2 * other + 0.8 * mine).log()[:, :-1].gather(2, found[0].input_ids[:, 1:, None])[..., 0]
    counted = torch.from_numpy(found[0].counted[:, 1:] & found[0].own_text[:, None])
    torch.testing.assert_close(torch.from_numpy(found[0].drawn[:, 1:])[counted], mixed[counted], rtol=1e-4, atol=1e-4)
    own.forget()
    assert own._replay.held(4) == {}


@pytest.mark.parametrize("replay", [0, 4])
def test_a_run_stopped_between_steps_on_the_same_texts_resumes_bit_for_bit(
    teacher: Path, student: Path, data: Path, tmp_path: Path, replay: int
) -> None:
    options = {**MINILLM, "replay": replay, "max_steps": 8, "save_every": 4}
    distill(config(teacher, student, data, tmp_path / "whole", **options))
    with stopped_after(4):
        distill(config(teacher, student, data, tmp_path / "parts", **options))
    distill(config(teacher, student, data, tmp_path / "parts", resume=True, **options))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_two_processes_share_the_same_texts_between_steps(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    """Only one of the two samples: its blocks are the odd ones."""
    options = {**MINILLM, "max_steps": 4}
    distill(config(teacher, student, data, tmp_path / "one", micro_batch_size=2, **options))
    distill(config(teacher, student, data, tmp_path / "two", micro_batch_size=1, num_processes=2, **options))
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)


def test_old_text_of_a_mixture_needs_clipped_ratios(
    cli: Callable, teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    base = ["distill", "--teacher", teacher, "--student", student, "--data", data, "--out", tmp_path / "o"]
    for message, more in [
        ("needs --on-policy-loss policy_gradient", ["--sampler", "mixture", "--replay", 4]),
        ("needs --on-policy-loss policy_gradient", ["--sampler", "mixture", "--steps-per-sample", 2]),
        ("--clip-ratio 0.1 has no effect", ["--clip-ratio", 0.1]),
    ]:
        result = cli(*base, "--on-policy-fraction", 0.5, *more)
        assert (result.code, message in result.err) == (2, True), result.err
