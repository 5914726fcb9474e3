"""Where an exported model is written, and whether it can be. Nothing here imports torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from tinygpt2.config.workflows import PACKAGES, ExportConfig, Format
from tinygpt2.errors import ConfigError
from tinygpt2.utils.files import require_free

ONNX_FILES = {"f32": "model.onnx", "int8": "model_quantized.onnx"}
"""The names in the folder onnx/ that transformers.js looks for, by the type of the weights."""

_FREE = "give another --out, or --overwrite to replace it"


def card_path(out: Path, to: Format) -> Path:
    """Return where the model card is written: in the directory, or beside the file as NAME.md."""
    return out.with_name(f"{out.name}.md") if to == "gguf" else out / "README.md"


def check_output(config: ExportConfig) -> None:
    """Check that the packages of the format are installed, and that nothing at --out would be lost.

    Raises:
        ConfigError: a package is missing, or there is something at --out that may not be replaced.
    """
    missing = [name for name in PACKAGES[config.to] if find_spec(name) is None]
    if missing:
        plural = "are" if len(missing) > 1 else "is"
        raise ConfigError(
            f"--to {config.to}: {' and '.join(missing)} {plural} not installed",
            f'run pip install "tinygpt2[{config.to}]"',
        )
    out = Path(config.out)
    if config.to == "gguf":
        if out.is_dir():
            raise ConfigError(f"--out {out} is a directory", "give the name of a file, such as student.gguf")
        if not config.overwrite:
            for file in (out, card_path(out, config.to)):
                if file.exists():
                    raise ConfigError(f"--out {out}: {file.name} exists", _FREE)
    elif out.is_file() or not config.overwrite:
        require_free(out, _FREE)
    elif out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ConfigError(f"--out {out} holds other files than a model: it is not replaced", "give another --out")
