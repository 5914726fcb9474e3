"""--quantize: the weights that are trained, evaluated, saved and exported are the same rounded ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import make_model
from tinygpt2 import DistillConfig, FinetuneConfig, PretrainConfig, distill, finetune, pretrain
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.errors import ConfigError
from tinygpt2.models.parameters import Rounding
from tinygpt2.models.quantization import rounded
from tinygpt2.training.metrics import read_metrics

FAST = {"max_steps": 6, "micro_batch_size": 4, "log_every": 1, "learning_rate": 1e-2}


def naive_block(block: np.ndarray, kind: str) -> np.ndarray:
    """One block of 32 as ggml stores it, number by number, in float64 but for the scale's two roundings."""
    largest = max(block, key=abs)
    scale = np.float32(abs(largest)) / np.float32(127) if kind == "q8_0" else np.float32(largest) / np.float32(-8)
    inverse = np.float32(1) / scale if scale else np.float32(0)
    stored = float(np.float16(scale))
    found = []
    for x in block:
        ratio = float(np.float32(x) * inverse)
        whole = np.sign(ratio) * np.floor(abs(ratio) + 0.5) if kind == "q8_0" else min(15, int(ratio + 8.5)) - 8
        found.append(whole * stored)
    return np.array(found)


def naive(name: str, weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A parameter as an export stores it: GPT-2's inner matrices lie (in, out), and the blocks run along `in`."""
    if weight.ndim < 2:
        return weight
    turned = ".h." in name
    rows = (weight.T if turned else weight).detach().double().numpy()
    if rows.shape[1] % 32:
        out = rows.astype(np.float16).astype(np.float64)
    else:
        kind = kind if turned else "q8_0"
        out = np.stack(
            [np.concatenate([naive_block(part, kind) for part in np.split(row, len(row) // 32)]) for row in rows]
        )
    return torch.tensor(out.T if turned else out)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_the_masters_take_the_steps_of_a_straight_through_estimator_in_float64(kind: str) -> None:
    torch.manual_seed(0)
    shape = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_inner=40, n_positions=16, vocab_size=48, bos_token_id=0)
    model = GPT2LMHeadModel(shape).double().eval()
    masters = {name: one.detach().clone().requires_grad_() for name, one in model.named_parameters()}
    ids = torch.randint(48, (2, 12))
    rounding = Rounding(model, kind, 0.5)
    ours = torch.optim.AdamW(model.parameters(), lr=3e-3)
    theirs = torch.optim.AdamW(masters.values(), lr=3e-3)
    for step in range(6):
        rounding.reach(step / 6)
        assert bool(rounding.masters) == (step >= 3)
        # the reference: round(w) in the forward pass, the identity in the backward pass
        held = {
            name: one + (naive(name, one, kind) - one).detach() if step >= 3 else one for name, one in masters.items()
        }
        logits = torch.func.functional_call(model, held, (ids,)).logits
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        found = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        for loss, optimizer in ((found, ours), (expected, theirs)):
            optimizer.zero_grad()
            loss.backward()
        with rounding.undone():
            ours.step()
        theirs.step()
    for name, one in model.named_parameters():
        torch.testing.assert_close(
            rounding.masters.get(name, one.detach()), masters[name].detach(), rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(one.detach(), naive(name, masters[name], kind), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_rounding_twice_changes_nothing(kind: str) -> None:
    torch.manual_seed(0)
    for scale in (1e-9, 1e-5, 1e-3, 0.02, 1.0, 300.0):
        weight = scale * torch.randn(96, 64) * torch.rand(96, 1) ** 4
        weight[0], weight[1, :32], weight[2, :2] = 0, -scale, torch.tensor([5, -5]) * scale
        for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"):
            once = rounded(name, weight, kind)
            assert torch.equal(rounded(name, once, kind), once)
            assert not torch.equal(once, weight)


@pytest.mark.parametrize(("kind", "inner"), [("q8_0", 0), ("q4_0", 100)])
def test_the_saved_model_is_what_was_evaluated_and_what_an_export_holds(
    kind: str, inner: int, teacher: Path, data: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    student = make_model(
        tmp_path / "student", tokenizer_dir, seed=1, n_layer=2, **({"n_inner": inner} if inner else {})
    )
    base = {"teacher": str(teacher), "student": str(student), "data": str(data), **FAST}
    out = tmp_path / "m"
    result = distill(
        DistillConfig(**base, out=str(out), quantize=kind, quantize_from=0.5, eval_every=1, eval_blocks="all")
    )
    saved = load_file(out / "model.safetensors")
    masters = load_file(out / "checkpoints" / "step-6" / "masters.safetensors")
    for name, weight in saved.items():
        assert torch.equal(rounded(name, weight, kind), weight), name  # an export of the folder changes nothing
        if weight.ndim > 1:
            assert torch.equal(rounded(name, masters[name], kind), weight), name
            assert not torch.equal(masters[name], weight)
    checkpoint = load_file(out / "checkpoints" / "step-6" / "model.safetensors")
    assert all(torch.equal(checkpoint[f"student.{name}"], weight) for name, weight in saved.items())
    # the last evaluation of the run is that of the saved weights, by transformers itself
    model = GPT2LMHeadModel.from_pretrained(str(out)).eval()
    blocks = load_packed_dataset(str(data)).test
    ids = blocks.batch(range(len(blocks))).input_ids
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert result.eval is not None
    assert result.eval.loss == pytest.approx(float(loss), abs=1e-5)
    plain = tmp_path / "plain"
    distill(DistillConfig(**base, out=str(plain), eval_every=1, eval_blocks="all"))
    with_rounding, without = ([row["eval/loss"] for row in read_metrics(path)] for path in (out, plain))
    assert with_rounding[:2] == without[:2]  # not yet rounded
    assert all(a != b for a, b in zip(with_rounding[2:], without[2:], strict=True))
    assert f"| matrices rounded to | {kind} (after 50% of the steps) |" in (out / "README.md").read_text()


def test_rounding_only_after_the_last_step_is_plain_rounding(teacher: Path, data: Path, tmp_path: Path) -> None:
    for name, options in (("plain", {}), ("rounded", {"quantize": "q4_0", "quantize_from": 1})):
        pretrain(PretrainConfig(model=str(teacher), data=str(data), out=str(tmp_path / name), **FAST, **options))
    plain, found = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "rounded"))
    assert all(torch.equal(rounded(name, weight, "q4_0"), found[name]) for name, weight in plain.items())


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("muon", "bf16")])
@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_the_uninterrupted_run(
    optimizer: str, precision: str, step: int, teacher: Path, data: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    student = make_model(tmp_path / "student", tokenizer_dir, seed=1, n_layer=2, n_positions=64)  # twice the blocks'
    config = DistillConfig(
        teacher=str(teacher), student=str(student), data=str(data), out=str(tmp_path / "m"), optimizer=optimizer,
        precision=precision, quantize="q4_0", quantize_from=0.5, save_every=2, keep=9, eval_every=3, weight_decay=0.1, **FAST,
    )  # fmt: skip
    distill(config)
    shutil.copytree(tmp_path / "m", tmp_path / "whole")
    for path in (tmp_path / "m" / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (tmp_path / "m" / "model.safetensors").unlink()
    distill(config.model_copy(update={"resume": True}))
    for file in ("model.safetensors", *(f"checkpoints/step-6/{part}.safetensors" for part in ("optimizer", "masters"))):
        ours, whole = load_file(tmp_path / "m" / file), load_file(tmp_path / "whole" / file)
        assert ours.keys() == whole.keys()
        assert all(torch.equal(ours[name], whole[name]) for name in whole), file
    # positions beyond the blocks were never trained: their masters are as they were
    start = load_file(student / "model.safetensors")["transformer.wpe.weight"]
    masters = load_file(tmp_path / "m" / "checkpoints" / "step-6" / "masters.safetensors")
    assert torch.equal(masters["transformer.wpe.weight"][32:], start[32:])


def test_finetuning_rounds_frozen_matrices_too(teacher: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    finetune(
        FinetuneConfig(
            model=str(teacher), data=str(data), out=str(out), quantize="q8_0", freeze=["transformer.w?e.*"], **FAST
        )
    )
    before, after = load_file(teacher / "model.safetensors"), load_file(out / "model.safetensors")
    name = "transformer.wte.weight"
    assert torch.equal(after[name], rounded(name, before[name], "q8_0"))
    masters = load_file(out / "checkpoints" / "step-6" / "masters.safetensors")
    assert torch.equal(masters[name], before[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize_from": 0.3}, "--quantize-from 0.3 has no effect without --quantize"),
        ({"quantize": "q5_0"}, "--quantize"),
        ({"quantize": "q4_0", "quantize_from": 1.5}, "--quantize-from"),
        (
            {"quantize": "q4_0", "quantize_from": 0.5, "eval_every": 1, "early_stopping_patience": 2},
            "needs --quantize-from 0",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainConfig(shape="tinygpt2-4l-312", data="d", out="o", **options)


def test_early_stopping_keeps_the_best_of_the_rounded_weights(teacher: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    wild = FAST | {"max_steps": 12, "learning_rate": 0.3, "warmup_ratio": 0}
    result = pretrain(
        PretrainConfig(
            model=str(teacher),
            data=str(data),
            out=str(out),
            quantize="q4_0",
            quantize_from=0,
            eval_every=1,
            early_stopping_patience=2,
            **wild,
        )
    )
    assert result.steps < 12
    saved = load_file(out / "model.safetensors")
    assert all(torch.equal(rounded(name, weight, "q4_0"), weight) for name, weight in saved.items())
    state = json.loads(next((out / "checkpoints").glob("step-*/state.json")).read_text())["run"]
    best = load_file(out / "checkpoints" / f"step-{state['best']['step']}" / "model.safetensors")
    assert all(torch.equal(best[f"student.{name}"], weight) for name, weight in saved.items())
