"""Model configurations of GPT-2: presets (the YAML files in presets/), the user's files, Cerebras' parameter files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tinygpt2.config.cerebras import is_cerebras, shape_of
from tinygpt2.config.models import PresetsConfig
from tinygpt2.errors import ConfigError, one_line

if TYPE_CHECKING:
    from transformers import GPT2Config

    from tinygpt2.utils.types import Tokenizer

GPT2_VOCABULARY = 50257


@dataclass(frozen=True)
class Preset:
    """A built-in model configuration. `parameters` assumes GPT-2's vocabulary and counts tied embeddings once."""

    name: str
    parameters: int
    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    source: str


@dataclass(frozen=True)
class PresetList:
    """All presets, the smallest first."""

    presets: list[Preset]


def presets(config: PresetsConfig | None = None) -> PresetList:
    """List the presets."""
    found = []
    for name in preset_names():
        values = yaml.safe_load(_preset(name).read_text(encoding="utf-8"))
        found.append(Preset(name, parameters_of(values), **values))
    return PresetList(sorted(found, key=lambda preset: preset.parameters))


def parameters_of(shape: dict[str, Any]) -> int:
    """Count the weights of a configuration. Tied embeddings count once; without `vocab_size`, GPT-2's is used."""
    width, layers, vocabulary = shape["n_embd"], shape["n_layer"], shape.get("vocab_size", GPT2_VOCABULARY)
    inner = shape.get("n_inner") or 4 * width
    attention, mlp, norms = 4 * width * width + 4 * width, 2 * width * inner + inner + width, 4 * width
    return int((vocabulary + shape["n_positions"]) * width + layers * (attention + mlp + norms) + 2 * width)


def _preset(name: str) -> Path:
    return Path(str(files("tinygpt2.models").joinpath("presets", f"{name}.yaml")))


def preset_names() -> list[str]:
    """Return the names of the presets."""
    return sorted(
        Path(item.name).stem
        for item in files("tinygpt2.models").joinpath("presets").iterdir()
        if item.name.endswith(".yaml")
    )


def is_model_config(name: str) -> bool:
    """Return whether a name means a configuration (a preset or a file) and not a directory with weights."""
    return not Path(name).is_dir() and (name in preset_names() or Path(name).suffix in (".json", ".yaml", ".yml"))


def read_model_config(name: str, tokenizer: Tokenizer) -> GPT2Config:
    """Read a preset, a config.json, a YAML file or a Cerebras parameter file as GPT-2's configuration.

    The ids of the start and the end of text come from the tokenizer. So does the size of the vocabulary, unless a file
    sets it; then it must be the tokenizer's.

    Raises:
        ConfigError: there is no such preset or file, it does not describe a GPT-2, it has unknown or impossible values,
            or its vocabulary size is not the tokenizer's.
    """
    path = _preset(name) if name in preset_names() else Path(name)
    if not path.is_file():
        raise ConfigError(
            f"no model configuration {name!r}: there is no such preset or file",
            f"give a file, or one of: {', '.join(preset_names())}",
        )
    try:
        # JSON needs its own parser: YAML 1.1 reads a JSON number such as 1e-05 as text.
        read = json.loads if path.suffix == ".json" else yaml.safe_load
        values = read(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not contain a model configuration")
    if is_cerebras(values):
        values = shape_of(values, str(path))
    values.pop("source", None)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = make_model_config({"vocab_size": len(tokenizer), **values, **ends}, str(path))
    if config.vocab_size != len(tokenizer):
        raise ConfigError(
            f"{path}: vocab_size {config.vocab_size}, but the data's tokenizer has {len(tokenizer)} tokens",
            "leave vocab_size out, so that it follows from the data",
        )
    return config


def make_model_config(values: dict[str, Any], where: str) -> GPT2Config:
    """Build GPT-2's configuration and check its values.

    Args:
        values: keys and values as in config.json.
        where: where they come from, for error messages.

    Raises:
        ConfigError: the configuration is not GPT-2's, it has unknown keys, or its width is not a multiple of its
            number of heads.
    """
    from transformers import GPT2Config

    if values.get("model_type", "gpt2") != "gpt2":
        raise ConfigError(f"{where}: model_type {values['model_type']!r} is not gpt2")
    known = {
        *GPT2Config().to_dict(),
        *GPT2Config.attribute_map,
        "task_specific_params",
        "n_ctx",
        "torch_dtype",
    }
    if stray := sorted(set(values) - known):
        raise ConfigError(f"{where}: unknown keys: {', '.join(stray)}")
    try:
        config = GPT2Config(**values)
    except Exception as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error
    if config.n_embd % config.n_head:
        raise ConfigError(f"{where}: n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    return config
