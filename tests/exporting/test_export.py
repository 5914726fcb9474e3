"""Exported models: every tensor, the engines' logits and texts, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

import tinygpt2
from tests.conftest import make_model
from tinygpt2 import PregenerateConfig, TrainTokenizerConfig, pregenerate, train_tokenizer
from tinygpt2.models.quantization import round_rows, rounded, stored_type

SHAPES = {
    "tied": {"n_embd": 64, "n_head": 4},
    "odd inner width": {"n_embd": 64, "n_head": 4, "n_inner": 50},
    "narrow": {"n_embd": 36, "n_head": 3, "n_inner": 96},
    "untied": {"n_embd": 64, "n_head": 4, "tie_word_embeddings": False},
    "other scales": {"n_embd": 64, "n_head": 4, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
}


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest, tokenizer_dir: Path, tmp_path: Path) -> Path:
    return make_model(tmp_path / "m", tokenizer_dir, **SHAPES[request.param])


def exported(model: Path, to: str, kind: str, out: Path, text: Path, **options: object) -> tinygpt2.ExportResult:
    config = tinygpt2.ExportConfig(model=str(model), to=to, type=kind, out=str(out), data=str(text), **options)
    return tinygpt2.export(config)


@pytest.fixture
def text(corpus: Path) -> Path:
    return corpus / "00.txt"


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "f16", "bf16"])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-6, 1e3])
def test_rounding_is_bit_equal_to_the_formats_own(kind: str, size: float) -> None:
    gguf = pytest.importorskip("gguf")
    x = (np.random.default_rng(0).standard_normal((40, 96)) * size).astype(np.float32)
    x[0, :32], x[1, 0] = 0, -0.0
    number = gguf.GGMLQuantizationType[kind.upper()]
    expected = gguf.quants.dequantize(gguf.quants.quantize(x, number), number)
    assert np.array_equal(round_rows(torch.from_numpy(x), kind).numpy(), expected)


@pytest.mark.parametrize(
    ("name", "shape", "wanted", "kind"),
    [
        ("transformer.wte.weight", (320, 64), "q4_0", "q8_0"),
        ("lm_head.weight", (320, 64), "q4_0", "q8_0"),
        ("transformer.wte.weight", (320, 36), "q4_0", "f16"),
        ("transformer.h.0.mlp.c_proj.weight", (50, 64), "q4_0", "f16"),  # its rows are 50 long
        ("transformer.h.0.mlp.c_fc.weight", (64, 50), "q4_0", "q4_0"),
        ("transformer.h.0.mlp.c_fc.bias", (64,), "q8_0", "f32"),
    ],
)
def test_each_matrix_gets_its_type(name: str, shape: tuple[int, ...], wanted: str, kind: str) -> None:
    assert stored_type(name, shape, wanted) == kind
    x = torch.randn(shape)
    assert rounded(name, x, wanted).shape == x.shape


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
def test_llama_cpp_computes_what_the_file_holds(model: Path, kind: str, tmp_path: Path, text: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    found = exported(model, "gguf", kind, tmp_path / "x.gguf", text).checked
    assert found.engine == "llama.cpp"
    assert found.tokens_equal
    assert found.tokens_per_second > 0
    if kind == "f32":
        assert found.kl < 1e-4
        assert found.greedy_equal
        assert found.loss == pytest.approx(found.float_loss, abs=1e-2)


def test_without_llama_cpp_torch_runs_the_files_weights(
    model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr("tinygpt2.exporting.reading.llama_available", lambda: False)
    found = exported(model, "gguf", "f32", tmp_path / "x.gguf", text).checked
    assert "torch" in found.engine or "transformers" in found.engine
    assert found.tokens_per_second is None
    assert found.greedy_equal
    assert found.logits < 1e-3


def test_onnxruntime_computes_what_the_model_computes(model: Path, tmp_path: Path, text: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = exported(model, "onnx", "f32", tmp_path / "x", text).checked
    assert found.logits < 1e-3
    assert found.greedy_equal
    assert (tmp_path / "x" / "onnx" / "model.onnx").is_file()
    # transformers.js would remove spaces before punctuation
    assert json.loads((tmp_path / "x" / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is False
    assert (tmp_path / "x" / "tokenizer.json").is_file()


def test_int8_is_smaller_and_close(tmp_path: Path, tokenizer_dir: Path, text: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = make_model(tmp_path / "m", tokenizer_dir, n_embd=64)
    whole, small = (exported(model, "onnx", kind, tmp_path / kind, text) for kind in ("f32", "int8"))
    assert small.bytes < whole.bytes / 2
    assert abs(small.checked.loss - whole.checked.loss) < 0.5
    assert (tmp_path / "int8" / "onnx" / "model_quantized.onnx").is_file()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_safetensors_of_half_the_size_is_a_plain_model(model: Path, kind: str, tmp_path: Path, text: Path) -> None:
    result = exported(model, "safetensors", kind, tmp_path / "x", text)
    assert result.checked.kl < 1e-2
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "x")
    assert loaded.dtype == {"f16": torch.float16, "bf16": torch.bfloat16}[kind]


def test_command_prints_the_contracts_json_and_refuses_what_exists(
    teacher: Path, tmp_path: Path, text: Path, cli: Callable
) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "any.name"
    line = ["export", teacher, "--to", "gguf", "--type", "q8_0", "--out", out, "--data", text, "--json"]
    found = cli(*line)
    assert found.code == 0, found.err
    assert found.json["bytes"] == out.stat().st_size
    assert {"logits", "greedy_equal", "loss", "kl", "tokens_per_second"} <= found.json["checked"].keys()
    assert {"out", "format", "type", "bytes", "checked"} == found.json.keys()
    before = out.read_bytes()
    again = cli(*line)
    assert again.code == 2
    assert "--overwrite" in again.json["error"]["hint"]
    assert out.read_bytes() == before
    assert cli(*line, "--overwrite").code == 0


def test_a_model_and_a_run_are_never_replaced(teacher: Path, tmp_path: Path, cli: Callable) -> None:
    run = Path(shutil.copytree(teacher, tmp_path / "runs" / "m"))
    (tmp_path / "other").mkdir()
    for name in ("config.json", "run.json"):
        (tmp_path / "other" / name).write_text("{}")
    for out, message in ((run, "holds the model that is exported"), (run.parent, "holds the model that is exported"),
                         (tmp_path / "other", "holds a training run: it is not replaced")):  # fmt: skip
        found = cli("export", run, "--to", "safetensors", "--type", "f16", "--out", out, "--overwrite")
        assert (found.code, message in found.err) == (2, True), found.err
    assert {file.name for file in run.iterdir()} == {file.name for file in teacher.iterdir()}
    assert (tmp_path / "other" / "run.json").is_file()


def test_what_cannot_work_is_refused_at_once(
    teacher: Path, corpus: Path, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tokenizer(TrainTokenizerConfig(source=[str(corpus / "03.txt")], vocab_size=290, out=str(tmp_path / "t")))
    other = PregenerateConfig(
        source=[str(corpus)], tokenizer=str(tmp_path / "t"), out=str(tmp_path / "d"), sequence_length=16
    )
    pregenerate(other)
    line = ["export", teacher, "--to", "safetensors", "--type", "f16", "--out", tmp_path / "o"]
    found = cli(*line, "--data", tmp_path / "d")
    assert (found.code, "another tokenizer" in found.err) == (3, True), found.err
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "o")
    found = cli(*line)
    assert (found.code, "is a mount point" in found.err) == (2, True), found.err


@pytest.mark.parametrize(("to", "kind"), [("onnx", "q8_0"), ("gguf", "int8"), ("safetensors", "q4_0")])
def test_a_type_that_a_format_does_not_have_is_refused(to: str, kind: str, cli: Callable) -> None:
    found = cli("export", "m", "--to", to, "--type", kind, "--out", "x")
    assert found.code == 2
    assert f"--to {to} has the types" in found.err


def test_a_missing_package_is_named_with_its_extra(
    teacher: Path, tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinygpt2.exporting.outputs.find_spec", lambda name: None)
    found = cli("export", teacher, "--to", "gguf", "--out", tmp_path / "x")
    assert found.code == 2
    assert 'pip install "tinygpt2[gguf]"' in found.err
