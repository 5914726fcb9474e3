"""The loop: what it optimises, what it writes, how it stops, resumes and refuses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.conftest import make_model, sentences
from tinygpt2 import (
    DistillConfig,
    FinetuneConfig,
    PplConfig,
    PretrainConfig,
    TruncateStudentConfig,
    distill,
    finetune,
    ppl,
    pretrain,
    truncate_student,
)
from tinygpt2.config.training import TrainOptions
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.errors import ConfigError, DataError, DivergedError, ModelError
from tinygpt2.models.loading import load_model
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.optimizers import make_optimizer
from tinygpt2.training.schedule import learning_rate, passes_over_data, peak_learning_rate, total_steps

FAST = {"max_steps": 6, "micro_batch_size": 4, "learning_rate": 3e-3, "log_every": 1}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    file = tmp_path / "shape.yaml"
    file.write_text(yaml.safe_dump({"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32}))
    return str(file)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_pretraining_learns_and_writes_what_it_promises(data: Path, shape: str, tmp_path: Path) -> None:
    out = tmp_path / "m"
    result = pretrain(
        PretrainConfig(
            model_config=shape,
            data=str(data),
            out=str(out),
            max_steps=40,
            eval_every=20,
            learning_rate=5e-3,
            log_every=10,
        )
    )
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [1, 10, 20, 30, 40]
    assert rows[0]["loss"] == pytest.approx(math.log(320), rel=0.05)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.5
    assert rows[-1]["loss"] == rows[-1]["loss/ce"] == result.loss
    assert [row["step"] for row in rows if "eval/loss" in row] == [20, 40]
    assert result.eval.loss == rows[-1]["eval/loss"]
    assert result.eval.perplexity == pytest.approx(math.exp(result.eval.loss))
    assert (result.steps, result.tokens, rows[-1]["tokens"]) == (40, 40 * 8 * 32, 40 * 8 * 32)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "README.md", "config.yaml", "run.json", "metrics.jsonl", "curves.png", "report.html", "checkpoints", "SHA256SUMS",
    }  # fmt: skip
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"{result.eval.perplexity:.2f}" in (out / "README.md").read_text()
    plain = GPT2LMHeadModel.from_pretrained(str(out)).eval()
    assert plain.config.eos_token_id == plain.generation_config.eos_token_id == 0
    assert plain.config.resid_pdrop == 0.1
    assert len(AutoTokenizer.from_pretrained(str(out))) == 320
    block = load_packed_dataset(str(data)).test.batch([0]).input_ids
    assert plain(block, labels=block).loss.item() < 4.5


def test_config_yaml_runs_it_again(data: Path, shape: str, tmp_path: Path) -> None:
    pretrain(PretrainConfig(model_config=shape, data=str(data), out=str(tmp_path / "a"), dropout=0.1, **FAST))
    again = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    pretrain(PretrainConfig(**{**again, "out": str(tmp_path / "b")}))
    assert same(tmp_path / "a", tmp_path / "b")


def test_one_step_of_pretraining_is_adamw_on_the_mean_loss(data: Path, teacher: Path, tmp_path: Path) -> None:
    config = PretrainConfig(
        model=str(teacher),
        data=str(data),
        out=str(tmp_path / "m"),
        max_steps=1,
        micro_batch_size=4,
        warmup_ratio=0,
        weight_decay=0.1,
        optimizer="adamw",
        learning_rate=5e-4,
    )
    result = pretrain(config)
    plain = GPT2LMHeadModel.from_pretrained(str(teacher)).eval()
    blocks = load_packed_dataset(str(data)).train
    batch = blocks.batch(Shuffle(len(blocks), 42)[0:4]).input_ids
    loss = plain(batch, labels=batch).loss
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer = make_optimizer(plain, config)
    optimizer.step()
    trained = weights(tmp_path / "m")
    for name, parameter in plain.named_parameters():
        if name.endswith("c_attn.bias"):
            continue  # the keys' bias has no true gradient, and Adam makes full steps of its rounding
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-4, atol=2e-5, msg=name)


def test_accumulation_equals_a_larger_batch(data: Path, teacher: Path, tmp_path: Path) -> None:
    for name, micro, turns in (("a", 8, 1), ("b", 2, 4)):
        pretrain(
            PretrainConfig(
                model=str(teacher), data=str(data), out=str(tmp_path / name), max_steps=3,
                micro_batch_size=micro, gradient_accumulation_steps=turns, log_every=1, optimizer="adamw",
            )
        )  # fmt: skip
    one, four = read_metrics(tmp_path / "a"), read_metrics(tmp_path / "b")
    for left, right in zip(one, four, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distillation_moves_the_student_to_the_teacher(
    data: Path, teacher: Path, tmp_path: Path, precision: str
) -> None:
    truncate_student(TruncateStudentConfig(teacher=str(teacher), num_layers=2, out=str(tmp_path / "cut")))
    result = distill(
        DistillConfig(
            teacher=str(teacher), student=str(tmp_path / "cut"), data=str(data), out=str(tmp_path / "s"),
            max_steps=30, learning_rate=5e-3, log_every=1, precision=precision,
        )
    )  # fmt: skip
    rows = read_metrics(tmp_path / "s")
    assert "loss/prediction" in rows[0]
    assert "loss/ce" not in rows[0]
    assert rows[-1]["loss/prediction"] < 0.7 * rows[0]["loss/prediction"]
    assert set(weights(tmp_path / "s")) == set(weights(tmp_path / "cut"))
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "s").values())
    assert result.parameters == sum(
        p.numel() for p in GPT2LMHeadModel.from_pretrained(str(tmp_path / "s")).parameters()
    )


@pytest.mark.parametrize("recipe", ["tinygpt2", "distilgpt2", "truncation", "default"])
def test_every_recipe_trains(data: Path, teacher: Path, shape: str, tmp_path: Path, recipe: str) -> None:
    distill(
        DistillConfig(
            teacher=str(teacher), student=shape, data=str(data), out=str(tmp_path / "s"), recipe=recipe, **FAST
        )
    )
    rows = read_metrics(tmp_path / "s")
    expected = {
        "tinygpt2": {"attention", "hidden", "prediction"}, "distilgpt2": {"prediction", "ce", "cosine"},
        "truncation": {"ce"}, "default": {"prediction"},
    }[recipe]  # fmt: skip
    assert {key.removeprefix("loss/") for key in rows[0] if key.startswith("loss/")} == expected
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_narrower_student_learns_through_a_map_that_is_not_saved(data: Path, teacher: Path, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow.yaml"
    narrow.write_text(yaml.safe_dump({"n_layer": 2, "n_embd": 16, "n_head": 4, "n_positions": 32}))
    out = tmp_path / "s"
    distill(
        DistillConfig(
            teacher=str(teacher), student=str(narrow), data=str(data), out=str(out), recipe="tinygpt2", **FAST
        )
    )
    assert not [name for name in weights(out) if "projection" in name]
    assert [
        p for p in (out / "checkpoints").rglob("*.safetensors") if any("projection" in name for name in load_file(p))
    ]


def test_without_a_teacher_objective_the_teacher_is_never_loaded(data: Path, shape: str, tmp_path: Path) -> None:
    distill(
        DistillConfig(
            teacher="/nowhere/at/all",
            student=shape,
            data=str(data),
            out=str(tmp_path / "s"),
            recipe="truncation",
            **FAST,
        )
    )


def test_finetuning_a_text_packs_it_with_the_models_tokenizer(teacher: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(sentences(100, seed=7), encoding="utf-8")
    result = finetune(FinetuneConfig(model=str(teacher), data=str(text), out=str(tmp_path / "f"), **FAST))
    assert result.eval is not None
    packed = load_packed_dataset(str(tmp_path / "f" / "data"))
    assert packed.sequence_length == 32
    losses = [row["loss"] for row in read_metrics(tmp_path / "f")]
    assert losses[-1] < losses[0]


def test_a_trained_model_is_measured_on_tasks(teacher: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "lambada_test.txt").write_text("the cat sat on the mat\nthe dog ran\n", encoding="utf-8")
    questions = '{"context": "the cat", "choices": [" sat", " ran on"], "answer": 0}\n' * 3
    (tmp_path / "q.jsonl").write_text(questions, encoding="utf-8")
    asked = {"eval_task": ["lambada", str(data), f"choice:{tmp_path / 'q.jsonl'}"], "task_data": str(tmp_path)}
    base = {"model": str(teacher), "data": str(data), **FAST}
    result = finetune(FinetuneConfig(**base, **asked, out=str(tmp_path / "f")))
    rows = ppl(PplConfig(model=[str(tmp_path / "f")], task=asked["eval_task"], task_data=str(tmp_path))).results
    assert result.tasks == {"lambada": rows[0].perplexity, data.name: rows[1].perplexity, "q.jsonl": rows[2].perplexity}
    right = {"lambada": rows[0].accuracy, "q.jsonl": rows[2].accuracy, "q.jsonl, normalised": rows[2].accuracy_norm}
    assert result.accuracies == right
    assert f"| accuracy on q.jsonl | {rows[2].accuracy:.2%} |" in (tmp_path / "f/README.md").read_text()
    assert rows[1].loss == pytest.approx(result.eval.loss, rel=1e-6)
    assert f"| perplexity on lambada (per token) | {rows[0].perplexity:.2f} |" in (tmp_path / "f/README.md").read_text()
    with pytest.raises(ConfigError, match="unknown task"):  # before a step is taken
        finetune(FinetuneConfig(**base, eval_task=["nonsense"], out=str(tmp_path / "g")))
    assert not (tmp_path / "g").exists()
    with pytest.raises(ConfigError, match="--task-data has no effect without --eval-task"):
        FinetuneConfig(**base, task_data=str(tmp_path), out=str(tmp_path / "g"))


def test_a_resumed_run_reads_the_same_data(data: Path, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    base = {"model": str(teacher), "out": str(tmp_path / "m"), "resume": True}
    finetune(FinetuneConfig(**base, data=str(corpus / "00.txt"), **FAST))
    finetune(FinetuneConfig(**base, data=str(corpus / "00.txt"), **FAST))
    with pytest.raises(ConfigError, match="--data"):
        finetune(FinetuneConfig(**base, data=str(corpus / "01.txt"), **FAST))


def test_frozen_parameters_stay(data: Path, teacher: Path, tmp_path: Path) -> None:
    pretrain(
        PretrainConfig(
            model=str(teacher), data=str(data), out=str(tmp_path / "m"), freeze=["transformer.h.0.*"], **FAST
        )
    )
    before, after = weights(teacher), weights(tmp_path / "m")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("transformer.h.0.") for name in moved)
    assert any(name.startswith("transformer.h.1.") for name in moved)


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "adamw"), ("bf16", "muon")])
def test_a_resumed_run_is_the_uninterrupted_run(
    data: Path, teacher: Path, shape: str, tmp_path: Path, precision: str, optimizer: str
) -> None:
    base = {
        "teacher": str(teacher), "student": shape, "data": str(data), "recipe": "tinygpt2", "dropout": 0.1, "max_steps": 9,
        "micro_batch_size": 4, "log_every": 2, "eval_every": 3, "save_every": 4, "keep": 2, "precision": precision,
        "optimizer": optimizer,
    }  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    distill(DistillConfig(**base, out=str(whole)))
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step-8", "step-9"]
    distill(DistillConfig(**base, out=str(parts)))
    import shutil

    shutil.rmtree(parts / "checkpoints" / "step-9")
    (parts / "checkpoints" / "step-12").mkdir()  # incomplete: never trusted
    with (parts / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 10, "tok')
    (parts / "model.safetensors").unlink()
    distill(DistillConfig(**base, out=str(parts), resume=True))
    assert same(whole, parts)
    timeless = [
        [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in read_metrics(out)]
        for out in (whole, parts)
    ]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in timeless[0]] == [1, 2, 3, 4, 6, 8, 9]


def test_resume_starts_from_nothing_and_refuses_other_mathematics(data: Path, shape: str, tmp_path: Path) -> None:
    base = {"model_config": shape, "data": str(data), "out": str(tmp_path / "m"), "resume": True}
    first = pretrain(PretrainConfig(**base, **FAST))
    again = pretrain(PretrainConfig(**base, **FAST))
    assert (again.loss, again.steps, again.eval) == (first.loss, first.steps, first.eval)
    with pytest.raises(ConfigError, match="--learning-rate"):
        pretrain(PretrainConfig(**base, **{**FAST, "learning_rate": 1e-4}))
    pretrain(PretrainConfig(**base, **{**FAST, "log_every": 3}))


def test_an_output_directory_that_is_not_empty_is_refused(data: Path, shape: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious.txt").write_text("x")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="not empty"):
            pretrain(PretrainConfig(model_config=shape, data=str(data), out=str(tmp_path / "m"), resume=resume, **FAST))
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["precious.txt"]


def test_divergence_stops_the_run_and_keeps_the_checkpoint(data: Path, shape: str, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"gradient of step \d+ is NaN or infinite: loss"):
        pretrain(
            PretrainConfig(
                model_config=shape, data=str(data), out=str(tmp_path / "m"), max_steps=50, learning_rate=1e30, grad_clip=0,
                warmup_ratio=0, save_every=1,
            )
        )  # fmt: skip
    assert not (tmp_path / "m" / "model.safetensors").exists()
    assert list((tmp_path / "m" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_130(data: Path, shape: str, tmp_path: Path, number: int) -> None:
    out = tmp_path / "m"
    command = [
        sys.executable, "-m", "tinygpt2", "pretrain", "--model-config", shape, "--data", str(data), "--out", str(out),
        "--max-steps", "100000", "--log-every", "1",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        deadline = time.monotonic() + 120
        while not read_metrics(out) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert output == ""
    assert "hint: add --resume" in errors
    (saved,) = (out / "checkpoints").iterdir()
    steps = json.loads((saved / "state.json").read_text())["run"]["step"]
    assert saved.name == f"step-{steps}"


def test_tensorboard_gets_the_metrics(data: Path, shape: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(
        PretrainConfig(model_config=shape, data=str(data), out=str(tmp_path / "m"), report_to=["tensorboard"], **FAST)
    )
    events = EventAccumulator(str(tmp_path / "m" / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([row["loss"] for row in read_metrics(tmp_path / "m")])


def test_misfits_are_refused_before_anything_is_written(
    data: Path, teacher: Path, corpus: Path, tokenizer_dir: Path, shape: str, tmp_path: Path
) -> None:
    from tinygpt2 import PregenerateConfig, TrainTokenizerConfig, pregenerate, train_tokenizer

    other_tokenizer = tmp_path / "tok"
    train_tokenizer(
        TrainTokenizerConfig(
            source=[str(corpus / "00.txt"), str(corpus / "01.txt")], vocab_size=320, out=str(other_tokenizer)
        )
    )
    pregenerate(
        PregenerateConfig(
            source=str(corpus), tokenizer=str(other_tokenizer), out=str(tmp_path / "other"), sequence_length=32
        )
    )
    pregenerate(
        PregenerateConfig(
            source=str(corpus), tokenizer=str(tokenizer_dir), out=str(tmp_path / "long"), sequence_length=64
        )
    )
    make_model(tmp_path / "v300", None, vocab_size=300)
    out = tmp_path / "out"
    common = {"out": str(out), "max_steps": 1}
    cases = [
        (DataError, "another tokenizer", lambda: pretrain(PretrainConfig(model=str(teacher), data=str(tmp_path / "other"), **common))),
        (ConfigError, "32 positions", lambda: pretrain(PretrainConfig(model=str(teacher), data=str(tmp_path / "long"), **common))),
        (ConfigError, "32 positions", lambda: pretrain(PretrainConfig(model_config=shape, data=str(tmp_path / "long"), **common))),
        (ConfigError, "--sequence-length 64", lambda: finetune(
            FinetuneConfig(model=str(teacher), data=str(corpus), sequence_length=64, **common))),
        (ModelError, "vocabulary of 320", lambda: distill(
            DistillConfig(teacher=str(teacher), student=str(tmp_path / "v300"), data=str(data), **common))),
        (DataError, "another tokenizer", lambda: distill(
            DistillConfig(teacher=str(teacher), student=shape, data=str(tmp_path / "other"), **common))),
        (DataError, "no such dataset", lambda: pretrain(PretrainConfig(model=str(teacher), data="nowhere", **common))),
        (ConfigError, "fp16 needs a CUDA GPU", lambda: pretrain(
            PretrainConfig(model=str(teacher), data=str(data), precision="fp16", **common))),
    ]  # fmt: skip
    for kind, part, run in cases:
        with pytest.raises(kind, match=part):
            run()
        assert not out.exists(), part


def test_lengths() -> None:
    options = {"out": "o"}
    assert total_steps(TrainOptions(**options), 100, 8, 32, 1000) == 13
    assert total_steps(TrainOptions(**options, num_epochs=2.5), 100, 8, 32, 1000) == 32
    assert total_steps(TrainOptions(**options, max_steps=7), 100, 8, 32, 1000) == 7
    assert total_steps(TrainOptions(**options, max_tokens=1000), 100, 8, 32, 1000) == 4


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda t: 1.0), ("linear", lambda t: 1 - t), ("cosine", lambda t: 0.5 + 0.5 * math.cos(math.pi * t)),
        ("exponential", lambda t: math.exp(-0.693 * t)), ("wsd", lambda t: 1.0 if t <= 0.8 else (1 - t) / 0.2),
    ],
)  # fmt: skip
def test_schedules(schedule: str, expected: object) -> None:
    options = TrainOptions(out="o", learning_rate=2.0, warmup_ratio=0.1, lr_schedule=schedule)
    assert [learning_rate(step, 100, options, options.learning_rate) for step in range(10)] == pytest.approx(
        [0.2 * (i + 1) for i in range(10)]
    )
    for step in range(10, 100):
        assert learning_rate(step, 100, options, options.learning_rate) == pytest.approx(
            2.0 * expected((step - 10) / 90)
        ), step


def test_wsd_decays_in_its_share_of_the_steps() -> None:
    options = TrainOptions(out="o", learning_rate=1.0, warmup_ratio=0.0, lr_schedule="wsd", decay_ratio=0.7)
    rates = [learning_rate(step, 100, options, 1.0) for step in range(100)]
    assert rates == pytest.approx([1.0] * 30 + [(100 - step) / 70 for step in range(30, 100)])


def test_plateau_schedule() -> None:
    options = TrainOptions(out="o", learning_rate=1.0, warmup_ratio=0.0, lr_schedule="plateau", plateau_ratio=0.04)
    rates = [learning_rate(step, 100, options, options.learning_rate) for step in range(100)]
    assert rates[:5] == [1.0] * 5
    assert rates[4:] == pytest.approx([1 - i / 96 for i in range(96)])


def test_distillation_takes_rate_and_length_from_the_sizes() -> None:
    base = {"teacher": "t", "student": "s", "data": "d", "out": "o"}
    default = DistillConfig(**base)
    assert default.learning_rate is None
    rates = [peak_learning_rate(default, width) for width in (64, 500, 768, 10_000)]
    assert rates == pytest.approx([4e-3, 6e-4, 3.9e-4, 1e-4], rel=1e-2)
    assert [passes_over_data(default, 1000, tokens) for tokens in (10**6, 10_000, 1000)] == [1, 2, 4]
    assert total_steps(default, 100, 8, 32, 320) == 25  # 20 x 320 tokens are two passes over 100 x 32
    given = DistillConfig(**base, learning_rate=0.1, num_epochs=0.5)
    assert (peak_learning_rate(given, 768), passes_over_data(given, 10**9, 1)) == (0.1, 0.5)
    assert peak_learning_rate(DistillConfig(**base, recipe="tinygpt2"), 768) == 2.5e-4
    more = {"data": "d", "out": "o"}
    assert peak_learning_rate(PretrainConfig(model="m", **more), 768) == 0.3 / 768
    assert [peak_learning_rate(PretrainConfig(shape="gpt2", **more), n) for n in (64, 500)] == [1e-2, 2.5 / 500]
    old = PretrainConfig(shape="gpt2", optimizer="adamw", **more)
    assert [peak_learning_rate(old, n) for n in (64, 500, 10_000)] == [1.5e-3, 0.5 / 500, 1e-4]
    assert peak_learning_rate(FinetuneConfig(model="m", **more), 768) == 0.3 / 768


def test_biases_and_layer_norms_never_decay(teacher: Path) -> None:
    model, _ = load_model(str(teacher))
    decayed, spared = make_optimizer(model, TrainOptions(out="o", optimizer="adamw", weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    ids = {id(p): name for name, p in model.named_parameters()}
    assert all(name.endswith("bias") or ".ln_" in name for name in (ids[id(p)] for p in spared["params"]))
    assert not any(name.endswith("bias") or ".ln_" in name for name in (ids[id(p)] for p in decayed["params"]))
