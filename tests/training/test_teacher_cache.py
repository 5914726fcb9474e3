"""The cache of the teacher's states: exact, keyed by what it depends on, proof against damage."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.conftest import full_disk, make_model
from tinygpt2 import DistillConfig, TruncateStudentConfig, distill, plan_run, truncate_student
from tinygpt2.config.training import TrainOptions
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.errors import ConfigError, MachineError
from tinygpt2.models.activations import collect_activations
from tinygpt2.models.loading import load_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.step import Step, gradients
from tinygpt2.training.teacher_cache import TeacherCache, _reserve, cache_name


@pytest.fixture(scope="module")
def cut(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cut") / "cut"
    truncate_student(TruncateStudentConfig(teacher=str(teacher), num_layers=1, out=str(out)))
    return out


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out)]


def test_states_are_computed_once_and_damaged_ones_again(teacher: Path, data: Path, tmp_path: Path) -> None:
    model, packed = load_model(str(teacher))[0], load_packed_dataset(str(data))
    ids = packed.train.batch([3, 0, 5]).input_ids
    asked: list[int] = []

    @torch.no_grad()
    def compute(ids: torch.Tensor, documents: None = None) -> torch.Tensor:
        asked.append(len(ids))
        return collect_activations(model, ids, [model.config.n_layer]).states[model.config.n_layer]

    expected = compute(ids).to(torch.bfloat16)
    cache = TeacherCache(tmp_path, model, packed, "fp32")
    assert cache.filled == 0
    assert torch.equal(cache.states([3, 0, 5], ids, compute), expected)
    again = TeacherCache(tmp_path, model, packed, "fp32")
    assert torch.equal(again.states([5, 3, 0], ids[[2, 0, 1]], compute), expected[[2, 0, 1]])
    assert asked == [3, 3]
    states = np.memmap(cache.path / "states.bin", np.int16, "r+", shape=(len(packed.train), *expected.shape[1:]))
    states[3, 1, 1] += 1
    damaged = TeacherCache(tmp_path, model, packed, "fp32")
    cpu = torch.device("cpu")
    assert torch.equal(damaged.read([0, 5], cpu).states, expected[[1, 2]])
    assert damaged.read([0, 3], cpu).states is None
    assert damaged.read([1], cpu).states is None
    assert torch.equal(damaged.states([3, 0, 5], ids, compute), expected)
    assert asked == [3, 3, 1]
    assert torch.equal(damaged.read([3, 0, 5], cpu).states, expected)
    assert torch.equal(again.states([3, 0, 5], ids, compute), expected)
    assert asked == [3, 3, 1]


def test_the_name_depends_on_weights_their_type_and_the_blocks(
    teacher: Path, data: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    packed, model = load_packed_dataset(str(data)), load_model(str(teacher))[0]
    name = cache_name(model, packed, "fp32")
    assert name == cache_name(load_model(str(shutil.copytree(teacher, tmp_path / "copy")))[0], packed, "fp32")
    other = load_model(str(make_model(tmp_path / "other", tokenizer_dir, seed=7)))[0]
    elsewhere = load_packed_dataset(str(shutil.copytree(data, tmp_path / "data")))
    assert name == cache_name(model, elsewhere, "fp32")
    elsewhere.manifest["content"] = "other blocks"
    half = load_model(str(teacher))[0].to(torch.bfloat16)
    others = [(other, packed, "fp32"), (model, elsewhere, "fp32"), (half, packed, "fp32"), (model, packed, "bf16")]
    assert len({name, *(cache_name(*of) for of in others)}) == 5


def test_only_the_output_matrix_is_needed_with_a_full_cache(teacher: Path, few: Path, tmp_path: Path) -> None:
    student, model = (load_model(str(teacher))[0] for _ in range(2))
    packed = load_packed_dataset(str(few))
    cache = TeacherCache(tmp_path, model, packed, "fp32")
    weights = LossWeights(prediction=1.0, ce=0.0)
    step = Step(student, model, weights, TrainOptions(out="o"), cache)
    step.place_teacher(torch.device("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    size, accelerator = 4, Accelerator(cpu=True)
    for start in range(0, len(packed.train), size):
        rows = [index % len(packed.train) for index in range(start, start + size)]
        gradients(accelerator, step, packed.train, rows, size)
    assert cache.filled == 1
    step.place_teacher(torch.device("meta"))
    assert model.lm_head.weight.device.type == "meta"
    assert {parameter.device.type for parameter in model.transformer.h.parameters()} == {"cpu"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_read_teaches_what_was_computed(
    teacher: Path, few: Path, cut: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs, made and read; the same read alone; and the same without a cache, to the states' rounding."""
    common = {
        "teacher": str(teacher), "student": str(cut), "data": str(few), "num_epochs": 2, "micro_batch_size": 4,
        "log_every": 1, "precision": precision, "temperature": 2.0, "cosine_weight": 0.5, "ce_weight": 0.5,
    }  # fmt: skip
    cache, packed = tmp_path / "cache", load_packed_dataset(str(few))
    distill(DistillConfig(**common, out=str(tmp_path / "first"), teacher_cache=str(cache)))
    assert TeacherCache(cache, load_model(str(teacher))[0], packed, precision).filled == 1
    assert len(list(cache.iterdir())) == 1
    find = TeacherCache.states

    def found(self: TeacherCache, rows: list[int], ids: torch.Tensor, compute: object) -> torch.Tensor:
        return find(self, rows, ids, lambda _: pytest.fail("computed again"))

    monkeypatch.setattr(TeacherCache, "states", found)
    distill(DistillConfig(**common, out=str(tmp_path / "second"), teacher_cache=str(cache)))
    distill(DistillConfig(**common, out=str(tmp_path / "plain")))
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert losses(tmp_path / "first") == pytest.approx(losses(tmp_path / "plain"), rel=5e-3)
    assert losses(tmp_path / "first") != losses(tmp_path / "plain")


def test_space_is_reserved_once_where_the_system_cannot_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    path = tmp_path / "states"
    path.write_bytes(b"abcd")  # of a run that was killed meanwhile
    for _ in range(2):
        _reserve(path, 10)
        assert path.read_bytes() == b"abcd" + bytes(6)


def test_space_is_reserved_where_only_the_file_system_cannot_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refused, raising=False)
    _reserve(tmp_path / "states", 10)
    assert (tmp_path / "states").read_bytes() == bytes(10)


def test_a_full_disk_is_an_error_before_training(
    teacher: Path, data: Path, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    with pytest.raises(MachineError, match="cannot be reserved there: No space left"):
        distill(
            DistillConfig(
                teacher=str(teacher), student=str(cut), data=str(data), out=str(tmp_path / "s"), max_steps=1,
                teacher_cache=str(tmp_path / "cache"),
            )
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_weight": 1.0}, "--hidden-weight needs other states"),
        ({"recipe": "truncation"}, "no objective uses the teacher"),
    ],
)
def test_a_cache_that_would_not_do_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillConfig(teacher="t", student="s", data="d", out="o", teacher_cache="c", **options)


def test_a_cache_may_move_but_not_go_while_a_run_waits(teacher: Path, data: Path, cut: Path, tmp_path: Path) -> None:
    common = {
        "teacher": str(teacher), "student": str(cut), "data": str(data), "max_steps": 2, "out": str(tmp_path / "s"),
    }  # fmt: skip
    distill(DistillConfig(**common, teacher_cache=str(tmp_path / "cache")))
    distill(DistillConfig(**common, teacher_cache=str(tmp_path / "elsewhere"), resume=True))
    with pytest.raises(ConfigError, match="--resume: --teacher-cache differ"):
        distill(DistillConfig(**common, resume=True))


def test_validate_only_counts_the_cache_and_makes_none(teacher: Path, data: Path, cut: Path, tmp_path: Path) -> None:
    common = {
        "teacher": str(teacher),
        "student": str(cut),
        "data": str(data),
        "out": str(tmp_path / "s"),
    }
    plain = plan_run(DistillConfig(**common))
    cached = plan_run(DistillConfig(**common, teacher_cache=str(tmp_path / "cache")))
    assert cached.disk_bytes - plain.disk_bytes == 2 * len(load_packed_dataset(str(data)).train) * 32 * 32
    assert not (tmp_path / "cache").exists()
