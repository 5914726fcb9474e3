"""An exported model, read back: its weights in float32, and the engine that runs its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import GPT2LMHeadModel

from tinygpt2.config.workflows import Format, NumberType
from tinygpt2.exporting.engines import Engine, LlamaEngine, OnnxEngine, TorchEngine, llama_available
from tinygpt2.exporting.outputs import exported_format, onnx_folder
from tinygpt2.exporting.source import ExportSource
from tinygpt2.models.card import HubMetadata
from tinygpt2.models.loading import model_tokenizer
from tinygpt2.utils.progress import say


@dataclass(frozen=True)
class Exported:
    """A GGUF file, or the graph of an export to ONNX.

    Attributes:
        file: what the engine loads.
        type: of the weights.
        model: the weights of the file, in float32.
        source: the model that it was made from; if that is not known, the model of the file.
        bytes: the size of the weights on disk.
    """

    format: Format
    type: NumberType
    file: Path
    model: GPT2LMHeadModel
    source: ExportSource
    bytes: int


def read_exported(path: Path, source: ExportSource | None = None) -> Exported:
    """Read an exported model.

    Args:
        path: see `outputs.exported_format`.
        source: the model that it was made from; every tensor is compared with it.

    Raises:
        ModelError: the file cannot be read, or a tensor is not what it should be.
    """
    if exported_format(path) == "gguf":
        from tinygpt2.exporting.gguf import compare_gguf, file_type, read_gguf

        kind = file_type(path)
        model = read_gguf(path) if source is None else compare_gguf(source, kind, path)
        source = source or ExportSource(path.name, model, None, HubMetadata())
        return Exported("gguf", kind, path, model, source, path.stat().st_size)
    from tinygpt2.exporting.onnx_folder import compare_onnx, onnx_file, read_onnx

    folder = onnx_folder(path)
    assert folder is not None
    file, kind = onnx_file(folder)
    model = read_onnx(folder)
    if source is not None:
        compare_onnx(source, folder)
    source = source or ExportSource(folder.name, model, model_tokenizer(folder), HubMetadata())
    weights = [one for one in (file, file.with_name(f"{file.name}_data")) if one.is_file()]
    return Exported("onnx", kind, file, model, source, sum(one.stat().st_size for one in weights))


def engine_of(to: Format, file: Path, model: GPT2LMHeadModel | None) -> Engine:
    """Return what runs an exported model: its format's own engine, or torch where llama.cpp is not installed.

    Args:
        file: what the engine loads.
        model: what the file holds, for the formats that torch can run.

    Raises:
        ModelError: the engine cannot load the file.
    """
    if to == "onnx":
        return OnnxEngine(file)
    assert model is not None
    if to == "safetensors":
        return TorchEngine(model, own=True)
    if llama_available():
        return LlamaEngine(file.resolve(), model.lm_head.weight.detach(), model.config.n_positions)
    say('llama.cpp is not installed, so torch runs the file\'s weights: pip install "tinygpt2[llamacpp]"')
    return TorchEngine(model, own=False)
