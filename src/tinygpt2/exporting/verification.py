"""Check a model that `export` wrote earlier: read it, run it, and compare it with the model that it was made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tinygpt2.config.workflows import ExportConfig, VerifyConfig
from tinygpt2.errors import ModelError
from tinygpt2.exporting.checks import ExportChecks, check_text
from tinygpt2.exporting.export import disagreements, run_export
from tinygpt2.exporting.outputs import exported_format, require_packages
from tinygpt2.exporting.reading import read_exported
from tinygpt2.exporting.source import load_source
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
        found = read_exported(path, source)
        checks = run_export(found.source, to, found.file, found.model, check_text(found.source, config.data))
    except ModelError as error:
        return ExportFindings([str(error)], notes)
    return ExportFindings(list(disagreements(checks, found.type)), notes, checks)
