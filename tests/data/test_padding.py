"""Padding counts in no objective, and a global batch's means do not depend on where the padding falls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.objectives.test_objectives import RUN, T, V, gpt2
from tinygpt2 import PregenerateConfig, distill, pregenerate
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.objectives.weights import Counts, LossWeights
from tinygpt2.training.step import Step, evaluate

LENGTHS = [T, 9, 1, 14]
EVERY = LossWeights(1.0, 0.7, 1.3, 0.5, 0.4, 0.6, loss="jsd", temperature=2.0)


def double(step: Step) -> Step:
    step._teacher[0].double()
    return step.double()


def gradients(step: Step) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in step.parameters() if parameter.grad is not None]


def one_batch() -> tuple[Step, torch.Tensor, torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
    """Every objective on one padded batch: step, tokens, loss, terms and gradients, in float64."""
    step = double(Step(gpt2(2, 24, 4, seed=2), gpt2(4, 24, 4, seed=1), EVERY, RUN))
    ids = torch.randint(0, V, (len(LENGTHS), T), generator=torch.Generator().manual_seed(3))
    loss, terms = step(ids, LENGTHS)
    loss.backward()
    found = gradients(step)
    step.zero_grad()
    return step, ids, loss, terms, found


def test_padding_counts_nowhere() -> None:
    """Each row cut to its length and run alone, put together by what its means are over."""
    step, ids, loss, terms, ours = one_batch()
    per = {"attention": 2, "relation": 0, "hidden": 0, "prediction": 0, "ce": 1, "cosine": 0}
    whole = Counts.of(LENGTHS)
    expected = dict.fromkeys(per, 0.0)
    for row, length in enumerate(LENGTHS):
        for name, which in per.items():
            share = Counts.of([length])[which] / whole[which]
            if share == 0:
                continue  # one token has no next one
            weights = LossWeights(ce=0.0, loss=EVERY.loss, temperature=EVERY.temperature)
            object.__setattr__(weights, name, getattr(EVERY, name))
            alone = Step(step.student, step._teacher[0], weights, RUN)
            value, found = alone(ids[row : row + 1, :length])
            expected[name] += share * float(found[name])
            (share * value).backward()
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, rel=1e-9)
    assert loss.item() == pytest.approx(sum(getattr(EVERY, name) * term for name, term in expected.items()), rel=1e-9)
    for found_gradient, reference in zip(ours, gradients(step), strict=True):
        torch.testing.assert_close(found_gradient, reference, rtol=1e-8, atol=1e-11)


def test_what_stands_in_the_padding_changes_nothing() -> None:
    step = double(
        Step(gpt2(2, 16, 4, seed=2), gpt2(4, 24, 4, seed=1), LossWeights(1.0, 1.0, 1.0, 1.0, 0.0, 1.0, "variance"), RUN)
    )
    ids = torch.randint(0, V, (len(LENGTHS), T), generator=torch.Generator().manual_seed(3))
    padding = torch.arange(T) >= torch.tensor(LENGTHS)[:, None]
    first, _ = step(ids, LENGTHS)
    second, _ = step(ids.masked_fill(padding, 0), LENGTHS)
    assert first.item() == pytest.approx(second.item(), rel=1e-12)
    full, _ = step(ids, [T] * 4)
    assert full.item() == pytest.approx(step(ids)[0].item(), rel=1e-12)


class Waits(TorchDispatchMode):
    """Notes every operation for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func is torch.ops.aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        if masks or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_no_loss_waits_for_a_gpu(lengths: list[int] | None) -> None:
    step = double(Step(gpt2(2, 24, 4, seed=2), gpt2(4, 24, 4, seed=1), LossWeights(*[1.0] * 6, "variance"), RUN))
    ids = torch.randint(0, V, (len(LENGTHS), T), generator=torch.Generator().manual_seed(3))
    with Waits() as waits:
        step(ids, lengths, Counts.of(LENGTHS).over(2))[0].backward()
    assert waits.found == []
    with waits:
        ids[ids > 3].sum().item()  # what it would find
    assert len(waits.found) == 2


def test_micro_batches_give_the_global_batch() -> None:
    step, ids, _, terms, together = one_batch()
    share, sums = Counts.of(LENGTHS).over(len(LENGTHS)), dict.fromkeys(terms, 0.0)
    for row, length in enumerate(LENGTHS):
        lengths = None if length == T else [length]
        part, found = step(ids[row : row + 1], lengths, share)
        (part / len(LENGTHS)).backward()
        for name, term in found.items():
            sums[name] += float(term) / len(LENGTHS)
    assert sums == pytest.approx({name: float(term) for name, term in terms.items()}, rel=1e-9)
    for apart, reference in zip(gradients(step), together, strict=True):
        torch.testing.assert_close(apart, reference, rtol=1e-8, atol=1e-11)


def test_distilling_on_padded_blocks(teacher: Path, corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """One batch of all blocks, padded ones too, in one go and in parts: the same first step."""
    few = tmp_path / "few"
    few.mkdir()
    for name in ("00.txt", "01.txt"):
        shutil.copy(corpus / name, few / name)
    data = tmp_path / "data"
    pregenerate(PregenerateConfig(
        source=str(few), tokenizer=str(tokenizer_dir), out=str(data), sequence_length=32, test_fraction=0, format="hdf5",
        test_source=str(corpus / "02.txt"),
    ))  # fmt: skip
    packed = load_packed_dataset(str(data))
    assert packed.train.padded
    blocks = len(packed.train)
    count = blocks - blocks % 2
    curves = []
    for index, (micro, turns) in enumerate(((count, 1), (count // 2, 2))):
        config = DistillConfig(
            teacher=str(teacher), student=str(teacher), data=str(data), out=str(tmp_path / f"m{index}"), recipe="tinygpt2",
            freeze=["transformer.h.0.*"], max_steps=3, micro_batch_size=micro, gradient_accumulation_steps=turns, log_every=1,
            dropout=0.0, learning_rate=0.01, warmup_ratio=0.0,
        )  # fmt: skip
        made = distill(config)
        rows = [json.loads(line) for line in (tmp_path / f"m{index}" / "metrics.jsonl").read_text().splitlines()]
        curves.append([row["loss"] for row in rows if row["step"]] + [made.eval.loss])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4, abs=1e-7)


def test_evaluation_leaves_padding_out(stored_padded: tuple[list[list[int]], list[int]]) -> None:
    from accelerate import Accelerator

    from tinygpt2.data.batches.block_readers import MapPart
    from tinygpt2.data.dataset import Blocks

    rows, lengths = stored_padded
    model = gpt2(2, 16, 4, seed=2)
    items = [
        {"input_ids": row, "input_mask": [0] * length + [1] * (T - length)}
        for row, length in zip(rows, lengths, strict=True)
    ]
    found = evaluate(
        Accelerator(cpu=True),
        Step(model, None, LossWeights(), RUN),
        Blocks([MapPart(items, T, model.config.vocab_size, "test")], T),
        2,
    )
    total, count = 0.0, 0
    with torch.no_grad():
        for row, length in zip(rows, lengths, strict=True):
            ids = torch.tensor([row[:length]])
            logits = model(ids).logits[0, :-1].double()
            total -= float(logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum())
            count += length - 1
    assert found.loss == pytest.approx(total / count, rel=1e-6)


@pytest.fixture
def stored_padded() -> tuple[list[list[int]], list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, V, (4, T), generator=generator).tolist(), [T, 6, 2, 17]
