"""--average-tail: the mean of checkpoints in float64, what is evaluated, a kill inside the tail, and what it does not fit."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.test_checkpoint import options
from tinygpt2 import PplConfig, ppl, pretrain
from tinygpt2.errors import ConfigError


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_model_is_the_mean_of_the_last_weights_and_survives_a_kill(
    teacher: Path, data: Path, tmp_path: Path, share: float
) -> None:
    base = {"max_steps": 8, "save_every": 1, "keep": 9, "eval_every": 2, "log_every": 1}
    run = options(teacher, data, tmp_path / "m", **base, average_tail=share)
    result = pretrain(run)
    plain = pretrain(options(teacher, data, tmp_path / "plain", **base))
    kept = [tmp_path / "m" / "checkpoints" / f"step-{step}" for step in range(1, 9)]
    tail = [load_file(path / "model.safetensors") for path in kept[-round(8 * share) :]]
    saved = load_file(tmp_path / "m" / "model.safetensors")
    for name, one in saved.items():
        mean = sum(weights[f"student.{name}"].double() for weights in tail) / len(tail)
        torch.testing.assert_close(one.double(), mean, rtol=1e-5, atol=1e-7)
    last = [load_file(tmp_path / out / "checkpoints" / "step-8" / "model.safetensors") for out in ("m", "plain")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])  # the training itself is the same
    measured = ppl(PplConfig(model=[str(tmp_path / "m")], task=[str(data)])).results[0]
    assert math.log(measured.perplexity) == pytest.approx(result.eval.loss, rel=1e-5) != plain.eval.loss
    for path in kept[6:]:
        shutil.rmtree(path)
    pretrain(run.model_copy(update={"resume": True}))
    again = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(saved[name], again[name]) for name in saved)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quantize": "q8_0", "quantize_from": 0.5}, "--average-tail and --quantize"),
        ({"early_stopping_patience": 1, "eval_every": 1}, "--early-stopping-patience and --average-tail"),
    ],
)
def test_what_an_average_does_not_fit(teacher: Path, data: Path, tmp_path: Path, more: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(teacher, data, tmp_path / "m", average_tail=0.5, **more)
