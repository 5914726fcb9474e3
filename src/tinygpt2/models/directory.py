"""What a directory with a model looks like: its config.json and its files of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinygpt2.errors import DataError, ModelError, listed, one_line
from tinygpt2.utils.files import read_json
from tinygpt2.utils.hub import OTHER_WEIGHTS, is_hub_id, other_weights

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


def weight_files(directory: Path, *, allow_pickle: bool = False) -> list[Path]:
    """Return the weight files that `transformers` reads in a model directory: one file, or the shards of an index.

    Args:
        allow_pickle: return pickled weights if there are no safetensors.

    Raises:
        ModelError: the index cannot be read, or a shard that it lists is missing.
    """
    for name in (SAFETENSORS, PICKLE) if allow_pickle else (SAFETENSORS,):
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if not index.is_file():
            continue
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} does not list the files of the weights: {one_line(error)}") from error
        if missing := [shard for shard in shards if not (directory / str(shard)).is_file()]:
            raise ModelError(f"{index.name} in {directory} lists files that are missing: {listed(missing)}")
        return [directory / str(shard) for shard in shards]
    return []


def no_weights(name: str, directory: Path, role: str) -> ModelError:
    """Return the error for a model without safetensors; it says what else the model has."""
    others = sorted(file.name for file in directory.glob("*") if file.suffix in OTHER_WEIGHTS) or other_weights(name)
    if not others:
        return ModelError(f"there are no weights in {role} {directory}: {SAFETENSORS} is missing")
    if not any(file.startswith("pytorch_model") and file.endswith(".bin") for file in others):
        return ModelError(
            f"there are no weights in {role} {directory} that this program reads: {SAFETENSORS} is missing, "
            f"there is only {listed(others)}",
            f"convert them with transformers; sharded weights need {SAFETENSORS}.index.json",
        )
    return ModelError(
        f"{role} {name} has pickled weights only ({listed(others)})",
        "add --allow-pickle, which reads them without running code from them (torch's weights_only), "
        "or convert them to safetensors",
    )


def read_config_json(directory: Path, role: str = "model") -> dict[str, Any]:
    """Return the content of a model directory's config.json.

    Raises:
        ModelError: there is none, or it is not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{role} {directory} has no config.json", _unfinished(directory))
    try:
        values = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} does not contain a model configuration, but a {type(values).__name__}")
    return values


def _unfinished(directory: Path) -> str | None:
    """Return the hint for the directory of an unfinished run; None if there is no checkpoint."""
    checkpoints = sorted(directory.glob("checkpoints/step-*/config.json"), key=lambda file: file.stat().st_mtime)
    return f"its training is not finished: give the checkpoint {checkpoints[-1].parent}" if checkpoints else None


def is_model_directory(path: Path) -> bool:
    """Return whether a directory holds a model, perhaps an incomplete one."""
    return any((path / name).is_file() for name in ("config.json", SAFETENSORS, PICKLE))


def directory_to_verify(name: str) -> Path | None:
    """Return the directory that `verify` is given, or None for a Hub id.

    Raises:
        DataError: it is a file, or there is no such directory and the name cannot be a Hub id.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not is_hub_id(name):
        problem = f"{path} is a file" if path.exists() else f"no such directory: {path}"
        raise DataError(problem, "verify takes the directory of a dataset or of a model, or an exported model")
    return None


def nothing_to_verify(path: Path) -> DataError:
    """Return the error for a directory with nothing to verify."""
    return DataError(f"{path} is neither a pregenerated dataset nor a model directory", _unfinished(path))
