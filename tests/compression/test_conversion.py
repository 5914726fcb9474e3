"""GPT-Neo, OPT and GPT-BigCode as GPT-2s: the same numbers in plain `transformers`, and clear words where that fails."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F  # noqa: N812
from transformers import AutoTokenizer, GPT2LMHeadModel

from tinygpt2 import (
    GenerateConfig,
    PplConfig,
    PregenerateConfig,
    TruncateStudentConfig,
    VerifyConfig,
    generate,
    ppl,
    pregenerate,
    truncate_student,
    verify,
)
from tinygpt2.compression import conversion
from tinygpt2.compression.architectures import NAMES, gpt2_settings
from tinygpt2.compression.calibration import calibration_batches
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.errors import ModelError

SHAPES: dict[str, dict[str, Any]] = {
    "GPTNeo": {
        "hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 32,
        "attention_types": [[["global"], 4]],
    },
    "OPT": {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 32,
        "ffn_dim": 128, "word_embed_proj_dim": 32, "pad_token_id": 1,
    },
    "GPTBigCode": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32},
}  # fmt: skip
LOCAL = {"attention_types": [[["global", "local"], 2]], "window_size": 8}


def save(kind: str, path: Path, tokenizer: Path | None = None, **options: Any) -> Path:
    """Save a model of another architecture; no weight of it is zero or one, so that none can be left out."""
    ids = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**{**SHAPES[kind], **ids, **options})
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith("weight") and ("ln_" in name or "norm" in name)
            parameter.normal_(1.0 if gain else 0.1, 0.2)
    model.save_pretrained(str(path))
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            if file.name.startswith("tokenizer"):
                shutil.copy(file, path)
    return path


def convert(teacher: Path, out: Path, **options: Any) -> Any:
    return truncate_student(TruncateStudentConfig(teacher=str(teacher), out=str(out), **(options or {"num_layers": 4})))


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits in float64, from plain `transformers`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float64).eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GPTNeo", {}),
        ("GPTNeo", {"tie_word_embeddings": False, "intermediate_size": 50, "layer_norm_epsilon": 0.01}),
        ("OPT", {}),
        ("OPT", {"tie_word_embeddings": False, "activation_function": "gelu", "ffn_dim": 50}),
        ("OPT", {"enable_bias": False, "layer_norm_elementwise_affine": False}),  # as Galactica
        ("GPTBigCode", {}),
        ("GPTBigCode", {"multi_query": False, "tie_word_embeddings": False, "scale_attn_weights": False}),
    ],
)
def test_uncut_it_computes_what_the_original_computes(kind: str, options: dict, tmp_path: Path) -> None:
    teacher = save(kind, tmp_path / "t", **options)
    result = convert(teacher, tmp_path / "s")
    ids = torch.randint(320, (3, 32), generator=torch.Generator().manual_seed(2))
    expected = logits(teacher, ids)
    assert expected.std() > 0.3
    assert (logits(tmp_path / "s", ids) - expected).abs().max() < 1e-5
    student = GPT2LMHeadModel.from_pretrained(str(tmp_path / "s"))
    assert type(student.config).model_type == "gpt2"
    assert student.config.tie_word_embeddings == options.get("tie_word_embeddings", True)
    assert (student.lm_head.weight is student.transformer.wte.weight) == student.config.tie_word_embeddings
    original = transformers.AutoModelForCausalLM.from_pretrained(str(teacher))
    assert result.teacher_parameters == sum(one.numel() for one in original.parameters())
    assert student.config.activation_function == original.config.activation_function
    assert result.conversion.logits < 1e-4 * result.conversion.largest_logit
    for named in (VerifyConfig(path=str(tmp_path / "s")), VerifyConfig(path=str(tmp_path / "s"), teacher=str(teacher))):
        checked = verify(named)
        assert checked.ok, checked.problems
        assert checked.reference is not None
        assert checked.reference.same_greedy_text
    assert len(checked.copies or {}) == len(dict(student.named_parameters()))


def test_settings_are_those_of_the_library() -> None:
    """A value that config.json leaves out is the one that `transformers` takes."""
    classes = {"gpt_neo": "GPTNeo", "opt": "OPT", "gpt_bigcode": "GPTBigCode"}
    assert classes.keys() == NAMES.keys()
    for kind, name in classes.items():
        whole = getattr(transformers, f"{name}Config")().to_dict()
        assert gpt2_settings({"model_type": kind}, "", ModelError) == gpt2_settings(whole, "", ModelError)
    other_names = {"model_type": "gpt_neo", "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 8}
    found = gpt2_settings(other_names, "", ModelError)
    assert (found["n_layer"], found["n_head"], found["n_embd"], found["n_inner"]) == (3, 2, 8, None)


def test_sizes_are_checked_before_weights_are_read(tmp_path: Path, cli: Callable[..., Any]) -> None:
    teacher = save("OPT", tmp_path / "t")
    done = cli("truncate-student", "--teacher", teacher, "--num-layers", 5, "--out", tmp_path / "s")
    assert done.code == 2
    assert "the teacher has only 4 layers" in done.err
    done = cli("truncate-student", "--teacher", teacher, "--n-head", 5, "--data", tmp_path, "--out", tmp_path / "s")
    assert done.code == 2
    assert "the teacher has only 4 heads" in done.err


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, "rotary positions, gated MLPs and RMSNorm"),
        ({"model_type": "gemma2"}, "rotary positions, gated MLPs and RMSNorm"),
        ({"model_type": "gpt_neox"}, "rotary positions, and attention beside the MLP"),
        ({"model_type": "phi"}, "rotary positions, and attention beside the MLP"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "openai-gpt"}, "norms after the blocks"),
        ({"model_type": "mamba"}, "no attention"),
        ({"model_type": "later"}, "not known to be GPT-2's"),
        (
            {"model_type": "opt", "hidden_size": 1024, "word_embed_proj_dim": 512, "do_layer_norm_before": False},
            "token embeddings of 512 dimensions before layers of 1024, and norms after the blocks",
        ),
        ({"model_type": "opt", "_remove_final_layer_norm": True}, "no norm after the last block"),
        ({"model_type": "gpt_bigcode", "add_cross_attention": True}, "cross-attention"),
    ],
)
@pytest.mark.parametrize("cut", [["--num-layers", "2"], ["--n-head", "1", "--data", "{}"], ["--n-positions", "8"]])
def test_other_architectures_are_refused_by_name(
    config: dict, words: str, cut: list, tmp_path: Path, cli: Callable[..., Any], data: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = [one.format(data) for one in cut]
    done = cli("truncate-student", "--teacher", tmp_path, *options, "--out", tmp_path / "s")
    assert done.code == 4
    assert f"a {config['model_type']} model cannot become those of a GPT-2: it has" in done.err
    assert words in " ".join(done.err.split())
    assert "a student of a preset" in done.err
    assert not (tmp_path / "s").exists()
    with pytest.raises(ModelError, match="cannot become"):  # the same without the checks of the command line
        convert(tmp_path, tmp_path / "s")


def test_quantized_models_and_missing_weights_are_refused(tmp_path: Path) -> None:
    teacher = save("OPT", tmp_path / "t")
    values = json.loads((teacher / "config.json").read_text())
    for name, change, words in (
        ("quantized", {"quantization_config": {"bits": 4}}, "quantized"),
        ("smaller", {"num_hidden_layers": 2}, "config.json says that it has 2 layers"),
        ("larger", {"num_hidden_layers": 5}, "missing weights: model.decoder.layers.4"),
    ):
        folder = Path(shutil.copytree(teacher, tmp_path / name))
        (folder / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(ModelError, match=words):
            convert(folder, tmp_path / "s", num_layers=2)
    (teacher / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        convert(teacher, tmp_path / "s")
    with pytest.raises(ModelError, match=r"teacher .* has no config\.json"):
        convert(tmp_path, tmp_path / "s")


def test_a_conversion_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example because a later version of the library computes the model in another way."""
    teacher = save("GPTNeo", tmp_path / "t")
    ours = conversion._NAMES["gpt_neo"]
    halved = replace(ours, attention=lambda *given: tuple(part / 2 for part in ours.attention(*given)))
    monkeypatch.setitem(conversion._NAMES, "gpt_neo", halved)
    with pytest.raises(ModelError, match="computes other logits"):
        convert(teacher, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_local_attention_is_named_and_measured(
    tmp_path: Path, tokenizer_dir: Path, data: Path, cli: Callable[..., Any]
) -> None:
    teacher = save("GPTNeo", tmp_path / "t", tokenizer_dir, **LOCAL)
    run = ("truncate-student", "--teacher", teacher, "--json")
    done = cli(*run, "--num-layers", 4, "--data", data, "--out", tmp_path / "s")
    heard = " ".join(done.err.split())
    assert "in 2 of its 4 layers, attention reaches only 8 tokens back" in heard
    found = done.json["conversion"]
    ids = torch.cat(calibration_batches(load_packed_dataset(str(data)).test, 64, torch.device("cpu"))).long()
    losses = {
        path: float(F.cross_entropy(logits(path, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        for path in (teacher, tmp_path / "s")
    }
    assert found["original_loss"] == pytest.approx(losses[teacher], rel=1e-5)
    assert found["loss"] == pytest.approx(losses[tmp_path / "s"], rel=1e-5)
    assert abs(found["loss"] - found["original_loss"]) > 1e-3
    assert done.json["perplexity"]["teacher"] == pytest.approx(math.exp(losses[teacher]), rel=1e-4)
    assert f"on {len(ids)} blocks of 32 tokens of --data the GPT-Neo has a loss of {losses[teacher]:.4f}" in heard
    assert f"nats per token, on {len(ids)} held-out blocks" in (tmp_path / "s" / "README.md").read_text()
    assert (logits(teacher, ids[:, :8]) - logits(tmp_path / "s", ids[:, :8])).abs().max() < 1e-5
    assert (logits(teacher, ids)[:, 8:] - logits(tmp_path / "s", ids)[:, 8:]).abs().max() > 1e-3
    # where nothing is lost, or nothing can be measured, that is said
    done = cli(*run, "--n-positions", 8, "--data", data, "--out", tmp_path / "short")
    assert "the student has 8 positions, so this makes no difference" in " ".join(done.err.split())
    assert "loss" not in done.json["conversion"]
    assert (logits(teacher, ids[:, :8]) - logits(tmp_path / "short", ids[:, :8])).abs().max() < 1e-5
    done = cli(*run, "--num-layers", 4, "--out", tmp_path / "unmeasured")
    assert "give --data; with --n-positions 8 it costs nothing" in " ".join(done.err.split())
    wide = save("GPTNeo", tmp_path / "wide", tokenizer_dir, max_position_embeddings=64, **LOCAL | {"window_size": 32})
    done = cli("truncate-student", "--teacher", wide, "--num-layers", 4, "--data", data, "--out", tmp_path / "w")
    assert "the blocks of --data have 32 tokens, so this makes no difference" in " ".join(done.err.split())


@pytest.mark.parametrize("kind", ["GPTNeo", "OPT"])
def test_a_converted_teacher_is_cut_like_a_gpt2(kind: str, tmp_path: Path, tokenizer_dir: Path, data: Path) -> None:
    """The cut of a teacher is the cut of its conversion, in every tensor."""
    teacher = save(kind, tmp_path / "t", tokenizer_dir)
    convert(teacher, tmp_path / "whole")
    cuts = [
        {"layers": "0,2", "n_positions": 16},
        {"num_layers": 2, "strategy": "importance", "n_head": 2, "n_inner": 40, "refit": True},
    ]
    for number, cut in enumerate(cuts):
        students = []
        for source in (teacher, tmp_path / "whole"):
            out = tmp_path / f"{source.name}-{number}"
            result = convert(source, out, data=str(data), calibration_sequences=8, **cut)
            students.append((GPT2LMHeadModel.from_pretrained(str(out)), result))
            assert verify(VerifyConfig(path=str(out))).ok
        (one, ours), (other, theirs) = students
        assert ours.layers == theirs.layers
        assert ours.perplexity == theirs.perplexity
        assert one.config.n_layer == 2
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_the_saved_folder_is_always_the_same(tmp_path: Path, tokenizer_dir: Path) -> None:
    teacher = save("OPT", tmp_path / "t", tokenizer_dir)
    for name in ("a", "b"):
        convert(teacher, tmp_path / name / "s")
    files = sorted(file.name for file in (tmp_path / "a" / "s").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(files)
    for file in set(files) - {"config.yaml", "README.md"}:  # these name the directory
        assert (tmp_path / "a" / "s" / file).read_bytes() == (tmp_path / "b" / "s" / file).read_bytes(), file


@pytest.fixture
def opt(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """An OPT with its tokenizer: GPT-2's pieces in another order, and a start token before every text."""
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    pieces = [piece for piece in content["model"]["vocab"] if piece != "<|endoftext|>"][::-1]
    vocabulary = {piece: index for index, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces])}
    folder = save("OPT", tmp_path / "opt", vocab_size=328, bos_token_id=2, eos_token_id=2)  # padded rows, as OPT has
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [one if isinstance(one, str) else " ".join(one) for one in content["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def test_the_student_keeps_its_teachers_tokenizer(opt: Path, corpus: Path, tmp_path: Path) -> None:
    convert(opt, tmp_path / "s")
    text = (corpus / "01.txt").read_text()[:200]
    before, after = (AutoTokenizer.from_pretrained(str(path)) for path in (opt, tmp_path / "s"))
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.decode(after(text)["input_ids"], skip_special_tokens=True) == text
    student = GPT2LMHeadModel.from_pretrained(str(tmp_path / "s"))
    for config in (student.config, student.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 2, 1)
    assert verify(VerifyConfig(path=str(tmp_path / "s"))).ok
    (made,) = generate(GenerateConfig(model=[str(tmp_path / "s")], prompt="the cat", max_new_tokens=5)).results
    ids = torch.tensor([before("the cat")["input_ids"]])
    original = transformers.AutoModelForCausalLM.from_pretrained(str(opt))
    expected = original.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
    assert made.tokens == len(expected[: expected.index(2)] if 2 in expected else expected)
    # a dataset ends its documents with OPT's own end-of-text, and perplexity is the original's
    packed = PregenerateConfig(source=[str(corpus)], tokenizer=str(opt), out=str(tmp_path / "d"), sequence_length=32)
    pregenerate(packed)
    data = load_packed_dataset(str(tmp_path / "d"))
    assert data.manifest["eos_token_id"] == 2
    rows = torch.cat(calibration_batches(data.test, 10**6, torch.device("cpu"))).long()
    (row,) = ppl(PplConfig(model=[str(tmp_path / "s")], task=[str(tmp_path / "d")])).results
    loss = F.cross_entropy(logits(opt, rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert row.loss == pytest.approx(float(loss), rel=1e-5)
