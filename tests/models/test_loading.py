from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2LMHeadModel

from tinygpt2 import VerifyConfig, verify
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.models.configuration import read_model_config
from tinygpt2.models.loading import load_model, random_model
from tinygpt2.models.parameters import freeze, set_dropout


def ids(count: int = 2, length: int = 32) -> torch.Tensor:
    return torch.randint(0, 320, (count, length), generator=torch.Generator().manual_seed(0))


def test_loaded_models_compute_what_plain_transformers_computes(teacher: Path) -> None:
    ours, _ = load_model(str(teacher))
    plain = GPT2LMHeadModel.from_pretrained(str(teacher)).eval()
    torch.testing.assert_close(ours(ids()).logits, plain(ids()).logits, rtol=1e-5, atol=1e-5)
    assert ours.config.activation_function == plain.config.activation_function == "gelu_new"


def test_a_saved_model_opens_where_this_package_is_not(teacher: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["tinygpt2"] = None
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained({str(teacher)!r}).eval()
assert len(AutoTokenizer.from_pretrained({str(teacher)!r})) == 320
ids = torch.arange(64).view(2, 32)
torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    ours, _ = load_model(str(teacher))
    theirs = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(ours(torch.arange(64).view(2, 32)).logits, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", ["weights", "config", "pickle", "type", "missing", "shape", "truncated", "file"])
def test_unusable_models_are_refused(teacher: Path, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "m"
    shutil.copytree(teacher, path)
    weights = path / "model.safetensors"
    config = json.loads((path / "config.json").read_text())
    expected = {
        "weights": "no weights", "config": "no config.json", "pickle": "pickled weights only", "type": "not gpt2",
        "missing": "missing weights", "shape": "h.3", "truncated": "cannot load", "file": "is a file",
    }[fault]  # fmt: skip
    if fault == "weights":
        weights.unlink()
    elif fault == "config":
        (path / "config.json").unlink()
    elif fault == "pickle":
        torch.save(load_model(str(teacher))[0].state_dict(), path / "pytorch_model.bin")
        weights.unlink()
    elif fault == "type":
        (path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    elif fault == "missing":
        (path / "config.json").write_text(json.dumps({**config, "n_layer": 5}))
    elif fault == "shape":
        (path / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=expected):
        load_model(str(weights if fault == "file" else path))
    if fault != "file":
        assert verify(VerifyConfig(path=str(path))).problems


def test_pickled_weights_load_when_trusted(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    plain = GPT2LMHeadModel.from_pretrained(str(teacher))
    torch.save(plain.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    model, _ = load_model(str(tmp_path / "m"), allow_pickle=True)
    torch.testing.assert_close(model(ids()).logits, plain(ids()).logits, rtol=1e-5, atol=1e-5)


def test_a_hub_id_and_its_revisions_come_from_the_cache(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="unset HF_HUB_OFFLINE"):
        load_model("someone/tiny-gpt2")
    repo = tmp_path / "models--someone--tiny-gpt2"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(teacher, repo / "snapshots" / ("0" * 40))
    (repo / "refs" / "v2").write_text("0" * 40)
    for name in ("someone/tiny-gpt2@v2", f"someone/tiny-gpt2@{'0' * 40}", "someone/tiny-gpt2"):
        cached, directory = load_model(name)
    assert directory.parent.name == "snapshots"
    torch.testing.assert_close(cached(ids()).logits, load_model(str(teacher))[0](ids()).logits)
    assert len(load_tokenizer("someone/tiny-gpt2")) == len(load_tokenizer("someone/tiny-gpt2@v2")) == 320
    with pytest.raises(ModelError, match="someone/tiny-gpt2@v3"):
        load_tokenizer("someone/tiny-gpt2@v3")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        load_model(name)


def test_shapes_from_files(tokenizer_dir: Path, teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert read_model_config(str(teacher / "config.json"), tokenizer).n_layer == 4
    file = tmp_path / "shape.yaml"

    def shape(**values: object) -> object:
        file.write_text(yaml.safe_dump(values))
        return read_model_config(str(file), tokenizer)

    assert shape(n_layer=2, n_embd=8, n_head=2).vocab_size == 320
    for values, part in (
        ({"vocab_size": 100}, "vocab_size 100"),
        ({"n_embd": 10, "n_head": 3}, "n_embd 10 is not a multiple of n_head 3"),
        ({"n_layers": 3}, "unknown keys: n_layers"),
        ({"model_type": "bert"}, "not gpt2"),
    ):
        with pytest.raises(ConfigError, match=part):
            shape(**values)
    with pytest.raises(ConfigError, match="one of: distilgpt2, gpt2, gpt2-large"):
        read_model_config("gpt3", tokenizer)


def test_random_weights_follow_the_seed_alone(tokenizer_dir: Path) -> None:
    config = read_model_config("tinygpt2-4l-312", load_tokenizer(str(tokenizer_dir)))
    config.n_layer = 1
    state = torch.random.get_rng_state()
    a, b, c = (random_model(config, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_freeze_and_dropout(teacher: Path) -> None:
    model, _ = load_model(str(teacher))
    freeze(model, ["transformer.w?e.*", "*.h.0.*"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.bias"} <= frozen
    assert not any(".h.1." in name for name in frozen)
    with pytest.raises(ConfigError, match="matches no parameter"):
        freeze(model, ["nothing.*"])
    set_dropout(model, 0.3)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    assert model.config.resid_pdrop == 0.1
