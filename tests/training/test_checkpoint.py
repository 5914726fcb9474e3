"""Checkpoints: whole or not trusted, the newest few and the best kept, other runs' refused, full disks survived."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from transformers import GPT2LMHeadModel

from tests.conftest import full_disk, sentences
from tests.training.test_train import same, weights
from tinygpt2 import DistillConfig, PregenerateConfig, PretrainConfig, distill, pregenerate, pretrain
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.errors import ConfigError, DataError, InterruptedRunError, MachineError, ModelError
from tinygpt2.training import checkpoint, loop
from tinygpt2.training.checkpoint import Checkpoints, damage, finished
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.state import RunState
from tinygpt2.training.step import Evaluation


def options(teacher: Path, data: Path, out: Path, **more: object) -> PretrainConfig:
    fixed = {"micro_batch_size": 4, "max_steps": 8, "save_every": 2, "keep": 9, "dropout": 0.1, "log_every": 1}
    return PretrainConfig(**{**fixed, "model": str(teacher), "data": str(data), "out": str(out), **more})


@pytest.fixture(scope="module")
def whole(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of eight steps with a checkpoint every second."""
    out = tmp_path_factory.mktemp("whole") / "m"
    pretrain(options(teacher, data, out))
    return out


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(folder: Path) -> None:
    file = folder / "optimizer.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def edit(folder: Path) -> None:
    file = folder / "state.json"
    values = json.loads(file.read_text())
    values["run"]["tokens"] += 1
    file.write_text(json.dumps(values))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (truncate, "model.safetensors is damaged"),
    (flip, "optimizer.safetensors is damaged"),
    (edit, "state.json was changed"),
    (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    (lambda folder: (folder / "state.json").write_text('{"run": '), "state.json cannot be read"),
    (lambda folder: (folder / "state.json").write_text("[]"), "state.json cannot be read"),
]


@pytest.mark.parametrize(("harm", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_by_name(
    whole: Path, teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: object, message: str
) -> None:
    out = tmp_path / "m"
    shutil.copytree(whole, out)
    newest = finished(out / "checkpoints")[-1]
    assert damage(newest) is None
    harm(newest)
    said: list[str] = []
    monkeypatch.setattr("tinygpt2.training.checkpoint.say", said.append)
    monkeypatch.setattr("tinygpt2.training.checkpoint.warn", said.append)
    pretrain(options(teacher, data, out, resume=True))
    warning, resumed = said
    assert f"{newest}: {message}" in warning
    assert resumed.endswith("step-6")
    assert damage(newest) is None  # written anew
    assert same(whole, out)


def test_a_run_whose_checkpoints_are_all_damaged_is_kept_as_it_is(
    whole: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m"
    shutil.copytree(whole, out)
    for path in finished(out / "checkpoints"):
        flip(path)
    lines = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(ModelError, match=r"every checkpoint in .*checkpoints is damaged"):
        pretrain(options(teacher, data, out, resume=True))
    assert (out / "metrics.jsonl").read_bytes() == lines
    assert same(whole, out)


def test_nothing_is_kept_of_teachers_and_random_generators(teacher: Path, data: Path, tmp_path: Path) -> None:
    whole = tmp_path / "m"
    common = {"teacher": str(teacher), "student": str(teacher), "data": str(data), "max_steps": 1}
    distill(DistillConfig(**common, out=str(whole), recipe="distilgpt2"))
    newest = finished(whole / "checkpoints")[-1]
    state = {"model.safetensors", "optimizer.safetensors", "state.json"}
    model = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in newest.iterdir()} == state | model
    assert {name.removeprefix("student.") for name in load_file(newest / "model.safetensors")} == set(weights(whole))


def test_the_newest_and_the_best_are_kept(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m"
    losses = iter([3.0, 2.0, 1.0, 2.5, 1.5, 1.25, 4.0, 5.0])
    monkeypatch.setattr("tinygpt2.training.loop.evaluate", lambda *_: Evaluation(next(losses), 0.0))
    result = pretrain(options(teacher, data, out, keep=2, eval_every=1))
    assert [path.name for path in finished(out / "checkpoints")] == ["step-3", "step-6", "step-8"]
    assert result.eval.loss == 5.0
    state = json.loads((out / "checkpoints" / "step-8" / "state.json").read_text())["run"]
    assert (state["best"]["step"], state["best"]["loss"], state["worse"]) == (3, 1.0, 5)


def test_a_damaged_newer_checkpoint_takes_no_place(whole: Path, teacher: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    shutil.copytree(whole, out)
    truncate(out / "checkpoints" / "step-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinygpt2.training.loop.seed_step", lambda seed, step, _: killed() if step == 7 else None)
        with pytest.raises(OSError, match="killed"):
            pretrain(options(teacher, data, out, resume=True, keep=1, save_every=1))
    assert [path.name for path in finished(out / "checkpoints")] == ["step-7", "step-8"]
    pretrain(options(teacher, data, out, resume=True, keep=1))
    assert [path.name for path in finished(out / "checkpoints")] == ["step-8"]


def killed() -> None:
    raise OSError("killed")


def test_the_best_that_could_not_be_written_is_not_trusted(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinygpt2.training import checkpoint

    def fails_at_three(tensors: dict, file: Path) -> None:
        if "step-3" in str(file):
            raise OSError(28, "No space left on device")
        save(tensors, file)

    save = checkpoint.save_file
    losses = iter([3.0, 2.0, 1.0, 2.5, 1.5, 1.25, 4.0, 5.0])
    monkeypatch.setattr("tinygpt2.training.loop.evaluate", lambda *_: Evaluation(next(losses), 0.0))
    monkeypatch.setattr(checkpoint, "save_file", fails_at_three)
    said: list[str] = []
    monkeypatch.setattr(checkpoint, "warn", said.append)
    out = tmp_path / "m"
    more = {"keep": 1, "eval_every": 1, "early_stopping_patience": 9, "on_save_error": "continue"}
    result = pretrain(options(teacher, data, out, **more))
    assert [path.name for path in finished(out / "checkpoints")] == ["step-2", "step-8"]
    assert result.eval.loss == 5.0
    assert "No space left on device" in said[0]
    assert "using those of the last step" in said[1]


def test_a_stop_says_whether_its_checkpoint_was_saved(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    step = loop._Run.step
    monkeypatch.setattr(loop._Run, "step", lambda self, *, stop: step(self, stop=True))
    with pytest.raises(InterruptedRunError, match="stopped after step 1 of 8; its checkpoint could not be saved"):
        pretrain(options(teacher, data, tmp_path / "m", on_save_error="continue"))


def test_another_commands_directory_is_not_resumed(whole: Path, teacher: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    shutil.copytree(whole, out)
    with pytest.raises(ConfigError, match="was written by a different command"):
        distill(DistillConfig(teacher=str(teacher), student=str(teacher), data=str(data), out=str(out), resume=True))


def test_early_stopping_ends_with_the_best_weights(teacher: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    wild = {"eval_every": 1, "learning_rate": 0.5, "warmup_ratio": 0, "lr_schedule": "constant", "keep": 1}
    result = pretrain(options(teacher, data, out, early_stopping_patience=3, **wild))
    losses = [row["eval/loss"] for row in read_metrics(out)]
    best = losses.index(min(losses))
    assert len(losses) == best + 4 < 8
    assert result.eval.loss == min(losses)
    assert result.steps == len(losses)
    kept = load_file(out / "checkpoints" / f"step-{best + 1}" / "model.safetensors")
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, kept[f"student.{name}"])
    again = pretrain(options(teacher, data, out, early_stopping_patience=3, resume=True, **wild))
    assert (again.steps, again.eval) == (result.steps, result.eval)


def test_resume_wants_the_same_global_batch_and_the_same_data(
    whole: Path, teacher: Path, data: Path, corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m"
    shutil.copytree(whole, out)
    with pytest.raises(ConfigError, match="steps of 4 sequences, now they have 8"):
        pretrain(options(teacher, data, out, resume=True, gradient_accumulation_steps=2))
    pretrain(options(teacher, data, out, resume=True, micro_batch_size=2, gradient_accumulation_steps=2))
    shutil.copytree(data, tmp_path / "d")
    moved = tmp_path / "again"
    config = options(teacher, tmp_path / "d", moved)
    pretrain(config)
    shutil.rmtree(tmp_path / "d")
    pregenerate(
        PregenerateConfig(
            source=[str(corpus)], tokenizer=str(tokenizer_dir), out=str(tmp_path / "d"), sequence_length=32, seed=7
        )
    )
    with pytest.raises(ConfigError, match="--resume: --data differ"):
        pretrain(config.model_copy(update={"resume": True}))


def test_what_a_killed_process_left_is_cleared_away(whole: Path, teacher: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    shutil.copytree(whole, out)
    (out / "checkpoints" / ".step-99").mkdir()
    pretrain(options(teacher, data, out, resume=True))
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize("way", ["stop", "continue"])
def test_a_full_disk(teacher: Path, data: Path, tmp_path: Path, way: str) -> None:
    out = tmp_path / "m"
    command = [
        sys.executable, "-m", "tinygpt2", "pretrain", "--model", str(teacher), "--data", str(data), "--out", str(out),
        "--max-steps", "6", "--save-every", "2", "--log-every", "1", "--on-save-error", way,
    ]  # fmt: skip

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_large_files)
    assert done.returncode == 6, done.stderr
    assert "cannot save" in done.stderr
    assert "hint: " in done.stderr
    if way == "continue":  # every checkpoint failed, the training went on, and the model cannot be written either
        assert done.stderr.count("the training continues") == 3
        assert len(read_metrics(out)) == 6
        assert "cannot save the model" in done.stderr
    assert not (out / "model.safetensors").exists()
    assert not list((out / "checkpoints").iterdir())


def test_a_failed_checkpoint_leaves_the_one_before(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinygpt2.training import checkpoint

    calls = []

    def fails_later(tensors: dict, file: Path) -> None:
        calls.append(file)
        if len(calls) > 3:  # in the second file of the second checkpoint
            raise OSError(28, "No space left on device")
        save(tensors, file)

    save = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", fails_later)
    with pytest.raises(MachineError, match="No space left on device") as failed:
        pretrain(options(teacher, data, tmp_path / "m"))
    assert "earlier checkpoints are intact: continue with --resume" in failed.value.hint
    assert [path.name for path in (tmp_path / "m" / "checkpoints").iterdir()] == ["step-2"]
    assert damage(tmp_path / "m" / "checkpoints" / "step-2") is None


def test_evaluation_on_a_text_of_ones_own(teacher: Path, data: Path, tmp_path: Path) -> None:
    text = tmp_path / "held.txt"
    text.write_text(sentences(40, seed=99), encoding="utf-8")
    result = pretrain(options(teacher, data, tmp_path / "m", eval_data=str(text)))
    packed = tmp_path / "m" / "eval-data"
    plain = GPT2LMHeadModel.from_pretrained(str(tmp_path / "m")).eval()
    blocks = load_packed_dataset(str(packed)).train.batch(range(len(load_packed_dataset(str(packed)).train))).input_ids
    with torch.no_grad():
        assert result.eval.loss == pytest.approx(plain(blocks, labels=blocks).loss.item(), rel=1e-5)
    text.write_text("short")
    with pytest.raises(DataError, match="shorter than one block"):
        pretrain(options(teacher, data, tmp_path / "k", eval_data=str(text)))


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_shard_that_cannot_be_written_is_missing_for_all(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs: list[ModelError | None] = [None]

    def save_state(path: str, safe_serialization: bool) -> None:
        (Path(path) / "shard").write_text("whole")
        if not path.endswith("-1"):
            theirs[0] = ModelError("the disk is full") if where == "elsewhere" else None
            if where == "here":
                raise CheckpointException("write", {0: (OSError("the disk is full"), StackSummary())})

    monkeypatch.setattr(checkpoint, "gather_object", lambda mine: [*mine, theirs[0]])
    accelerator = SimpleNamespace(
        is_main_process=True, num_processes=2, distributed_type=DistributedType.FSDP, scaler=None, save_state=save_state
    )
    checkpoints = Checkpoints(tmp_path, accelerator, None, None, {}, 1, "stop")
    state = RunState(4, "data")
    for state.step in (1, 2):
        checkpoints.save(state)
    with pytest.raises(ModelError, match="the disk is full"):
        checkpoints.settle()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert damage(tmp_path / "checkpoints" / "step-1") is None
