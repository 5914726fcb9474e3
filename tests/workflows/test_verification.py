"""`verify` on models: each planted fault is found and named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model
from tinygpt2 import PretrainConfig, TruncateStudentConfig, VerifyConfig, pretrain, truncate_student, verify
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.workflows.verification import VerifyResult


def check(path: Path, teacher: Path | None = None) -> VerifyResult:
    return verify(VerifyConfig(path=str(path), teacher=None if teacher is None else str(teacher)))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object], *, forget: bool = False) -> Path:
    """Change the weights of a model directory; `forget` their checksums."""
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors", {"format": "pt"}
    )
    if forget:
        (path / "SHA256SUMS").unlink()
    return path


def configure(path: Path, **values: object) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))
    return path


@pytest.fixture
def model(teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "copy"))


def swap(a: str, b: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda w: w.update({a: w[b].clone(), b: w[a].clone()})


def test_a_sound_model_agrees_with_the_reference(teacher: Path) -> None:
    result = check(teacher)
    assert result.ok
    assert result.problems == result.notes == []
    assert result.reference is not None
    assert result.reference.logits < 1e-4 * result.reference.largest_logit
    assert 0 < result.reference.states < 1e-4 * result.reference.largest_state
    assert result.reference.same_greedy_text
    assert result.reference.greedy_tokens == 16


def test_a_number_that_is_none(model: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.bias"
    rewrite(model, lambda w: w[name].fill_(torch.nan), forget=True)
    result = check(model)
    assert [problem.splitlines()[0] for problem in result.problems] == [
        f"model {model}: NaN or infinite values in {name}"
    ]
    assert "there is no SHA256SUMS file" in result.notes[0]


def test_swapped_tensors(model: Path, teacher: Path, tmp_path: Path) -> None:
    a, b = "transformer.h.0.mlp.c_fc.weight", "transformer.h.2.mlp.c_fc.weight"
    rewrite(model, swap(a, b))
    assert any("its SHA-256 differs from the one in SHA256SUMS" in problem for problem in check(model).problems)
    (model / "SHA256SUMS").unlink()
    assert check(model).ok  # nothing else can show it
    result = check(model, teacher)
    assert result.copies[a] == b
    assert len([problem for problem in result.problems if "does not belong there" in problem]) == 2
    truncate_student(TruncateStudentConfig(teacher=str(teacher), layers="0,3", out=str(tmp_path / "cut")))
    cut = check(tmp_path / "cut", teacher)
    assert cut.ok
    assert cut.copies["transformer.h.1.attn.c_attn.weight"] == "transformer.h.3.attn.c_attn.weight"
    assert len(cut.copies) == 2 + 2 * 12 + 2  # embeddings, blocks, last layer norm
    for name in list(load_file(tmp_path / "cut" / "model.safetensors")):
        if ".h.0." in name:
            rewrite(tmp_path / "cut", swap(name, name.replace(".h.0.", ".h.1.")))
    assert any("which are not in order" in problem for problem in check(tmp_path / "cut", teacher).problems)


def test_an_untied_head_that_should_be_tied(model: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    untied = make_model(tmp_path / "untied", tokenizer_dir, tie_word_embeddings=False)
    assert check(untied).ok
    configure(untied, tie_word_embeddings=True)
    result = check(untied)  # transformers uses both matrices
    assert result.ok
    assert any("lm_head.weight differs from the embeddings" in note for note in result.notes)
    assert result.reference.logits < 1e-4 * result.reference.largest_logit
    rewrite(model, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}), forget=True)
    assert check(model).ok


@pytest.mark.parametrize(("size", "ok"), [(300, False), (384, True), (448, True), (601, True)])
def test_a_tokenizer_of_another_size(tokenizer_dir: Path, tmp_path: Path, size: int, ok: bool) -> None:
    result = check(make_model(tmp_path / "m", tokenizer_dir, vocab_size=size))
    assert result.ok == ok
    (message,) = result.notes if ok else result.problems
    assert f"the model has {'' if ok else 'only '}{size} " in message


def test_a_truncated_file(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert any("cannot load model" in problem for problem in check(model).problems)


def test_a_training_checkpoint_is_checked_by_its_own_sums(teacher: Path, data: Path, tmp_path: Path) -> None:
    base = {"model": str(teacher), "data": str(data), "out": str(tmp_path / "m"), "max_steps": 1}
    pretrain(PretrainConfig(**base))
    step = tmp_path / "m" / "checkpoints" / "step-1"
    assert (check(step).problems, check(step).notes) == ([], [])
    raw = bytearray((step / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (step / "model.safetensors").write_bytes(raw)
    assert any("model.safetensors is damaged" in problem for problem in check(step).problems)


@pytest.mark.parametrize(("layers", "message"), [(3, "unexpected"), (5, "missing")])
def test_another_number_of_layers(model: Path, layers: int, message: str) -> None:
    configure(model, n_layer=layers)
    assert any(message in problem for problem in check(model).problems)


def test_ends_beyond_the_vocabulary(model: Path) -> None:
    configure(model, eos_token_id=50256)
    (model / "generation_config.json").write_text('{"eos_token_id": [0, 320]}')
    result = check(model)
    assert result.ok
    assert [note.split(" is ")[0] for note in result.notes] == [
        "config.json: eos_token_id 50256", "generation_config.json: eos_token_id 320",
    ]  # fmt: skip
    (model / "generation_config.json").write_text("{")
    assert any("generation_config.json:" in problem for problem in check(model).problems)


def test_what_the_reference_cannot_be_is_a_note(model: Path) -> None:
    configure(model, activation_function="prelu")
    rewrite(
        model, lambda w: w.update({f"transformer.h.{i}.mlp.act.weight": torch.ones(1) for i in range(4)}), forget=True
    )
    result = check(model)
    assert result.ok
    assert "not compared with the reference" in result.notes[-1]


def test_forms_that_the_reference_knows(tokenizer_dir: Path, tmp_path: Path) -> None:
    shape = {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "activation_function": "quick_gelu"}
    result = check(make_model(tmp_path / "m", tokenizer_dir, **shape))
    assert result.ok
    assert result.reference.logits < 1e-4 * result.reference.largest_logit


def test_pickled_weights_are_compared_with_the_reference(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    (model / "SHA256SUMS").unlink()
    assert any("--allow-pickle" in problem for problem in check(model).problems)
    result = verify(VerifyConfig(path=str(model), allow_pickle=True))
    assert result.ok
    assert result.reference.same_greedy_text
    assert len(result.notes) == 1


def test_tensors_that_gpt2_does_not_use_are_a_note(model: Path) -> None:
    rewrite(model, lambda w: w.update({"score.weight": torch.ones(2, 32)}), forget=True)
    result = check(model)
    assert result.ok
    assert "the files hold tensors that GPT-2 does not use: score.weight" in result.notes


def test_a_model_on_the_hub(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny-gpt2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(teacher, repository / "snapshots" / ("0" * 40))
    assert verify(VerifyConfig(path="someone/tiny-gpt2")).ok
    with pytest.raises(ModelError, match="someone/else"):
        verify(VerifyConfig(path="someone/else"))


def test_the_command_prints_it(cli: Callable, teacher: Path, data: Path) -> None:
    found = cli("verify", teacher, "--teacher", teacher, "--json").json
    assert found["reference"]["same_greedy_text"] is True
    assert found["copies"]["transformer.wte.weight"] == "transformer.wte.weight"
    text = cli("verify", teacher, "--teacher", teacher).out
    assert re.search(r"greedy texts of \d+ tokens are the same", text)
    assert "block 3 is a copy of the teacher's block 3" in text
    with pytest.raises(ConfigError, match="is a dataset"):
        check(data, teacher)


def test_a_model_beside_its_data_is_a_model(model: Path, data: Path) -> None:
    shutil.copytree(data, model / "data")
    result = check(model)
    assert (result.kind, result.ok) == ("model", True)
    rewrite(model, lambda w: w["transformer.h.0.ln_1.weight"].fill_(1e38), forget=True)
    assert any("differ from the reference" in problem for problem in check(model).problems)
    (model / "tokenizer.json").write_text("{")
    assert len(check(model).problems) > 1


def test_a_published_model_passes(shared_data: Path) -> None:
    sorting = check(shared_data / "models" / "gpt-nano-sort")
    assert sorting.ok
    assert any("does not contain a tokenizer" in note for note in sorting.notes)
    assert check(shared_data / "models" / "novels-6x256").ok
