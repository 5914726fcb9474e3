"""Check a model that `export` wrote earlier: read it, run it, and compare it with the model that it was made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tinygpt2.config.workflows import ExportConfig, NumberType, VerifyConfig
from tinygpt2.errors import ModelError
from tinygpt2.exporting.checks import ExportChecks, check_text
from tinygpt2.exporting.export import disagreements, run_export
from tinygpt2.exporting.outputs import exported_format, onnx_folder, require_packages
from tinygpt2.exporting.source import ExportSource, load_source
from tinygpt2.models.card import HubMetadata
from tinygpt2.models.loading import model_tokenizer
from tinygpt2.runtime.cpu import fast_products


@dataclass(frozen=True)
class ExportFindings:
    """What the check of an exported model found; see `VerifyResult`."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checks: ExportChecks | None = None


@fast_products()
def check_export(path: Path, config: VerifyConfig) -> ExportFindings:
    """Check a GGUF file, or the folder of an export to ONNX.

    With --model, every tensor is compared with that model's, rounded as the file's type asks, and so is what the engine
    computes. Without it, the engine is compared with what the file's weights give in torch.

    Raises:
        ConfigError: the packages of the format are missing.
        DataError: --data cannot be read, or does not fit the model.
        ModelError: the model of --model cannot be loaded.
    """
    to = exported_format(path)
    assert to is not None
    require_packages(to)
    source = None
    if config.model is not None:
        given = ExportConfig(model=config.model, to=to, out=str(path), allow_pickle=config.allow_pickle)
        source = load_source(given)
    notes = [] if source is not None else ["give --model to compare it with the model that it was made from"]
    try:
        checks, kind = (_run_gguf if to == "gguf" else _run_onnx)(path, config, source)
    except ModelError as error:
        return ExportFindings([str(error)], notes)
    return ExportFindings(list(disagreements(checks, kind)), notes, checks)


def _run_gguf(path: Path, config: VerifyConfig, source: ExportSource | None) -> tuple[ExportChecks, NumberType]:
    from tinygpt2.exporting.gguf import compare_gguf, file_type, read_gguf

    kind = file_type(path)
    model = read_gguf(path) if source is None else compare_gguf(source, kind, path)
    source = source or ExportSource(path.name, model, None, HubMetadata())
    return run_export(source, "gguf", path, model, check_text(source, config.data)), kind


def _run_onnx(path: Path, config: VerifyConfig, source: ExportSource | None) -> tuple[ExportChecks, NumberType]:
    from tinygpt2.exporting.onnx_folder import compare_onnx, onnx_file, read_onnx

    folder = onnx_folder(path)
    assert folder is not None
    file, kind = onnx_file(folder)
    if source is None:
        source = ExportSource(folder.name, read_onnx(folder), model_tokenizer(folder), HubMetadata())
    else:
        compare_onnx(source, folder)
    return run_export(source, "onnx", file, None, check_text(source, config.data)), kind
