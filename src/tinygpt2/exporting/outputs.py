"""Where an exported model is written, and whether it can be. Nothing here imports torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from tinygpt2.config.workflows import PACKAGES, ExportConfig, Format
from tinygpt2.errors import ConfigError
from tinygpt2.training.state import RECORD_FILE
from tinygpt2.utils.files import require_free, require_replaceable

ONNX_FILES = {"f32": "model.onnx", "int8": "model_quantized.onnx"}
"""The names in the folder onnx/ that transformers.js looks for, by the type of the weights."""

GGUF_SUFFIX, GGUF_MAGIC = ".gguf", b"GGUF"

_FREE = "give another --out, or --overwrite to replace it"


def card_path(out: Path, to: Format) -> Path:
    """Return where the model card is written: in the directory, or beside the file as NAME.md."""
    return out.with_name(f"{out.name}.md") if to == "gguf" else out / "README.md"


def require_packages(to: Format) -> None:
    """Check that the packages of a format are installed.

    Raises:
        ConfigError: one is missing.
    """
    missing = [name for name in PACKAGES[to] if find_spec(name) is None]
    if missing:
        plural = "are" if len(missing) > 1 else "is"
        raise ConfigError(f"{to}: {' and '.join(missing)} {plural} not installed", f'run pip install "tinygpt2[{to}]"')


def require_engine(to: Format) -> None:
    """Check that what decodes a format on this machine is installed: llama.cpp for GGUF, onnxruntime for ONNX.

    Raises:
        ConfigError: a package is missing.
    """
    require_packages(to)
    if to == "gguf" and find_spec("xllamacpp") is None:
        raise ConfigError("gguf: xllamacpp is not installed", 'run pip install "tinygpt2[llamacpp]"')


def check_output(config: ExportConfig) -> None:
    """Check that the packages of the format are installed, and that nothing at --out would be lost.

    Raises:
        ConfigError: a package is missing, or what is at --out may not or cannot be replaced.
    """
    require_packages(config.to)
    out, model = Path(config.out), Path(config.model).expanduser().resolve()
    require_replaceable(out)
    if model.is_dir() and out.resolve() in (model, *model.parents):
        raise ConfigError(f"--out {out} holds the model that is exported", "give another --out")
    if config.to == "gguf":
        if out.is_dir():
            raise ConfigError(f"--out {out} is a directory", "give the name of a file, such as student.gguf")
        if not config.overwrite:
            for file in (out, card_path(out, config.to)):
                if file.exists():
                    raise ConfigError(f"--out {out}: {file.name} exists", _FREE)
    elif out.is_file() or not config.overwrite:
        require_free(out, _FREE)
    elif out.is_dir() and any(out.iterdir()) and (not (out / "config.json").is_file() or (out / RECORD_FILE).exists()):
        what = "a training run" if (out / RECORD_FILE).exists() else "other files than a model"
        raise ConfigError(f"--out {out} holds {what}: it is not replaced", "give another --out")


def exported_format(path: Path) -> Literal["gguf", "onnx"] | None:
    """Return the format of an exported model that is not a plain model directory; None if it is none.

    Args:
        path: a GGUF file, the folder of an export to ONNX, or the folder onnx/ in it.
    """
    if path.is_file():
        with path.open("rb") as file:
            return "gguf" if path.suffix == GGUF_SUFFIX or file.read(4) == GGUF_MAGIC else None
    return "onnx" if onnx_folder(path) is not None else None


def onnx_folder(path: Path) -> Path | None:
    """Return the folder of an export to ONNX, given it or the folder onnx/ in it; None if it is neither."""
    for folder in (path, path.resolve().parent) if path.name == "onnx" else (path,):
        if any((folder / "onnx" / name).is_file() for name in ONNX_FILES.values()):
            return folder
    return None
