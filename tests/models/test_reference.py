"""GPT-2 written out, beside the library's and beside activations that somebody else published."""

from __future__ import annotations

import ast
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from tinygpt2.models import reference

SHAPES = [
    {},
    {"activation_function": "gelu", "n_inner": 50},
    {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    {"activation_function": "relu", "n_layer": 1, "n_head": 1},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_librarys(tmp_path: Path, shape: dict) -> None:
    torch.manual_seed(1)
    base = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 24, "vocab_size": 90, "initializer_range": 0.2}
    theirs = GPT2LMHeadModel(GPT2Config(**{**base, **shape}, bos_token_id=0, eos_token_id=0)).eval()
    for parameter in theirs.parameters():  # biases and layer norms too
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(str(tmp_path))
    ours, theirs = reference.load(tmp_path).double(), theirs.double()
    ids = torch.randint(0, 90, (2, 24))
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
    found = ours(ids)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    for a, b in zip(found.states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    mask = torch.ones(2, 5, dtype=torch.long)
    text = theirs.generate(
        ids[:, :5], attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(ours.greedy(ids[:, :5], 10), text)


@pytest.mark.parametrize("name", sorted(set(ACT2FN) - {"prelu", "xielu"}))  # these two have weights
def test_every_activation(name: str) -> None:
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    torch.testing.assert_close(reference.ACTIVATIONS[name](x), ACT2FN[name](x), rtol=1e-8, atol=1e-9)


def test_it_imports_nothing_of_what_it_is_compared_with() -> None:
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {
        "__future__",
        "collections",
        "dataclasses",
        "json",
        "math",
        "pathlib",
        "typing",
        "torch",
        "safetensors",
    }


def test_what_it_cannot_be_is_refused(teacher: Path, tmp_path: Path) -> None:
    config = json.loads((teacher / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(teacher / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "activation_function": "prelu"}))
    with pytest.raises(ValueError, match="activation_function to prelu"):
        reference.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 5}))
    with pytest.raises(ValueError, match=r"h\.4"):
        reference.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    with pytest.raises(ValueError, match="more blocks than the 3"):
        reference.load(tmp_path)


def test_published_activations_of_a_model_that_sorts(shared_data: Path) -> None:
    """minGPT's own figures, to float32's rounding: embeddings, every block, the last layer norm, logits, probabilities."""
    model = reference.load(shared_data / "models" / "gpt-nano-sort")
    published = json.loads((shared_data / "models" / "gpt-nano-sort" / "reference.json").read_text())
    found = model(torch.tensor(published["idx"]))
    probabilities = torch.tensor(published["probs"])
    torch.testing.assert_close(found.logits, torch.tensor(published["lm_head"]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits.softmax(-1), probabilities, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.states[0], torch.tensor(published["x"]), rtol=1e-5, atol=1e-6)
    for index, key in ((1, "block0"), (2, "block1"), (3, "ln_f")):
        torch.testing.assert_close(found.states[index], torch.tensor(published[key]), rtol=1e-4, atol=1e-4)
    letters = torch.tensor(list(itertools.product(range(3), repeat=6)))
    assert torch.equal(model.greedy(letters, 6)[:, 6:], letters.sort(-1).values)
