"""Only the targets that a batch counts are learned and measured, and all of them weigh the same in a global batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.test_padding import EVERY, LENGTHS, Waits, double, gradients
from tests.objectives.test_objectives import RUN, T, V, gpt2
from tinygpt2 import DataError, FinetuneConfig, finetune
from tinygpt2.data.batches.batch import Batch
from tinygpt2.data.dataset import PackedDataset, from_map_style
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.models.loading import load_model
from tinygpt2.objectives.weights import Counts, LossWeights
from tinygpt2.training.step import Step, evaluate, joined


def some_counted(ids: torch.Tensor, lengths: list[int] | None = None, seed: int = 4) -> np.ndarray:
    """About half of the targets, none in the second row."""
    counted = np.random.default_rng(seed).random(ids.shape) < 0.5
    counted[1] = False
    counted[:, 0] = False
    for row, length in zip(counted, lengths or [], strict=False):
        row[length:] = False
    return counted


def tokens() -> torch.Tensor:
    return torch.randint(0, V, (len(LENGTHS), T), generator=torch.Generator().manual_seed(3))


def naive(step: Step, ids: torch.Tensor, counted: np.ndarray, weights: LossWeights) -> tuple[float, float]:
    """Means over the counted targets, one at a time, in float64: forward KL and cross-entropy."""
    teacher = step._teacher[0].model
    kl, ce, n = 0.0, 0.0, 0
    with torch.no_grad():
        for row, marks in zip(ids, counted, strict=True):
            own = step.student(row[None]).logits[0].double().log_softmax(-1)
            other = teacher(row[None]).logits[0].double().log_softmax(-1)
            for place in range(1, len(row)):
                if marks[place]:
                    kl += float((other[place - 1].exp() * (other[place - 1] - own[place - 1])).sum())
                    ce -= float(own[place - 1, row[place]])
                    n += 1
    return kl / n, ce / n


def test_predictions_and_cross_entropy_are_means_over_the_counted_targets() -> None:
    weights = LossWeights(prediction=1.3, ce=0.5)
    step = double(Step(gpt2(2, 24, 4, seed=2), gpt2(4, 24, 4, seed=1), weights, RUN))
    ids = tokens()
    counted = some_counted(ids)
    loss, terms = step(ids, counted=counted)
    kl, ce = naive(step, ids, counted, weights)
    assert float(terms["prediction"]) == pytest.approx(kl, rel=1e-9)
    assert float(terms["ce"]) == pytest.approx(ce, rel=1e-9)
    assert loss.item() == pytest.approx(1.3 * kl + 0.5 * ce, rel=1e-9)
    everything = np.ones(ids.shape, bool)
    everything[:, 0] = False
    assert float(step(ids, counted=everything)[1]["ce"]) == pytest.approx(float(step(ids)[1]["ce"]), rel=1e-12)


def test_micro_batches_give_the_global_batch_whatever_they_count() -> None:
    step = double(Step(gpt2(2, 24, 4, seed=2), gpt2(4, 24, 4, seed=1), EVERY, RUN))
    ids = tokens()
    batch = Batch(ids, LENGTHS, some_counted(ids, LENGTHS))
    loss, terms = step(ids, LENGTHS, counted=batch.counted)
    loss.backward()
    together = gradients(step)
    step.zero_grad()
    share, sums = Counts.of(LENGTHS, targets=batch.targets).over(len(ids)), dict.fromkeys(terms, 0.0)
    for row in range(len(ids)):
        part = batch.part(row, row + 1)
        value, found = step(part.input_ids, part.lengths, share, counted=part.counted)
        (value / len(ids)).backward()
        for name, term in found.items():
            sums[name] += float(term) / len(ids)
    assert sums == pytest.approx({name: float(term) for name, term in terms.items()}, rel=1e-9)
    for apart, reference in zip(gradients(step), together, strict=True):
        torch.testing.assert_close(apart, reference, rtol=1e-8, atol=1e-11)


def test_hidden_states_and_attention_are_compared_on_all_real_tokens() -> None:
    step = double(Step(gpt2(2, 24, 4, seed=2), gpt2(4, 24, 4, seed=1), EVERY, RUN))
    ids = tokens()
    all_of_them, some = step(ids, LENGTHS)[1], step(ids, LENGTHS, counted=some_counted(ids, LENGTHS))[1]
    for name in ("attention", "relation", "hidden", "cosine"):
        assert float(some[name]) == pytest.approx(float(all_of_them[name]), rel=1e-12)
    assert float(some["ce"]) != pytest.approx(float(all_of_them["ce"]), rel=1e-3)


def test_counting_waits_for_no_gpu() -> None:
    step = double(Step(gpt2(2, 24, 4, seed=2), gpt2(4, 24, 4, seed=1), EVERY, RUN))
    ids = tokens()
    with Waits() as waits:
        step(ids, LENGTHS, counted=some_counted(ids, LENGTHS))[0].backward()
    assert waits.found == []


def labelled(tokenizer_dir: Path, count: int = 12) -> PackedDataset:
    """Rows whose labels leave out a prompt of various lengths, some of them padded."""
    rows = []
    for index in range(count):
        ids = [(index * 7 + step * 3) % 320 for step in range(16)]
        real = 16 - 5 * (index % 3 == 2)
        prompt = index % 7
        labels = [-100] * prompt + ids[prompt:real] + [-100] * (16 - real)
        rows.append({"input_ids": ids, "attention_mask": [1] * real + [0] * (16 - real), "labels": labels})
    return from_map_style(rows, rows[:5], load_tokenizer(str(tokenizer_dir)), "rows")


def test_labels_of_a_map_style_dataset_say_what_counts(tokenizer_dir: Path) -> None:
    packed = labelled(tokenizer_dir)
    assert packed.train.marked
    batch = packed.train.batch([2, 0])
    assert batch.lengths == [11, 16]
    assert batch.counted.nonzero()[1][:9].tolist() == list(range(2, 11))
    assert batch.targets == packed.train.targets([2, 0]) == [9, 15]
    plain = from_map_style([{"input_ids": [5, 6, 7]}], [], load_tokenizer(str(tokenizer_dir)))
    some = from_map_style([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}], [], load_tokenizer(str(tokenizer_dir)))
    assert (plain.train.batch([0]).counted, plain.train.targets([0]), some.train.targets([0])) == (None, [2], [1])
    assert plain.content != some.content
    with pytest.raises(DataError, match="item 0: its labels are neither its input_ids nor -100"):
        from_map_style([{"input_ids": [5, 6, 7], "labels": [5, 6, 8]}], [], load_tokenizer(str(tokenizer_dir)))


def test_training_and_evaluation_count_the_same_targets(teacher: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """One step on all rows in one micro-batch or in several, and the held-out loss, beside a loop of one's own."""
    from accelerate import Accelerator

    packed, losses = labelled(tokenizer_dir), []
    for size, turns in ((12, 1), (3, 4)):
        out = tmp_path / f"m{size}"
        finetune(FinetuneConfig(
            model=str(teacher), data="rows", out=str(out), max_steps=2, micro_batch_size=size, dropout=0.0,
            gradient_accumulation_steps=turns, learning_rate=0.01, log_every=1, warmup_ratio=0.0,
        ), packed)  # fmt: skip
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["step"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    model, _ = load_model(str(teacher))
    model.eval()

    def loop(rows: range) -> float:
        total, count = 0.0, 0
        with torch.no_grad():
            for row in rows:
                batch = packed.train.batch([row])
                found = model(batch.input_ids).logits[0].double().log_softmax(-1)
                for place in np.flatnonzero(batch.counted[0]):
                    total -= float(found[place - 1, batch.input_ids[0, place]])
                    count += 1
        return total / count

    assert losses[0][0] == pytest.approx(loop(range(12)), rel=1e-5)
    held_out = loop(range(5))  # the same rows
    step, accelerator = Step(model, None, LossWeights(), RUN), Accelerator(cpu=True)
    assert evaluate(accelerator, step, packed.test, 2).loss == pytest.approx(held_out, rel=1e-5)
    parts = {"a": packed.train, "b": packed.test}
    by_data = {name: evaluate(accelerator, step, blocks, 4) for name, blocks in parts.items()}
    targets = [sum(blocks.targets(range(len(blocks)))) for blocks in parts.values()]
    expected = (by_data["a"].loss * targets[0] + by_data["b"].loss * targets[1]) / sum(targets)
    assert joined(by_data, parts).loss == pytest.approx(expected, rel=1e-9)
