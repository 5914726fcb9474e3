"""Held-out blocks: which of them, the standard error, the figures before training, and their place in the card."""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.conftest import make_model
from tinygpt2 import (
    DistillConfig,
    FinetuneConfig,
    PretrainConfig,
    TruncateStudentConfig,
    distill,
    finetune,
    pretrain,
    truncate_student,
)
from tinygpt2.config.training import TrainOptions
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.evaluation.scoring import perplexity_of
from tinygpt2.models.loading import load_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.planning.dry_run import plan_run
from tinygpt2.training import loop, preparation
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.step import Evaluation, Step, evaluate, joined


def block_losses(model: Path, data: Path, numbers: list[int]) -> list[float]:
    """The mean loss of each block, by plain transformers."""
    plain = GPT2LMHeadModel.from_pretrained(str(model)).eval()
    blocks = load_packed_dataset(str(data)).test
    with torch.no_grad():
        rows = [blocks.batch([number]).input_ids for number in numbers]
        return [plain(row, labels=row).loss.item() for row in rows]


@pytest.mark.parametrize("count", [1, 7, None])
def test_a_loss_and_its_standard_error_over_blocks(teacher: Path, data: Path, count: int | None) -> None:
    blocks = load_packed_dataset(str(data)).test
    used = blocks if count is None else blocks.spaced(count)
    numbers = [index * len(blocks) // len(used) for index in range(len(used))]
    step = Step(load_model(str(teacher))[0], None, LossWeights(), TrainOptions(out="o"))
    found = evaluate(Accelerator(cpu=True), step.train(), used, 4)
    losses = block_losses(teacher, data, numbers)
    assert step.training
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.perplexity == perplexity_of(found.loss)
    if count == 1:
        assert found.stderr is None
    else:
        assert found.stderr == pytest.approx(np.std(losses, ddof=1) / np.sqrt(len(losses)), rel=1e-4)


def test_blocks_are_evenly_spaced_and_stay_so(data: Path) -> None:
    blocks = load_packed_dataset(str(data)).test
    some = blocks.spaced(5)
    assert (len(some), some.stored) == (5, len(blocks))
    for index in range(5):
        assert np.array_equal(some.row(index), blocks.row(index * len(blocks) // 5))
    assert np.array_equal(some.spaced(2).row(1), some.row(2))
    assert blocks.spaced(len(blocks)) is blocks


@pytest.mark.parametrize(
    ("asked", "blocks", "length", "expected"),
    [(None, 1771, 1024, 256), (None, 100, 1024, 100), (None, 9, 10**6, 1), (40, 100, 32, 40), (400, 100, 32, 100),
     ("all", 10**6, 1024, 10**6)],
)  # fmt: skip
def test_how_many_blocks(asked: object, blocks: int, length: int, expected: int) -> None:
    assert TrainOptions(out="o", eval_blocks=asked).evaluated_blocks(blocks, length) == expected


def test_a_part_of_the_blocks_is_said_and_written(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(preparation, "say", said.append)
    config = PretrainConfig(
        model=str(teacher), data=str(data), out=str(tmp_path / "m"), max_steps=4, eval_every=2, eval_blocks=3
    )
    result = pretrain(config)
    whole = len(load_packed_dataset(str(data)).test)
    assert said == [f"evaluating on 3 of {whole} held-out blocks; --eval-blocks all uses all"]
    rows = read_metrics(tmp_path / "m")
    assert [row["step"] for row in rows if "eval/stderr" in row] == [2, 4]
    assert rows[0]["before/stderr"] > 0
    assert rows[-1]["eval/stderr"] == result.eval.stderr > 0
    assert f"3 of {whole} blocks" in (tmp_path / "m" / "README.md").read_text()
    said.clear()
    assert plan_run(config.model_copy(update={"eval_blocks": None, "out": str(tmp_path / "n")})).eval_sequences == whole
    assert said == []


def test_several_datasets_share_the_blocks(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data, tmp_path / "other")
    counts: list[int] = []

    def counted(accelerator: object, module: object, blocks: object, size: int) -> Evaluation:
        counts.append(len(blocks))
        return evaluate(accelerator, module, blocks, size)

    monkeypatch.setattr(loop, "evaluate", counted)
    result = pretrain(
        PretrainConfig(
            model=str(teacher), data=[str(data), str(tmp_path / "other")], out=str(tmp_path / "m"), max_steps=1, eval_blocks=8
        )
    )  # fmt: skip
    assert counts == [4, 4]
    one, other = (result.eval_by_data or {}).values()
    assert one == other
    assert result.eval.loss == pytest.approx(one.loss)
    assert result.eval.stderr == pytest.approx(one.stderr / np.sqrt(2))


def test_the_speed_of_a_run_is_that_of_its_steps(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*place: Any) -> Evaluation:
        time.sleep(0.2)
        return evaluate(*place)

    monkeypatch.setattr(loop, "evaluate", slow)
    result = pretrain(
        PretrainConfig(
            model=str(teacher), data=str(data), out=str(tmp_path / "m"), max_steps=2, eval_every=1, eval_blocks=2
        )
    )
    assert result.tokens / result.tokens_per_second < result.seconds - 2 * 0.2


def test_one_block_of_a_dataset_gives_no_error_of_the_whole(data: Path) -> None:
    blocks = load_packed_dataset(str(data)).test
    parts = {"a": blocks.spaced(1), "b": blocks.spaced(3)}
    whole = joined({"a": Evaluation(1.0, 2.7, None), "b": Evaluation(3.0, 20.1, 0.5)}, parts)
    assert (whole.loss, whole.stderr) == (pytest.approx(2.5), None)


@pytest.mark.parametrize("teacher_dtype", ["fp32", "bf16"])
def test_cut_and_teacher_are_measured_once_and_change_nothing(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_dtype: str
) -> None:
    truncate_student(TruncateStudentConfig(teacher=str(teacher), num_layers=2, out=str(tmp_path / "cut")))
    base = {
        "teacher": str(teacher),
        "student": str(tmp_path / "cut"),
        "data": str(data),
        "max_steps": 4,
        "dropout": 0.2,
    }
    base |= {"micro_batch_size": 4, "log_every": 1, "teacher_dtype": teacher_dtype, "temperature": 1.0}
    out = tmp_path / "m"
    distill(DistillConfig(**base, out=str(out)))
    every = list(range(len(load_packed_dataset(str(data)).test)))
    first = read_metrics(out)[0]
    assert (first["step"], "loss" in first) == (1, True)
    assert first["before/loss"] == pytest.approx(np.mean(block_losses(tmp_path / "cut", data, every)), rel=1e-5)
    near = 1e-5 if teacher_dtype == "fp32" else 2e-2
    assert first["teacher/loss"] == pytest.approx(np.mean(block_losses(teacher, data, every)), rel=near)
    monkeypatch.setattr(loop, "figures_before_training", lambda *_: {})
    distill(DistillConfig(**base, out=str(tmp_path / "n")))
    with_them, without = (load_file(path / "model.safetensors") for path in (out, tmp_path / "n"))
    assert all(torch.equal(with_them[name], without[name]) for name in with_them)
    card = (out / "README.md").read_text()
    for row in ("| teacher | ", "| before training | ", "| this model | "):
        assert card.count(row) == 1
    assert "last training loss (KL to the teacher)" in card
    shutil.rmtree(out / "model.safetensors", ignore_errors=True)
    distill(DistillConfig(**base, out=str(out), resume=True))
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3, 4]
    assert (out / "README.md").read_text().count("| teacher | ") == 1


def test_random_weights_are_not_measured(data: Path, tmp_path: Path) -> None:
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump({"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}))
    pretrain(PretrainConfig(model_config=str(shape), data=str(data), out=str(tmp_path / "m"), max_steps=1))
    assert not {"before/loss", "teacher/loss"} & set(read_metrics(tmp_path / "m")[0])


def test_the_rate_and_length_of_a_rule_are_written_and_run_again(teacher: Path, data: Path, tmp_path: Path) -> None:
    base = {"teacher": str(teacher), "student": str(teacher), "data": str(data), "micro_batch_size": 32}
    base |= {"gradient_accumulation_steps": 4}
    first = distill(DistillConfig(**base, out=str(tmp_path / "a")))
    written = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert (written["learning_rate"], written["num_epochs"]) == (4e-3, 4.0)
    again = distill(DistillConfig(**{**written, "out": str(tmp_path / "b")}))
    assert (again.loss, again.steps) == (first.loss, first.steps)
    # runs of version 0.1 wrote null, and --resume takes the same command again
    resumed = distill(DistillConfig(**base, out=str(tmp_path / "a"), resume=True))
    assert resumed.loss == first.loss
    old = {**written, "learning_rate": None, "num_epochs": None}
    (tmp_path / "a" / "config.yaml").write_text(yaml.safe_dump(old))
    assert distill(DistillConfig(**base, out=str(tmp_path / "a"), resume=True)).loss == first.loss
    with pytest.raises(preparation.ConfigError, match="--learning-rate differ"):
        distill(DistillConfig(**base, learning_rate=1e-4, out=str(tmp_path / "a"), resume=True))


def test_weights_have_the_mode_of_other_files_and_tokenizers_the_models_limit(
    teacher: Path, tokenizer_dir: Path, data: Path, tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        make_model(tmp_path / "plain", tokenizer_dir)
        pretrain(PretrainConfig(model=str(teacher), data=str(data), out=str(tmp_path / "m"), max_steps=1))
    finally:
        os.umask(before)
    for folder in (tmp_path / "plain", tmp_path / "m", tmp_path / "m" / "checkpoints" / "step-1"):
        modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir() if file.is_file()}
        assert modes == {0o640}, folder
        assert AutoTokenizer.from_pretrained(str(folder)).model_max_length == 32


def test_a_large_share_of_evaluation_is_said(teacher: Path, data: Path, tmp_path: Path, cli: Callable) -> None:
    base = ["pretrain", "--model", teacher, "--data", data, "--max-steps", 2, "--eval-every", 1, "--out"]
    outcome = cli(*base, tmp_path / "m")
    assert re.search(r"evaluation took \d+% of \d+ seconds; --eval-blocks N or a larger --eval-every", outcome.err)
    assert "evaluation took" not in outcome.out


def test_held_out_texts_end_as_the_data_do(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text("the cat sat\n" * 40)
    how = {"model": str(teacher), "data": str(corpus / "00.txt"), "eval_data": str(held), "max_steps": 1}
    finetune(FinetuneConfig(**how, document="line", append_eos=False, out=str(tmp_path / "m")))
    made = load_packed_dataset(str(tmp_path / "m" / "eval-data"))
    assert made.manifest["append_eos"] is False
    assert made.tokenizer().eos_token_id not in made.train.batch(range(len(made.train))).input_ids


def test_options_of_texts_are_refused_for_a_dataset(teacher: Path, data: Path, tmp_path: Path) -> None:
    how = {"model": str(teacher), "data": str(data), "out": str(tmp_path / "m"), "max_steps": 1}
    for option, message in (
        ({"sequence_length": 16}, "have 32 tokens"),
        ({"shuffle": False}, "--no-shuffle has no effect"),
    ):
        with pytest.raises(preparation.ConfigError, match=message):
            finetune(FinetuneConfig(**how, **option))
    finetune(FinetuneConfig(**how, sequence_length=32))
