"""Forms of weight files: what `transformers` opens is opened with the same numbers, in every way of loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.errors import ModelError
from tinygpt2.models import reference
from tinygpt2.models.loading import load_model
from tinygpt2.utils import progress

Weights = dict[str, torch.Tensor]
IDS = torch.arange(40).view(2, 20)


def saved(path: Path, **shape: object) -> Path:
    torch.manual_seed(0)
    base = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 24, "vocab_size": 50, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(**{**base, **shape}, bos_token_id=0, eos_token_id=0)).save_pretrained(path)
    return path


def rewritten(path: Path, change: Callable[[Weights], object]) -> Path:
    weights = load_file(path / "model.safetensors")
    changed = change(weights)
    weights = changed if isinstance(changed, dict) else weights
    tensors = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def configured(path: Path, **values: object) -> Path:
    config = {**json.loads((path / "config.json").read_text()), **values}
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return path


def sharded(path: Path) -> Path:
    model = GPT2LMHeadModel.from_pretrained(saved(path))
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="10KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    return path


def masks(weights: Weights) -> None:
    for block in range(2):
        weights[f"transformer.h.{block}.attn.bias"] = torch.ones(1, 1, 24, 24)
        weights[f"transformer.h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
        weights[f"transformer.h.{block}.crossattention.masked_bias"] = torch.tensor(-1e4)


WTE = "transformer.wte.weight"
SOUND: dict[str, Callable[[Path], Path]] = {
    "plain": saved,
    "old masks": lambda path: rewritten(saved(path), masks),
    "no prefix": lambda path: rewritten(
        saved(path),
        lambda w: {k.removeprefix("transformer."): v for k, v in w.items()} | {"h.0.attn.bias": torch.ones(1)},
    ),
    "other heads": lambda path: rewritten(
        saved(path),
        lambda w: w.update({"score.weight": torch.ones(2, 16), "v_head.summary.bias": torch.ones(1),
                            "multiple_choice_head.summary.weight": torch.ones(1, 16)}),
    ),
    "cross-attention": lambda path: saved(path, add_cross_attention=True),
    "cross-attention left over": lambda path: configured(
        saved(path, add_cross_attention=True), add_cross_attention=False
    ),
    "untied": lambda path: saved(path, tie_word_embeddings=False),
    "stored head": lambda path: rewritten(saved(path), lambda w: w.update({"lm_head.weight": w[WTE]})),
    "untied, but config.json ties": lambda path: configured(
        saved(path, tie_word_embeddings=False), tie_word_embeddings=True
    ),
    "head instead of embeddings": lambda path: rewritten(
        saved(path), lambda w: w.update({"lm_head.weight": w.pop(WTE)})
    ),
    "fp16": lambda path: rewritten(saved(path), lambda w: {name: tensor.half() for name, tensor in w.items()}),
    "bf16": lambda path: rewritten(saved(path), lambda w: {name: tensor.bfloat16() for name, tensor in w.items()}),
    "shards": sharded,
    "no model_type": lambda path: configured(saved(path), model_type="absent"),
    "other names": lambda path: configured(
        saved(path), n_embd="absent", n_layer="absent", hidden_size=16, num_hidden_layers=2
    ),
    "old keys": lambda path: configured(
        saved(path), n_ctx=7, torch_dtype="float16", architectures=["GPT2DoubleHeadsModel"], temperature=0.3, foo=[1],
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}, gradient_checkpointing=False,
        transformers_version="4.2.1", id2label={"0": "A"}, output_attentions=True, max_length=9,
    ),
    "activation with weights": lambda path: saved(path, activation_function="prelu"),
    "end beyond the vocabulary": lambda path: configured(saved(path), eos_token_id=50256, pad_token_id=50257),
}  # fmt: skip


@pytest.mark.parametrize("form", SOUND)
def test_what_transformers_opens_has_the_same_numbers(tmp_path: Path, form: str) -> None:
    path = SOUND[form](tmp_path / "m")
    theirs = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
    ours, _ = load_model(str(path))
    hollow, _ = load_model(str(path), hollow=True)
    with torch.no_grad():
        expected = theirs(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert {name: tensor.shape for name, tensor in hollow.state_dict().items()} == {
        name: tensor.shape for name, tensor in ours.state_dict().items()
    }
    if form != "activation with weights":
        torch.testing.assert_close(reference.load(path)(IDS).logits, expected, rtol=1e-4, atol=1e-4)


SHAPE = r"should have shape \[16\] \(from config.json\), but the weight files have \[17\]"
FAULTY: dict[str, tuple[Callable[[Path], Path], str, bool]] = {
    "shape": (
        lambda path: rewritten(saved(path), lambda w: w.update({"transformer.ln_f.bias": torch.ones(17)})),
        f"transformer.ln_f.bias {SHAPE}",
        True,
    ),
    "shape of the head": (
        lambda path: rewritten(saved(path), lambda w: w.update({"lm_head.weight": torch.ones(51, 16)})),
        "lm_head.weight should have shape",
        True,
    ),
    "missing": (
        lambda path: rewritten(saved(path), lambda w: {k: v for k, v in w.items() if "ln_f" not in k}),
        "missing weights: transformer.ln_f.weight, transformer.ln_f.bias",
        True,
    ),
    "neither embeddings nor head": (
        lambda path: rewritten(saved(path), lambda w: {k: v for k, v in w.items() if k != WTE}),
        "missing weights: transformer.wte.weight",
        True,
    ),
    "untied head": (lambda path: configured(saved(path), tie_word_embeddings=False), "missing weights: lm_head", True),
    "fewer blocks": (lambda path: configured(saved(path), n_layer=3), r"missing weights: transformer\.h\.2\..* 9 more", True),
    "more blocks": (lambda path: configured(saved(path), n_layer=1), r"weights of block 1 .* says n_layer 1", True),
    "other names": (
        lambda path: rewritten(saved(path), lambda w: {f"module.{k}": v for k, v in w.items()}),
        r"the names in its files are others: module.transformer",
        True,
    ),
    "whole numbers": (
        lambda path: rewritten(saved(path), lambda w: w.update({WTE: w[WTE].to(torch.int8)})), "torch.int8", False,
    ),
    "quantized": (
        lambda path: configured(saved(path), quantization_config={"load_in_8bit": True}), "is quantized", False,
    ),
    "a lost shard": (
        lambda path: [next(sharded(path).glob("model-0*")).unlink(), path][1], "lists files that are missing", False,
    ),
    "shards without an index": (
        lambda path: [(sharded(path) / "model.safetensors.index.json").unlink(), path][1], "index.json", False,
    ),
    "another index": (
        lambda path: [(sharded(path) / "model.safetensors.index.json").write_text("[]"), path][1], "does not list", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTY)
def test_weights_that_do_not_fit_are_refused_with_and_without_values(tmp_path: Path, fault: str) -> None:
    make, message, refused_by_reference = FAULTY[fault]
    path = make(tmp_path / "m")
    for hollow in (True, False):
        with pytest.raises(ModelError, match=message):
            load_model(str(path), hollow=hollow)
    if refused_by_reference:
        with pytest.raises(ValueError, match=r"."):
            reference.load(path)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path / "m"), lambda w: w["transformer.ln_f.weight"].fill_(torch.nan) is None)
    with pytest.raises(ModelError, match=r"NaN or infinite values in transformer\.ln_f\.weight"):
        load_model(str(path))
    large = rewritten(saved(tmp_path / "large"), lambda w: w["transformer.ln_f.weight"].fill_(3e38) is None)
    load_model(str(large))  # the sum is infinite, but no value is


def test_one_line_names_the_tensors_that_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_mode", "plain")
    path = rewritten(saved(tmp_path / "m"), masks)
    capfd.readouterr()
    load_model(str(path))
    lines = [line for line in capfd.readouterr().err.splitlines() if "GPT-2 does not use" in line]
    assert len(lines) == 1
    assert "transformer.h.0.attn.bias" in lines[0]
    assert lines[0].endswith("and 3 more")


def test_pickles_of_both_kinds_load_when_trusted(tmp_path: Path) -> None:
    path = saved(tmp_path / "m")
    expected = load_model(str(path))[0](IDS).logits
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    for zipped in (True, False):
        torch.save(weights, path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        for hollow in (True, False):
            with pytest.raises(ModelError, match=r"pickled weights only.*\n.*--allow-pickle"):
                load_model(str(path), hollow=hollow)
            model, _ = load_model(str(path), hollow=hollow, allow_pickle=True)
        torch.testing.assert_close(model(IDS).logits, expected)
    torch.save({**weights, "transformer.ln_f.bias": torch.ones(17)}, path / "pytorch_model.bin")
    for hollow in (True, False):
        with pytest.raises(ModelError, match=SHAPE):
            load_model(str(path), hollow=hollow, allow_pickle=True)


def test_only_weights_of_another_library(tmp_path: Path) -> None:
    path = saved(tmp_path / "m")
    (path / "model.safetensors").rename(path / "tf_model.h5")
    with pytest.raises(ModelError, match=r"there is only tf_model\.h5"):
        load_model(str(path), allow_pickle=True)


def test_a_training_checkpoint_is_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "out" / "m")
    expected = load_model(str(path))[0](IDS).logits
    rewritten(path, lambda w: {f"student.{k}": v for k, v in w.items()} | {"map.weight": torch.ones(2)})
    (path / "state.json").write_text('{"run": {"step": 7}}')
    monkeypatch.setattr(progress, "_mode", "plain")
    model, _ = load_model(str(path))
    assert "from step 7" in capfd.readouterr().err
    torch.testing.assert_close(model(IDS).logits, expected)
    torch.testing.assert_close(reference.load(path)(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    run = tmp_path / "run"
    shutil.copytree(path, run / "checkpoints" / "step-7")
    with pytest.raises(ModelError, match=r"no config\.json\nhint: .*step-7"):
        load_model(str(run))
