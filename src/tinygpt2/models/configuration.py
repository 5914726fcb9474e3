"""Shapes of GPT-2: presets by name (YAML files beside this one), files of one's own, Cerebras' parameter files."""

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
    from transformers import PreTrainedTokenizerFast as Tokenizer

GPT2_VOCABULARY = 50257


@dataclass(frozen=True)
class Preset:
    """A shape by name; `parameters` with GPT-2's vocabulary, tied embeddings counted once."""

    name: str
    parameters: int
    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    source: str


@dataclass(frozen=True)
class PresetList:
    """Every preset, the smallest first."""

    presets: list[Preset]


def presets(config: PresetsConfig | None = None) -> PresetList:
    """Describe every preset."""
    found = []
    for name in preset_names():
        values = yaml.safe_load(_preset(name).read_text(encoding="utf-8"))
        found.append(Preset(name, parameters_of(values), **values))
    return PresetList(sorted(found, key=lambda preset: preset.parameters))


def parameters_of(shape: dict[str, Any]) -> int:
    """Count the weights of a shape, GPT-2's vocabulary where it names none, tied embeddings once."""
    width, layers, vocabulary = shape["n_embd"], shape["n_layer"], shape.get("vocab_size", GPT2_VOCABULARY)
    inner = shape.get("n_inner") or 4 * width
    attention, mlp, norms = 4 * width * width + 4 * width, 2 * width * inner + inner + width, 4 * width
    return int((vocabulary + shape["n_positions"]) * width + layers * (attention + mlp + norms) + 2 * width)


def _preset(name: str) -> Path:
    return Path(str(files("tinygpt2.models").joinpath("presets", f"{name}.yaml")))


def preset_names() -> list[str]:
    """Return the names of the shipped shapes."""
    return sorted(
        Path(item.name).stem
        for item in files("tinygpt2.models").joinpath("presets").iterdir()
        if item.name.endswith(".yaml")
    )


def is_model_config(name: str) -> bool:
    """Say whether a name means a shape (preset or config file) and not a directory of weights."""
    return not Path(name).is_dir() and (name in preset_names() or Path(name).suffix in (".json", ".yaml", ".yml"))


def read_model_config(name: str, tokenizer: Tokenizer) -> GPT2Config:
    """Read a preset, a config.json, a YAML file or a Cerebras parameter file as GPT-2's configuration.

    Start and end of text are the tokenizer's. A preset takes the size of the vocabulary from it too; a file that
    gives one must agree.

    Raises:
        ConfigError: no such preset or file, no GPT-2, unknown or impossible values, another vocabulary.
    """
    path = _preset(name) if name in preset_names() else Path(name)
    if not path.is_file():
        raise ConfigError(f"no model configuration {name!r}", f"a file, or one of: {', '.join(preset_names())}")
    try:
        # JSON apart: YAML 1.1 reads its 1e-05 as text
        read = json.loads if path.suffix == ".json" else yaml.safe_load
        values = read(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold a model configuration")
    if is_cerebras(values):
        values = shape_of(values, str(path))
    values.pop("source", None)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = make_model_config({"vocab_size": len(tokenizer), **values, **ends}, str(path))
    if config.vocab_size != len(tokenizer):
        raise ConfigError(
            f"{path}: vocab_size {config.vocab_size}, but the data's tokenizer has {len(tokenizer)} tokens",
            "leave vocab_size out to take it from the data",
        )
    return config


def make_model_config(values: dict[str, Any], where: str) -> GPT2Config:
    """Build GPT-2's configuration and check that it makes sense.

    Raises:
        ConfigError: it is not GPT-2's, has unknown keys, or the heads do not divide the width.
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
        raise ConfigError(f"{where}: n_embd {config.n_embd} is no multiple of n_head {config.n_head}")
    return config
