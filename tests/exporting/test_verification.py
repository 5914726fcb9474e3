"""`verify` on exported models: sound ones, planted faults, and options that do not belong together."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tinygpt2
from tests.conftest import make_model
from tinygpt2.errors import ConfigError
from tinygpt2.exporting.checks import CheckText, run_checks
from tinygpt2.exporting.engines import TorchEngine
from tinygpt2.exporting.export import disagreements
from tinygpt2.exporting.source import load_source

FORMATS = [("gguf", "f32"), ("gguf", "q8_0"), ("onnx", "f32"), ("onnx", "int8")]


@pytest.fixture
def text(corpus: Path) -> Path:
    return corpus / "00.txt"


@pytest.fixture(params=FORMATS, ids="-".join)
def exported(request: pytest.FixtureRequest, teacher: Path, tmp_path: Path, text: Path) -> Path:
    """An export of `teacher`: the file or the folder."""
    to, kind = request.param
    pytest.importorskip("gguf" if to == "gguf" else "onnxruntime")
    out = tmp_path / "out"
    tinygpt2.export(tinygpt2.ExportConfig(model=str(teacher), to=to, type=kind, out=str(out), check=False))
    return out


def check(path: Path, **options: object) -> tinygpt2.VerifyResult:
    return tinygpt2.verify(tinygpt2.VerifyConfig(path=str(path), **options))


def test_a_sound_export_is_compared_with_its_model(exported: Path, teacher: Path, text: Path) -> None:
    result = check(exported, model=str(teacher), data=str(text))
    assert result.ok, result.problems
    assert result.notes == []
    assert result.export.kl < 0.05
    assert result.export.loss == pytest.approx(result.export.float_loss, abs=0.05)


def test_without_its_model_the_engine_is_compared_with_the_files_weights(exported: Path) -> None:
    path = exported / "onnx" if exported.is_dir() else exported
    result = check(path)
    assert result.ok, result.problems
    assert "--model" in result.notes[0]
    assert result.export.kl < 0.05


def test_one_wrong_weight_is_found(exported: Path, teacher: Path, text: Path) -> None:
    corrupt(exported)
    result = check(exported, model=str(teacher), data=str(text))
    assert not result.ok
    assert "was not written as it should be" in result.problems[0]
    assert result.exit_code == 4


def corrupt(exported: Path) -> None:
    """Change one number of the last tensor's data."""
    if exported.is_file():
        import gguf

        tensor = gguf.GGUFReader(exported).tensors[-1]
        with exported.open("r+b") as file:
            file.seek(int(tensor.data_offset) + 1)
            byte = file.read(1)[0]
            file.seek(int(tensor.data_offset) + 1)
            file.write(bytes([byte ^ 0x10]))
        return
    import numpy as np
    import onnx
    from onnx import numpy_helper

    (path,) = (exported / "onnx").glob("*.onnx")
    graph = onnx.load(path)
    weight = next(one for one in graph.graph.initializer if one.name.startswith("transformer.h.1.mlp.c_fc.weight"))
    values = np.array(numpy_helper.to_array(weight))
    values.flat[0] += 4
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(graph, path)


@pytest.mark.parametrize("length", [0, 100, -5000])
def test_a_cut_file_is_faulty(teacher: Path, tmp_path: Path, length: int) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "x.gguf"
    tinygpt2.export(tinygpt2.ExportConfig(model=str(teacher), to="gguf", out=str(out), check=False))
    out.write_bytes(out.read_bytes()[:length])
    result = check(out)
    assert not result.ok
    assert str(out) in result.problems[0]


def test_the_command_prints_what_it_measured(teacher: Path, tmp_path: Path, text: Path, cli: Callable) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "any.name"
    tinygpt2.export(tinygpt2.ExportConfig(model=str(teacher), to="gguf", out=str(out), check=False))
    found = cli("verify", out, "--model", teacher, "--data", text)
    assert found.code == 0, found.err
    assert "greedy tokens" in found.out
    assert cli("verify", out, "--model", teacher, "--data", text, "--json").json["export"]["kl"] < 1e-3
    assert cli("verify", out, "--teacher", teacher).code == 2
    assert "not an exported model" in cli("verify", teacher, "--model", teacher).err


def test_options_of_exports_are_refused_for_models(teacher: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        check(teacher, data="x")


def test_another_models_export_is_refused(exported: Path, tokenizer_dir: Path, tmp_path: Path, text: Path) -> None:
    other = make_model(tmp_path / "other", tokenizer_dir, seed=1)
    assert not check(exported, model=str(other), data=str(text)).ok


def test_an_engine_that_computes_nan_is_found(teacher: Path) -> None:
    class Broken(TorchEngine):
        def logits(self, ids: list[int]) -> torch.Tensor:
            return super().logits(ids) * math.nan

    source = load_source(tinygpt2.ExportConfig(model=str(teacher), to="safetensors", out="o"))
    found = run_checks(source, Broken(source.model, own=False), CheckText([[1, 2, 3, 4]]))
    assert math.isnan(found.kl)
    assert math.isnan(found.logits)
    for kind in ("f32", "q8_0"):
        assert list(disagreements(found, kind)) == [
            "transformers, with the file's weights computes NaN or infinite logits"
        ]
