"""Sampled text in training: what the loss counts, that a run resumes bit for bit, and that processes do not matter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.conftest import LENGTH, full_disk, make_model, stopped_after
from tinygpt2 import DistillConfig, distill, plan_run
from tinygpt2.config.decoding import token_range
from tinygpt2.data.batches.batch import Batch
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.dataset import PackedDataset, from_map_style, load_packed_dataset
from tinygpt2.decoding.own_text import Lengths
from tinygpt2.errors import ConfigError, InterruptedRunError, MachineError
from tinygpt2.models.loading import load_model
from tinygpt2.models.parameters import set_dropout
from tinygpt2.models.teachers.ensemble import as_one
from tinygpt2.models.teachers.loading import as_teacher
from tinygpt2.objectives.weights import Counts, LossWeights
from tinygpt2.training import loop
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.own_text.figures import Figures, SampleLog, distinct_pairs, repeats_one
from tinygpt2.training.own_text.replay import Replay, Text, grown
from tinygpt2.training.own_text.source import OwnText, becomes_text
from tinygpt2.training.step import Step


@pytest.fixture(scope="module")
def student(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("student") / "m", tokenizer_dir, seed=8, n_layer=2, n_embd=24)


def config(teacher: Path | list[str], student: Path, data: Path, out: Path, **options: object) -> DistillConfig:
    base = {
        "teacher": teacher if isinstance(teacher, list) else str(teacher), "student": str(student), "data": str(data), "out": str(out), "log_every": 1,
        "max_steps": 4, "micro_batch_size": 4, "on_policy_fraction": 0.5, "prompt_tokens": "2:8", "optimizer": "adamw",
        "learning_rate": 1e-3,
    }  # fmt: skip
    return DistillConfig(**{**base, **options})


def source(how: DistillConfig, data: PackedDataset) -> OwnText:
    models = load_model(how.student)[0], as_teacher(load_model(how.teacher)[0])
    return OwnText(how, Accelerator(cpu=True), *models, data)


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_some_blocks_become_continuations_of_their_beginnings(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    packed = load_packed_dataset(str(data))
    own = source(config(teacher, student, data, tmp_path, max_new_tokens=9), packed)
    indices = Shuffle(len(packed.train), 42)[8:16]
    made, share = own.into(packed.train.batch(indices), indices, 1)
    assert made.own_text.tolist() in ([False, True] * 4, [True, False] * 4)
    assert share.own_text == sum(int(row.sum()) for row in made.counted[made.own_text]) / 2
    for row, index in enumerate(indices):
        block = packed.train.row(index)
        if not made.own_text[row]:
            assert made.input_ids[row].tolist() == block.tolist()
            assert made.counted[row].tolist() == [False] + [True] * (LENGTH - 1)
            continue
        (places,) = np.nonzero(made.counted[row])
        begin, end = int(places[0]), int(places[-1]) + 1
        assert 2 <= begin <= 8
        assert end - begin == len(places) <= 9
        assert made.input_ids[row, :begin].tolist() == block[:begin].tolist()
        added = made.input_ids[row, begin:end].tolist()
        assert 0 not in added[:-1]  # the first end-of-text token ends it, and counts
        assert made.lengths[row] == end
        assert made.input_ids[row, end:].eq(0).all()
    alone, _ = own.into(packed.train.batch(indices), indices, 1)
    assert torch.equal(alone.input_ids, made.input_ids)
    later, _ = own.into(packed.train.batch(indices), indices, 2)
    assert not torch.equal(later.input_ids, made.input_ids)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.3, 1.0])
def test_the_share_is_kept_at_every_place(fraction: float) -> None:
    draw, size = np.random.default_rng(1), 20
    steps = [[becomes_text(place, fraction, shift) for place in range(size)] for shift in draw.random(2000)]
    assert {sum(step) for step in steps} == {size * fraction}
    assert np.array(steps).mean(0) == pytest.approx(np.full(size, fraction), abs=0.04)
    few = [sum(becomes_text(place, fraction, shift) for place in range(3)) for shift in draw.random(2000)]
    assert np.mean(few) == pytest.approx(3 * fraction, abs=0.05)


@pytest.mark.parametrize("more", [{}, {"steps_per_sample": 4, "on_policy_fraction": 0.25, "micro_batch_size": 1}])
def test_each_of_two_datasets_is_read_and_sampled_from(
    teacher: Path, student: Path, data: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    """Blocks of both come in turns: neither the same ones nor none may become text in every step."""
    packed = load_packed_dataset(str(data))
    how = config(teacher, student, data, tmp_path, **{"micro_batch_size": 2, "max_new_tokens": 1, **more})
    own, chosen, size = source(how, packed), [], how.micro_batch_size
    for step in range(0, 160, how.steps_per_sample):
        made, _ = own.into(packed.train.batch(range(size)), range(size), step)
        places = [] if made.own_text is None else np.flatnonzero(made.own_text).tolist()
        chosen += [(step * size + place) % 2 for place in places]
    expected = 160 * size * how.on_policy_fraction / how.steps_per_sample
    assert len(chosen) == pytest.approx(expected, abs=expected / 2)
    assert size == 1 or 0.3 < np.mean(chosen) < 0.7


def test_samples_of_one_prompt_share_its_beginning(teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    packed = load_packed_dataset(str(data))
    how = config(teacher, student, data, tmp_path, on_policy_fraction=1, samples_per_prompt=2, prompt_tokens="6")
    made, _ = source(how, packed).into(packed.train.batch(range(4)), range(4), 0)
    ids = made.input_ids
    assert torch.equal(ids[0, :6], ids[1, :6])
    assert torch.equal(ids[2, :6], ids[3, :6])
    assert not torch.equal(ids[0], ids[1])
    assert ids[2, :6].tolist() == packed.train.row(2)[:6].tolist()


def test_marked_blocks_give_the_prompts_of_their_pairs(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    packed = load_packed_dataset(str(data))
    rows = []
    for index in range(8):
        ids = packed.train.row(index).astype(np.int64)
        labels = ids.copy()
        labels[: 3 + index] = -100
        rows.append({"input_ids": ids, "labels": labels})
    pairs = from_map_style(rows, [], packed.tokenizer())
    how = config(teacher, student, data, tmp_path, on_policy_fraction=1, prompt_tokens="20")
    made, _ = source(how, pairs).into(pairs.train.batch(range(8)), range(8), 0)
    assert [int(np.flatnonzero(row)[0]) for row in made.counted] == [3 + index for index in range(8)]


def test_documents_that_are_apart_are_no_pairs(teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    """Their first tokens are no targets, but no prompts either."""
    packed = load_packed_dataset(str(data))
    apart = replace(packed, train=packed.train.ending(int(packed.train.row(0)[5])))
    assert apart.train.marked
    how = config(teacher, student, data, tmp_path, on_policy_fraction=1, prompt_tokens="12")
    made, _ = source(how, apart).into(apart.train.batch(range(4)), range(4), 0)
    assert [int(np.flatnonzero(row)[0]) for row in made.counted] == [12] * 4


def naive(
    models: list[torch.nn.Module], batch: Batch, prediction: float, ce: float, own: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss in float64, position by position: forward KL and cross-entropy on the data, reverse KL on own text."""
    mine, other = (model.double()(batch.input_ids).logits.log_softmax(-1) for model in models)
    total, count = torch.zeros((), dtype=torch.float64), 0
    sums = {"prediction": [], "ce": [], "own_text": []}
    for row in range(len(batch.input_ids)):
        for place in np.flatnonzero(batch.counted[row]).tolist():
            s, t = mine[row, place - 1], other[row, place - 1].detach()
            count += 1
            if batch.own_text[row]:
                sums["own_text"].append((s.exp() * (s - t)).sum())
                total = total + own * sums["own_text"][-1]
            else:
                sums["prediction"].append((t.exp() * (t - s)).sum())
                sums["ce"].append(-s[batch.input_ids[row, place]])
                total = total + prediction * sums["prediction"][-1] + ce * sums["ce"][-1]
    return total / count, {name: float(torch.stack(part).mean().detach()) for name, part in sums.items()}


@pytest.mark.parametrize("size", [1, 2])
def test_every_position_that_counts_weighs_the_same(
    teacher: Path, student: Path, data: Path, tmp_path: Path, size: int
) -> None:
    """Values and gradients against a naive float64 writing, as the mean of micro-batches, which may lack one kind."""
    packed = load_packed_dataset(str(data))
    options = {"prediction_weight": 0.5, "ce_weight": 0.3, "on_policy_weight": 0.8, "on_policy_loss": "reverse_kl"}
    how = config(teacher, student, data, tmp_path, max_new_tokens=11, micro_batch_size=size, **options)
    own = source(how, packed)
    indices = list(range(6))
    made, share = own.into(packed.train.batch(indices), indices, 0)
    models = [load_model(name)[0] for name in (how.student, how.teacher)]
    expected, terms = naive(models, made, 0.5, 0.3, 0.8)
    (reference,) = torch.autograd.grad(expected, [models[0].transformer.h[0].mlp.c_fc.weight])
    again = [load_model(name)[0] for name in (how.student, how.teacher)]
    set_dropout(again[0], 0.0)
    step = Step(*again, LossWeights.of(how), how).train()
    losses, sums = [], dict.fromkeys(terms, 0.0)
    for start in range(0, 6, size):
        part = made.part(start, start + size)
        loss, values = step(part.input_ids, part.lengths, share, None, part.counted, None, part.own_text)
        losses.append(loss)
        assert set(values) == set(terms)
        sums = {name: sums[name] + float(values[name]) * size / 6 for name in sums}
    (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), [again[0].transformer.h[0].mlp.c_fc.weight])
    assert float(torch.stack(losses).mean().detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert sums == pytest.approx(terms, rel=1e-5)
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-3, atol=1e-7)


def test_no_gradient_flows_through_sampling_and_a_run_is_logged(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    distill(config(teacher, student, data, out, on_policy_loss="reverse_kl", eval_every=2))
    rows = read_metrics(out)
    names = {"share", "seconds_share", "length", "ended", "distinct_2", "teacher_loss"}
    for row in rows:
        assert {f"sample/{name}" for name in names} <= set(row)
        assert row["loss/own_text"] > 0
        assert row["loss/prediction"] > 0
        assert row["sample/share"] == 0.5
        assert 0 < row["sample/seconds_share"] < 1
        assert 1 <= row["sample/length"] <= LENGTH
    texts = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [text["step"] for text in texts] == [2, 2, 4, 4]
    assert all(text["prompt"] for text in texts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    teacher: Path, student: Path, data: Path, tmp_path: Path, precision: str
) -> None:
    options = {"precision": precision, "max_steps": 6, "save_every": 2, "eval_every": 2}
    distill(config(teacher, student, data, tmp_path / "whole", **options))
    with stopped_after(2):
        distill(config(teacher, student, data, tmp_path / "parts", **options))
    distill(config(teacher, student, data, tmp_path / "parts", resume=True, **options))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert (tmp_path / "parts" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()


def test_two_processes_sample_other_texts_and_agree_with_one(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    distill(config(teacher, student, data, tmp_path / "one", max_steps=3))
    distill(config(teacher, student, data, tmp_path / "two", max_steps=3, micro_batch_size=2, num_processes=2))
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    for name in ("loss", "loss/prediction", "loss/own_text", "sample/length", "sample/distinct_2"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4), name


def test_weights_are_not_copied(teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    own = source(config(teacher, student, data, tmp_path), load_packed_dataset(str(data)))
    before = own._decoder()
    with torch.no_grad():
        own._student.transformer.wte.weight.mul_(0.5)
    cache = before.cache(1, 4)
    logits = before.read(cache, torch.tensor([[1, 2]]))
    torch.testing.assert_close(logits, own._student(torch.tensor([[1, 2]])).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_a_collapse_is_said_once_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("tinygpt2.training.own_text.figures.warn", said.append)
    figures, accelerator = Figures(), Accelerator(cpu=True)
    for _ in range(2):
        figures.add([[0], [0]], [True, True])
        figures.taken(accelerator, 1.0)
    assert len(said) == 1
    assert "is empty" in said[0]
    assert "--on-policy-fraction" in said[0]
    figures.add([[0], [5, 6]], [True, False])
    assert figures.taken(accelerator, 1.0)["sample/ended"] == 0.5
    for _ in range(2):
        figures.add([[7] * 20], [False])
        figures.taken(accelerator, 1.0)
        assert figures.taken(accelerator, 1.0) == {}  # nothing was sampled anew: that says nothing
    assert len(said) == 2
    assert "repeats one token" in said[1]


def test_figures_of_a_text() -> None:
    assert distinct_pairs([1, 2, 1, 2, 1]) == 0.5
    assert distinct_pairs([1]) == 1.0
    assert repeats_one([3] * 19 + [4])
    assert not repeats_one([3, 3, 3])
    assert not repeats_one(list(range(10)))
    assert token_range("7") == (7, 7)


def test_what_has_no_effect_is_refused(cli: Callable, teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    base = ["distill", "--teacher", teacher, "--student", student, "--data", data, "--out", tmp_path / "o"]
    cases = [
        ("--samples-per-prompt 2 has no effect without --on-policy-fraction", ["--samples-per-prompt", 2]),
        ("expected MIN:MAX", ["--on-policy-fraction", 1, "--prompt-tokens", "0:2"]),
        ("while --on-policy-weight is 0", ["--on-policy-fraction", 1, "--on-policy-weight", 0]),
        ("excludes --on-policy-fraction", ["--on-policy-fraction", 0.5, "--teacher-cache", tmp_path / "c"]),
        ("use --sampler teacher", ["--on-policy-fraction", 0.5, "--on-policy-loss", "ce"]),
        ("needs --eval-every", ["--fraction-growth", 0.1]),
        ("without --replay", ["--on-policy-fraction", 0.5, "--replay-schedule", "rising"]),
        ("have to be 1", ["--on-policy-fraction", 0.5, "--sampler", "mixture", "--sample-temperature", 2]),
        ("no effect on --sampler student", ["--on-policy-fraction", 0.5, "--teacher-share", 0.5]),
        ("without --on-policy-loss policy_gradient", ["--on-policy-fraction", 0.5, "--no-normalise-returns"]),
        ("use --sampler student or mixture",
         ["--on-policy-fraction", 0.5, "--sampler", "teacher", "--on-policy-loss", "policy_gradient"]),
        ("the data's blocks", ["--on-policy-fraction", 1, "--ce-weight", 1]),
    ]  # fmt: skip
    for message, more in cases:
        result = cli(*base, *more)
        assert (result.code, message in result.err) == (2, True), result.err


def test_lengths_that_do_not_fit_are_said(
    teacher: Path, student: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = config(teacher, student, data, tmp_path, prompt_tokens="100:200", max_new_tokens=50)
    said: list[str] = []
    monkeypatch.setattr("tinygpt2.decoding.own_text.say", said.append)
    assert source(how, load_packed_dataset(str(data))).lengths == (16, 16, 16)
    assert said == [
        "texts have room for 32 tokens: prompts of 16 to 16 tokens and 16 new ones, instead of 100 to 200 and 50"
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"on_policy_loss": "policy_gradient"}, "infinite"),
        ({"on_policy_loss": "jsd", "jsd_beta": 1.0}, "infinite"),
        ({"sampler": "teacher"}, "other token ids"),
    ],
)
def test_a_student_with_more_tokens_than_its_teacher_is_refused_before_anything_is_written(
    teacher: Path, tokenizer_dir: Path, data: Path, tmp_path: Path, more: dict, message: str
) -> None:
    wide = make_model(tmp_path / "wide", tokenizer_dir, vocab_size=328, n_layer=1)
    with pytest.raises(ConfigError, match=message):
        distill(config(teacher, wide, data, tmp_path / "o", **more))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("options", [
    {"recipe": "seqkd", "on_policy_fraction": 0.5}, {"recipe": "minillm", "ce_weight": 0},
    {"prediction_weight": 0, "on_policy_weight": 1},
])  # fmt: skip
def test_blocks_of_the_data_may_have_no_loss(
    teacher: Path, student: Path, data: Path, tmp_path: Path, options: dict
) -> None:
    how = config(teacher, student, data, tmp_path / "m", **{"max_new_tokens": 8, "max_steps": 2, **options})
    assert plan_run(how).steps == 2
    distill(how)
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path / "m"))


def test_a_share_that_grows_by_evaluations_resumes_with_the_same_ones(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    options = {"eval_every": 2, "fraction_growth": 0.25, "save_every": 2}
    distill(config(teacher, student, data, tmp_path / "m", **options))
    with pytest.raises(ConfigError, match="--eval-every differ"):
        distill(config(teacher, student, data, tmp_path / "m", **{**options, "eval_every": 1}, resume=True))


def test_counts_of_no_sampled_text() -> None:
    assert Counts.of([4, 4]).over(2).own_text == 0
    with pytest.raises(ConfigError):
        DistillConfig(teacher="t", student="s", data="d", out="o", on_policy_fraction=2)


@pytest.mark.parametrize("sampler", ["teacher", "mixture"])
def test_the_teacher_writes_or_helps(teacher: Path, student: Path, data: Path, tmp_path: Path, sampler: str) -> None:
    """The teacher's loss on its own text is lower than on the student's, and a mixture is between."""
    packed = load_packed_dataset(str(data))
    losses = []
    for kind in (sampler, "student"):
        share = {"teacher_share": 0.5} if kind == "mixture" else {}
        how = config(teacher, student, data, tmp_path, on_policy_fraction=1, sampler=kind, micro_batch_size=32, **share)
        own = source(how, packed)
        own.into(packed.train.batch(range(32)), range(32), 0)
        losses.append(own.metrics()["sample/teacher_loss"])
    assert losses[0] < losses[1] - 0.1


def test_a_mixture_is_the_mean_of_both_distributions(teacher: Path, student: Path, data: Path, tmp_path: Path) -> None:
    how = config(teacher, student, data, tmp_path, sampler="mixture", teacher_share=0.3)
    decoder = source(how, load_packed_dataset(str(data)))._decoder()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        found = decoder.read(decoder.cache(2, 4), ids, every=True).exp()
        other, mine = (load_model(str(name))[0](ids).logits.softmax(-1) for name in (teacher, student))
    torch.testing.assert_close(found, 0.3 * other + 0.7 * mine, rtol=1e-4, atol=1e-6)


def test_several_teachers_write_with_the_mean_of_their_probabilities(
    teacher: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    names = [str(teacher), str(student), str(teacher)]
    how = config(teacher, student, data, tmp_path, on_policy_fraction=1, sampler="teacher")
    one = as_one([as_teacher(load_model(name)[0]) for name in names])
    own = OwnText(how, Accelerator(cpu=True), load_model(student)[0], one, load_packed_dataset(str(data)))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        found = own._decoder().read(own._decoder().cache(1, 4), ids, every=True).softmax(-1)
        wanted = torch.stack([load_model(name)[0](ids).logits.softmax(-1) for name in names]).mean(0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    distill(config(names, student, data, tmp_path / "o", max_steps=2, sampler="teacher", on_policy_fraction=1))
    assert read_metrics(tmp_path / "o")[-1]["sample/teacher_loss"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "teacher", "on_policy_loss": "ce", "on_policy_fraction": 1.0},
        {"sampler": "mixture", "on_policy_loss": "policy_gradient", "prediction_weight": 0, "ce_weight": 1,
         "on_policy_weight": 1},
        {"sampler": "mixture", "on_policy_loss": "jsd", "precision": "bf16"},
    ],
)  # fmt: skip
def test_the_papers_settings_run(teacher: Path, student: Path, data: Path, tmp_path: Path, options: dict) -> None:
    distill(config(teacher, student, data, tmp_path / "o", max_steps=2, **options))
    row = read_metrics(tmp_path / "o")[-1]
    assert row["loss/own_text"] > 0
    assert ("sample/student_loss" in row) == (options["on_policy_loss"] == "policy_gradient")
    assert ("loss/ce" in row) == ("ce_weight" in options)


def test_steps_that_are_only_timed_leave_no_texts(
    teacher: Path, student: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    original = loop._Run.step

    def counted(self: loop._Run, *, stop: bool) -> object:
        kept.append(int(self._own_text.replayed["added"]))
        return original(self, stop=True)

    monkeypatch.setattr(loop._Run, "step", counted)
    with pytest.raises(InterruptedRunError):
        distill(config(teacher, student, data, tmp_path / "o", max_steps=None, max_minutes=1, replay=64))
    assert kept == [0]


def test_old_texts_stand_for_new_ones_once_there_are_enough() -> None:
    replay = Replay(3, 8, "falling", seed=1)
    texts = [Text([number], [number, 0], True) for number in range(5)]
    replay.add(texts[:2])
    assert replay.chosen(0, 1.0) is None
    replay.add(texts[2:])
    found = [replay.chosen(number, 1.0) for number in range(100)]
    assert {text.prompt[0] for text in found if text} == {2, 3, 4}  # the last three
    assert found[0] == texts[found[0].prompt[0]]
    assert [replay.chosen(number, 1.0) for number in range(100)] == found
    assert not any(replay.chosen(number, 0.0) for number in range(100))
    assert 30 < sum(replay.chosen(number, 0.5) is None for number in range(100)) < 70


def test_the_share_grows_when_the_held_out_loss_has_risen() -> None:
    state = (0.0, None)
    shares = []
    for loss in (3.0, 2.5, 3.05, 3.2, 3.25, 3.4):
        state = grown(*state, loss, 0.4)
        shares.append(state[0])
    assert shares == [0.0, 0.0, 0.0, 0.4, 0.4, 0.8]
    assert grown(0.8, 1.0, 2.0, 0.4)[0] == 1.0


def test_a_run_with_old_texts_resumes_and_two_processes_keep_the_same(
    teacher: Path, student: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"replay": 4, "max_steps": 6, "save_every": 2, "eval_every": 1, "fraction_growth": 0.25}
    monkeypatch.setattr("tinygpt2.training.own_text.replay._RISE", -10.0)  # every evaluation counts as a rise
    distill(config(teacher, student, data, tmp_path / "whole", **options))
    with stopped_after(3):
        distill(config(teacher, student, data, tmp_path / "parts", **options))
    assert list((tmp_path / "parts" / "checkpoints").glob("*/replay.safetensors"))
    distill(config(teacher, student, data, tmp_path / "parts", resume=True, **options))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    distill(config(teacher, student, data, tmp_path / "one", replay=4, max_steps=6))
    distill(
        config(teacher, student, data, tmp_path / "two", replay=4, max_steps=6, micro_batch_size=2, num_processes=2)
    )
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)


def test_every_pair_of_a_block_can_give_the_prompt(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = load_packed_dataset(str(data))
    ids = packed.train.row(0).astype(np.int64)
    labels = ids.copy()
    labels[[0, 1, 2, 10, 11, 12, 13]] = -100
    pairs = from_map_style([{"input_ids": ids, "labels": labels}], [], packed.tokenizer()).train
    whole = pairs.batch([0])._replace(documents=[[10, LENGTH - 10]])
    monkeypatch.setattr(pairs, "batch", lambda indices: whole)
    found = {tuple(Lengths(16, 64, 8).prompt(pairs, 0, 1, number)) for number in range(30)}
    assert found == {tuple(ids[:3].tolist()), tuple(ids[10:14].tolist())}
    assert Lengths(1, 2, 8).prompt(pairs, 0, 1, 0) in (ids[1:3].tolist(), ids[12:14].tolist())


@pytest.mark.parametrize("loss", ["reverse_kl", "policy_gradient"])
def test_the_student_comes_to_write_what_the_teacher_finds_likely(
    teacher: Path, student: Path, data: Path, tmp_path: Path, loss: str
) -> None:
    options = {"on_policy_fraction": 1.0, "on_policy_loss": loss, "max_steps": 60, "learning_rate": 5e-3}
    distill(config(teacher, student, data, tmp_path / "o", micro_batch_size=8, **options))
    losses = [row["sample/teacher_loss"] for row in read_metrics(tmp_path / "o")]
    assert sum(losses[-10:]) / 10 < sum(losses[:5]) / 5 - 0.2


def test_a_full_disk_loses_the_shown_texts_alone(
    teacher: Path, student: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SampleLog, "write", full_disk)
    said: list[str] = []
    monkeypatch.setattr("tinygpt2.training.checkpoint.warn", said.append)
    out = tmp_path / "o"
    how = config(teacher, student, data, out, eval_every=2, on_save_error="continue", save_every=3)
    assert distill(how).steps == 4
    assert any("samples.jsonl" in line and "No space left on device" in line for line in said)
    with pytest.raises(MachineError, match=r"samples.jsonl"):
        distill(how.model_copy(update={"out": str(tmp_path / "p"), "on_save_error": "stop"}))
