"""`teach` fills a cache ahead, and `distill` learns from it without the teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import LENGTH, make_model
from tinygpt2 import DistillConfig, TeachConfig, distill, plan_run, teach
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import ConfigError, DataError, InterruptedRunError, ModelError
from tinygpt2.models.loading import load_model
from tinygpt2.objectives.sparse import SparseForm
from tinygpt2.planning.known_values import known_options
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.teacher_cache import TeacherCache


@pytest.fixture(scope="module")
def student(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("student") / "m", tokenizer_dir, seed=8, n_layer=2, n_embd=24)


@pytest.fixture(scope="module")
def taught(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache of samples, which no test changes."""
    out = tmp_path_factory.mktemp("taught")
    result = teach(TeachConfig(teacher=str(teacher), data=str(data), out=str(out)))
    assert (result.kind, result.filled, result.computed) == ("samples", 1.0, result.sequences)
    return out


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out)]


def run(student: Path, data: Path, out: Path, **options: object) -> list[float]:
    base = {"student": str(student), "data": str(data), "out": str(out), "log_every": 1, "max_steps": 5}
    distill(DistillConfig(**{**base, "micro_batch_size": 4, **options}))
    return losses(out)


def only(root: Path) -> Path:
    (path,) = (path for path in root.iterdir() if path.is_dir())
    return path


@pytest.mark.parametrize("kind", ["samples", "top"])
def test_a_student_learns_the_same_without_the_teacher(
    teacher: Path, student: Path, few: Path, tmp_path: Path, kind: str
) -> None:
    """As with a teacher that fills the cache, or that finds it full; with a temperature and cross-entropy."""
    options = {"temperature": 2.0, "ce_weight": 0.5, "teacher_cache_kind": kind}
    given = {"teacher": str(teacher), **options}
    filling = run(student, few, tmp_path / "filling", teacher_cache=str(tmp_path / "filled"), **given)
    teach(
        TeachConfig(
            teacher=str(teacher), data=str(few), out=str(tmp_path / "taught"), temperature=2.0, teacher_cache_kind=kind
        )
    )
    assert only(tmp_path / "taught").name == only(tmp_path / "filled").name
    cache = str(tmp_path / "taught")
    reading = run(student, few, tmp_path / "reading", teacher_cache=cache, **given)
    alone = run(student, few, tmp_path / "alone", teacher_cache=cache, **options)
    found = run(
        student, few, tmp_path / "found", teacher_cache=str(only(tmp_path / "taught")), temperature=2.0, ce_weight=0.5
    )
    assert alone == reading == found
    assert alone == pytest.approx(filling, rel=1e-4)
    assert "from samples of" in (tmp_path / "alone" / "README.md").read_text() or kind == "top"
    assert "no teacher" not in (tmp_path / "alone" / "README.md").read_text()


def test_samples_teach_as_the_whole_distribution_does(
    teacher: Path, student: Path, data: Path, taught: Path, tmp_path: Path
) -> None:
    exact = run(student, data, tmp_path / "exact", teacher=str(teacher), max_steps=40)
    sampled = run(student, data, tmp_path / "sampled", teacher_cache=str(taught), max_steps=40)
    first, last = exact[0], exact[-1]
    assert sampled[0] == pytest.approx(first, rel=0.05)
    assert sampled[-1] - last < 0.1 * (first - last)


def test_a_cache_takes_at_most_200_bytes_a_token(data: Path, taught: Path) -> None:
    packed = load_packed_dataset(str(data))
    size = sum(file.stat().st_size for file in only(taught).iterdir())
    assert size <= 200 * len(packed.train) * packed.sequence_length
    for vocabulary in (50_257, 65_536, 65_537, 10**6):
        form = SparseForm("samples", vocabulary)
        assert 40 <= form.kept <= 100
        assert 2 * form.width + 4 <= 200


def test_parts_and_an_interrupted_call_fill_one_cache(
    teacher: Path, data: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"teacher": str(teacher), "data": str(data), "out": str(tmp_path / "c"), "micro_batch_size": 3}
    first = teach(TeachConfig(**common, part="1/2"))
    assert 0 < first.filled < 1
    assert first.computed == first.sequences // 2
    with pytest.raises(DataError, match=r"holds only .* of the teacher's predictions"):
        run(teacher, data, tmp_path / "s", teacher_cache=str(tmp_path / "c"))
    original, calls = TeacherCache.computed, []

    def stopped(self: TeacherCache, model: object, ids: torch.Tensor, documents: object) -> torch.Tensor:
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, model, ids, documents)

    with monkeypatch.context() as patched:
        patched.setattr(TeacherCache, "computed", stopped)
        with pytest.raises(InterruptedRunError, match=r"holds \d+.\d% of the blocks") as caught:
            teach(TeachConfig(**common))
    assert caught.value.hint == "run the same command again to continue"
    done = teach(TeachConfig(**common, part="2/2"))
    assert done.filled == 1
    assert done.computed == done.sequences - first.computed - 6
    assert teach(TeachConfig(**common)).computed == 0
    states = [np.fromfile(only(root) / "states.bin", np.int16) for root in (tmp_path / "c", taught)]
    assert (states[0] != states[1]).mean() < 1e-3  # with other micro-batches, a few logits are rounded differently
    again = np.memmap(only(tmp_path / "c") / "states.bin", np.int16, "r+")
    again[5] += 1
    again.flush()
    assert teach(TeachConfig(**common)).computed == 1


def test_a_damaged_block_without_a_teacher_stops_the_run(
    student: Path, teacher: Path, few: Path, tmp_path: Path
) -> None:
    teach(TeachConfig(teacher=str(teacher), data=str(few), out=str(tmp_path / "c")))
    states = np.memmap(only(tmp_path / "c") / "states.bin", np.int16, "r+")
    states[::50] += 1  # in every block
    states.flush()
    with pytest.raises(DataError, match="missing or damaged") as caught:
        run(student, few, tmp_path / "s", teacher_cache=str(tmp_path / "c"))
    assert "tinygpt2 teach" in str(caught.value.hint)


def test_what_does_not_fit_is_refused(
    cli: Callable,
    student: Path,
    teacher: Path,
    data: Path,
    taught: Path,
    corpus: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
) -> None:
    other = tmp_path / "other"
    made = cli(
        "pregenerate", corpus / "00.txt", "--tokenizer", tokenizer_dir, "--sequence-length", LENGTH, "--out", other
    )
    assert made.code == 0, made.err
    (tmp_path / "empty").mkdir()
    base = ["distill", "--student", student, "--out", tmp_path / "s", "--max-steps", 1]
    small = make_model(tmp_path / "small", None, n_layer=1, vocab_size=319)
    cases: list[tuple[int, str, list[object]]] = [
        (3, "was made from other blocks", [*base, "--data", other, "--teacher-cache", taught]),
        (3, "holds no predictions of a teacher", [*base, "--data", data, "--teacher-cache", tmp_path / "empty"]),
        (2, "predictions at temperature 1, and the run has --temperature 2",
         [*base, "--data", data, "--teacher-cache", taught, "--temperature", 2]),
        (2, "does not hold --teacher-cache-kind top",
         [*base, "--data", data, "--teacher-cache", taught, "--teacher-cache-kind", "top"]),
        (2, "serves --prediction-loss forward_kl alone",
         [*base, "--data", data, "--teacher-cache", taught, "--prediction-loss", "reverse_kl"]),
        (2, "--teacher is required",
         [*base, "--data", data, "--teacher-cache", taught, "--teacher-cache-kind", "states"]),
        (2, "--hidden-weight needs other states",
         [*base, "--data", data, "--teacher-cache", taught, "--hidden-weight", 1]),
        (2, "holds no hidden states", [*base, "--data", data, "--teacher-cache", taught, "--cosine-weight", 1]),
        (2, "--teacher-dtype bf16 has no effect without --teacher",
         [*base, "--data", data, "--teacher-cache", taught, "--teacher-dtype", "bf16"]),
        (2, "expected I/N", ["teach", "--teacher", teacher, "--data", data, "--out", tmp_path / "c", "--part", "2"]),
        (2, "the last N/N", ["teach", "--teacher", teacher, "--data", data, "--out", tmp_path / "c", "--part", "3/2"]),
        (2, "has no effect on hidden states",
         ["teach", "--teacher", teacher, "--data", data, "--out", tmp_path / "c", "--teacher-cache-kind", "states",
          "--temperature", 2]),
        (2, "fp16 needs a CUDA GPU",
         ["teach", "--teacher", teacher, "--data", data, "--out", tmp_path / "c", "--precision", "fp16"]),
        (3, "tinygpt2 pregenerate", ["teach", "--teacher", teacher, "--data", tmp_path / "none", "--out", tmp_path / "c"]),
    ]  # fmt: skip
    for code, message, command in cases:
        result = cli(*command)
        assert (result.code, message in result.err) == (code, True), (command, result.err)
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "s").exists()
    with pytest.raises((ModelError, DataError), match="319"):
        run(small, data, tmp_path / "t", teacher_cache=str(taught))


def test_from_the_command_line_with_a_llama(
    cli: Callable, student: Path, data: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Filled and learned from in JSON; planned, checked, timed and resumed without the teacher."""
    torch.manual_seed(4)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=320, max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    load_tokenizer(str(tokenizer_dir)).save_pretrained(tmp_path / "llama")
    cache, out = tmp_path / "cache", tmp_path / "out"
    made = cli("teach", "--teacher", tmp_path / "llama", "--data", data, "--out", cache, "--json")
    assert made.code == 0, made.err
    assert made.json["filled"] == 1
    assert made.json["bytes_per_token"] <= 200
    assert Path(made.json["cache"]).parent == cache
    assert json.loads((only(cache) / "about.json").read_text())["teacher"] == "llama"
    command = ["distill", "--teacher-cache", cache, "--student", student, "--data", data, "--out", out, "--json",
               "--micro-batch-size", 2]  # fmt: skip
    planned = cli(*command, "--max-steps", 2, "--validate-only")
    assert planned.code == 0, planned.err
    assert planned.json["teacher_parameters"] == 0
    timed = cli(*command, "--plan")
    assert timed.code == 0, timed.err
    assert timed.json["candidates"][0]["tokens_per_second"] > 0
    assert not out.exists()
    first = cli(*command, "--max-steps", 2, "--lr-schedule", "constant")
    assert first.code == 0, first.err
    assert math.isfinite(first.json["loss"])
    assert "samples of the predictions of llama" in (out / "README.md").read_text()
    more = cli(*command, "--max-steps", 4, "--lr-schedule", "constant", "--resume")
    assert more.code == 0, more.err
    assert more.json["steps"] == 4
    assert "content" in json.loads((out / "run.json").read_text())
    assert json.loads((out / "run.json").read_text())["content"]["teacher_cache"] == only(cache).name


def test_a_run_does_not_go_on_with_another_teachers_predictions(
    student: Path, data: Path, taught: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    common = {"lr_schedule": "constant", "max_steps": 1}
    run(student, data, tmp_path / "s", teacher_cache=str(taught), **common)
    other = make_model(tmp_path / "other", tokenizer_dir, seed=9)
    teach(TeachConfig(teacher=str(other), data=str(data), out=str(tmp_path / "c")))
    with pytest.raises(ConfigError, match="--resume: --teacher-cache differ"):
        run(student, data, tmp_path / "s", teacher_cache=str(tmp_path / "c"), resume=True, **{**common, "max_steps": 2})
    teach(
        TeachConfig(
            teacher=str(make_model(tmp_path / "third", tokenizer_dir, seed=10)), data=str(data), out=str(tmp_path / "c")
        )
    )
    with pytest.raises(ConfigError, match="holds several that fit"):
        run(student, data, tmp_path / "t", teacher_cache=str(tmp_path / "c"), **common)


def test_the_plan_counts_predictions(teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    common = {"teacher": str(teacher), "student": str(student), "data": str(data), "out": str(tmp_path / "s")}
    plain = plan_run(DistillConfig(**common))
    cached = plan_run(DistillConfig(**common, teacher_cache=str(tmp_path / "cache"), teacher_cache_kind="top"))
    packed = load_packed_dataset(str(data))
    assert cached.disk_bytes - plain.disk_bytes == 2 * SparseForm("top", 320).width * len(packed.train) * LENGTH
    assert not (tmp_path / "cache").exists()


def test_states_are_taught_ahead_too(teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    result = teach(TeachConfig(teacher=str(teacher), data=str(data), out=str(cache), teacher_cache_kind="states"))
    assert result.kind == "states"
    model, packed = load_model(str(teacher))[0], load_packed_dataset(str(data))
    assert TeacherCache(cache, model, packed, "fp32").filled == 1
    with pytest.raises(DataError, match="holds no predictions"):
        run(student, data, tmp_path / "s", teacher_cache=str(cache))


def test_two_processes_learn_from_a_cache_as_one(student: Path, data: Path, taught: Path, tmp_path: Path) -> None:
    common = {"teacher_cache": str(taught), "max_steps": 3}
    one = run(student, data, tmp_path / "one", **common)
    two = run(student, data, tmp_path / "two", micro_batch_size=2, num_processes=2, **common)
    assert two == pytest.approx(one, rel=1e-5)


def test_a_preset_gets_the_tokens_of_the_cache(data: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """The teacher has more rows than its tokenizer has tokens."""
    wide = make_model(tmp_path / "wide", tokenizer_dir, vocab_size=384)
    teach(TeachConfig(teacher=str(wide), data=str(data), out=str(tmp_path / "c")))
    shape = tmp_path / "shape.yaml"
    shape.write_text("{n_layer: 1, n_embd: 8, n_head: 2, n_positions: 32}", encoding="utf-8")
    config = DistillConfig(
        student=str(shape), data=str(data), teacher_cache=str(tmp_path / "c"), out=str(tmp_path / "o")
    )
    known, unknown = known_options(config)
    assert unknown == []
    assert plan_run(known).steps == plan_run(config).steps
    run(shape, data, tmp_path / "o", teacher_cache=str(tmp_path / "c"))
    assert load_model(str(tmp_path / "o"))[0].config.vocab_size == 384
