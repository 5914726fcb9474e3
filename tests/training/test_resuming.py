"""What --resume compares: the command, the mathematics, and the content of data and models, not their names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import make_model, sentences
from tinygpt2 import DistillConfig, FinetuneConfig, PretrainConfig, distill, finetune, pregenerate, pretrain
from tinygpt2.config.data import PregenerateConfig
from tinygpt2.errors import ConfigError
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.resuming import _begun_at, changed_mathematics
from tinygpt2.utils.locks import only_writer

FAST = {"max_steps": 4, "micro_batch_size": 4, "log_every": 1, "save_every": 2, "keep": 9}


def same_weights(one: Path, other: Path) -> bool:
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return all(torch.equal(left[name], right[name]) for name in {*left, *right})


def cut_back(out: Path, step: int) -> None:
    """Make a run look as if it had been killed after a step."""
    for path in (out / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (out / "model.safetensors").unlink()


@pytest.fixture
def inputs(teacher: Path, data: Path, tokenizer_dir: Path, tmp_path: Path) -> dict[str, str]:
    """A teacher, a student and a dataset of this test's own, each in its directory."""
    shutil.copytree(teacher, tmp_path / "teacher")
    shutil.copytree(data, tmp_path / "data")
    make_model(tmp_path / "student", tokenizer_dir, seed=1, n_layer=2)
    return {name: str(tmp_path / name) for name in ("teacher", "student", "data")}


def test_inputs_may_move(inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m"
    distill(DistillConfig(**inputs, out=str(out), **FAST))
    record = json.loads((out / "run.json").read_text())
    assert record.pop("result")["steps"] == 4
    assert (record["command"], set(record["content"])) == ("distill", set(inputs))
    shutil.copytree(out, tmp_path / "whole")
    cut_back(out, 2)
    for name, path in inputs.items():
        Path(path).rename(tmp_path / f"moved-{name}")
    monkeypatch.chdir(tmp_path)
    moved = {name: f"moved-{name}" for name in inputs}
    distill(DistillConfig(**moved, out="m", resume=True, **FAST))
    assert same_weights(out, tmp_path / "whole")
    again = json.loads((out / "run.json").read_text())
    assert again.pop("result")["steps"] == 4
    assert again == record
    assert yaml.safe_load((out / "config.yaml").read_text())["teacher"] == "moved-teacher"


@pytest.mark.parametrize("changed", ["teacher", "student", "data"])
def test_another_content_under_the_same_name_is_refused(
    inputs: dict[str, str], changed: str, corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = DistillConfig(**inputs, out=str(tmp_path / "m"), **FAST)
    distill(config)
    before = (tmp_path / "m" / "config.yaml").read_text()
    shutil.rmtree(inputs[changed])
    if changed == "data":
        other = PregenerateConfig(
            source=[str(corpus)], tokenizer=str(tokenizer_dir), out=inputs["data"], sequence_length=32, seed=9
        )
        pregenerate(other)
    else:
        make_model(Path(inputs[changed]), tokenizer_dir, seed=5, n_layer=4 if changed == "teacher" else 2)
    with pytest.raises(ConfigError, match=f"--resume: --{changed} differ"):
        distill(config.model_copy(update={"resume": True}))
    assert (tmp_path / "m" / "config.yaml").read_text() == before


def test_runs_of_older_versions_compare_names_and_take_defaults(inputs: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "m"
    config = DistillConfig(**inputs, out=str(out), **FAST)
    distill(config)
    (out / "run.json").unlink()
    options = yaml.safe_load((out / "config.yaml").read_text())
    del options["weight_decay"], options["freeze"]
    (out / "config.yaml").write_text(yaml.safe_dump({**options, "an_option_that_is_gone": 3}))
    distill(config.model_copy(update={"resume": True}))
    assert (out / "run.json").is_file()
    (out / "run.json").unlink()
    Path(inputs["teacher"]).rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="--teacher differ"):
        distill(config.model_copy(update={"resume": True, "teacher": str(tmp_path / "moved")}))
    with pytest.raises(ConfigError, match="written by a different command, distill"):
        pretrain(PretrainConfig(model=inputs["student"], data=inputs["data"], out=str(out), resume=True, **FAST))


def test_an_option_that_is_missing_had_its_default_or_its_recipes() -> None:
    config = DistillConfig(student="s", teacher="t", data="d", out="o", recipe="tinygpt2")
    earlier = config.model_dump(mode="json", by_alias=True)
    del earlier["weight_decay"], earlier["attention_weight"]
    assert changed_mathematics(config, earlier, None) == []
    other = config.model_copy(update={"weight_decay": 0.5, "attention_weight": 0.25})
    assert sorted(changed_mathematics(other, earlier, None)) == ["--attention-weight", "--weight-decay"]


@pytest.mark.parametrize(
    ("schedule", "done", "goes_on"),
    [
        ("constant", 8, True),
        ("wsd", 6, True),
        ("wsd", 8, False),
        ("cosine", 4, False),
        ("linear", 8, False),
        ("plateau", 2, False),
    ],
)
def test_a_run_can_be_made_longer_until_its_rate_decays(
    teacher: Path, data: Path, tmp_path: Path, schedule: str, done: int, goes_on: bool
) -> None:
    base = {**FAST, "model": str(teacher), "data": str(data), "lr_schedule": schedule, "warmup_ratio": 0}
    out, longer = tmp_path / "m", {"max_steps": 16}
    pretrain(PretrainConfig(**{**base, "max_steps": 8}, out=str(out)))
    cut_back(out, done)
    config = PretrainConfig(**{**base, **longer}, out=str(out), resume=True)
    if goes_on:
        pretrain(config)
        pretrain(PretrainConfig(**{**base, **longer}, out=str(tmp_path / "whole")))
        assert same_weights(out, tmp_path / "whole")
        assert yaml.safe_load((out / "config.yaml").read_text())["max_steps"] == 16
        return
    with pytest.raises(ConfigError, match=r"--resume: the run has 8 steps, .* does not fit a run of 16 steps"):
        pretrain(config)
    assert yaml.safe_load((out / "config.yaml").read_text())["max_steps"] == 8
    pretrain(config.model_copy(update={"max_steps": 8}))


@pytest.mark.parametrize(
    ("option", "more"),
    [("--average-tail", {"average_tail": 0.5}), ("--quantize-from", {"quantize": "q8_0", "quantize_from": 0.5})],
)
def test_a_run_whose_end_has_begun_keeps_its_length(
    teacher: Path, data: Path, tmp_path: Path, option: str, more: dict
) -> None:
    base = {**FAST, "model": str(teacher), "data": str(data), "lr_schedule": "constant", "warmup_ratio": 0, **more}
    pretrain(PretrainConfig(**{**base, "max_steps": 8}, out=str(tmp_path / "m")))
    config = PretrainConfig(**{**base, "max_steps": 16}, out=str(tmp_path / "m"), resume=True)
    with pytest.raises(ConfigError, match=f"{option} has begun, so a run of 8 steps cannot become one of 16"):
        pretrain(config)
    cut_back(tmp_path / "m", 2)
    pretrain(config)
    pretrain(PretrainConfig(**{**base, "max_steps": 16}, out=str(tmp_path / "whole")))
    assert same_weights(tmp_path / "m", tmp_path / "whole")


def test_a_replay_that_depends_on_the_length_keeps_it() -> None:
    common = {"teacher": "t", "student": "s", "data": "d", "out": "o", "on_policy_fraction": 0.5, "replay": 4}
    for schedule, found in (("falling", "--replay-schedule"), ("rising", "--replay-schedule"), ("constant", None)):
        assert _begun_at(DistillConfig(**common, replay_schedule=schedule), 0.1) == found


def test_a_longer_run_keeps_its_warm_up_and_cannot_get_shorter_than_it_is(
    teacher: Path, data: Path, tmp_path: Path
) -> None:
    base = {**FAST, "model": str(teacher), "data": str(data), "out": str(tmp_path / "m"), "learning_rate": 1e-3}
    base |= {"lr_schedule": "constant", "warmup_ratio": 0.5}
    pretrain(PretrainConfig(**base))
    result = pretrain(PretrainConfig(**{**base, "max_steps": None, "max_tokens": 8 * 4 * 32}, resume=True))
    assert result.steps == 8
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "m")]
    assert rates == [5e-4, *[1e-3] * 7]
    with pytest.raises(ConfigError, match="does not fit a run of 6 steps"):
        pretrain(PretrainConfig(**{**base, "max_steps": 6}, resume=True))


def test_a_run_goes_on_with_the_defaults_of_the_version_that_began_it(
    teacher: Path, data: Path, tmp_path: Path
) -> None:
    base = {**FAST, "model": str(teacher), "data": str(data), "out": str(tmp_path / "m")}
    pretrain(PretrainConfig(**base, optimizer="adamw", learning_rate=5e-4, lr_schedule="cosine"))
    whole = load_file(tmp_path / "m" / "model.safetensors")
    cut_back(tmp_path / "m", 2)
    pretrain(PretrainConfig(**base, resume=True))
    again = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(ConfigError, match="--optimizer differ"):
        pretrain(PretrainConfig(**base, optimizer="muon", resume=True))


def test_a_text_may_move_too(teacher: Path, tmp_path: Path) -> None:
    text, held = tmp_path / "mine.txt", tmp_path / "held.txt"
    text.write_text(sentences(120, seed=7), encoding="utf-8")
    held.write_text(sentences(40, seed=8), encoding="utf-8")
    out = tmp_path / "m"
    base = {**FAST, "model": str(teacher), "out": str(out), "resume": True}
    first = finetune(FinetuneConfig(**base, data=str(text), eval_data=str(held)))
    text.rename(tmp_path / "moved.txt")
    held.rename(tmp_path / "elsewhere.txt")
    moved = FinetuneConfig(**base, data=str(tmp_path / "moved.txt"), eval_data=str(tmp_path / "elsewhere.txt"))
    again = finetune(moved)
    assert (again.loss, again.eval) == (first.loss, first.eval)
    held.write_text(sentences(40, seed=9), encoding="utf-8")
    with pytest.raises(ConfigError, match="the text of --eval-data differs"):
        finetune(moved.model_copy(update={"eval_data": str(held)}))
    Path(moved.data).write_text(sentences(120, seed=9), encoding="utf-8")
    with pytest.raises(ConfigError, match="the text of --data differs"):
        finetune(moved)


@pytest.mark.parametrize("resume", [False, True])
def test_one_run_for_one_out(teacher: Path, data: Path, tmp_path: Path, resume: bool) -> None:
    config = PretrainConfig(model=str(teacher), data=str(data), out=str(tmp_path / "m"), resume=resume, **FAST)
    with (
        only_writer(tmp_path / "m"),
        pytest.raises(ConfigError, match=r"another run writes to .*m: process \d+ on .*, since \d{4}-"),
    ):
        pretrain(config)
    assert not (tmp_path / "m").exists()
    assert pretrain(config).steps == 4
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
