"""Model configurations of GPT-2: presets (the YAML files in presets/), the user's files, Cerebras' parameter files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt2.config.base import load_yaml
from tinygpt2.config.cerebras import is_cerebras, shape_of
from tinygpt2.config.models import PresetsConfig
from tinygpt2.data.tokenizer import vocabulary_size
from tinygpt2.errors import ConfigError, TinyGPT2Error, listed, one_line
from tinygpt2.utils.progress import say

if TYPE_CHECKING:
    from transformers import GPT2Config

    from tinygpt2.utils.types import Tokenizer

GPT2_VOCABULARY = 50257
# The settings of a GPT-2. config.json also has keys of other heads, of pipelines and of other versions of libraries.
_SETTINGS = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention", "tie_word_embeddings",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


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
        values = load_yaml(_preset(name).read_text(encoding="utf-8"), name)
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


def model_config_file(name: str) -> Path:
    """Return the file of a model configuration: a preset's, or the one that is named."""
    return _preset(name) if name in preset_names() else Path(name)


def is_model_config(name: str) -> bool:
    """Return whether a name means a configuration (a preset or a file) and not a directory with weights."""
    return not Path(name).is_dir() and (name in preset_names() or Path(name).suffix in (".json", ".yaml", ".yml"))


def read_model_config(name: str, tokenizer: Tokenizer, vocab_size: int | None = None) -> GPT2Config:
    """Read a preset, a config.json, a YAML file or a Cerebras parameter file as GPT-2's configuration.

    The ids of the start and the end of text come from the tokenizer.

    Args:
        vocab_size: the size of the vocabulary if the file does not set it; by default the tokenizer's.

    Raises:
        ConfigError: there is no such preset or file, it does not describe a GPT-2, it has unknown or impossible values,
            or its vocabulary is smaller than the tokenizer's.
    """
    path = model_config_file(name)
    if not path.is_file():
        raise ConfigError(
            f"no model configuration {name!r}: there is no such preset or file",
            f"give a file, or one of: {', '.join(preset_names())}",
        )
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else load_yaml(text, path)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not contain a model configuration")
    if is_cerebras(values):
        values = shape_of(values, str(path))
    values.pop("source", None)
    if stray := sorted(str(key) for key in values if key not in _known_keys()):
        if not {"architectures", "transformers_version"} & values.keys():
            raise ConfigError(f"{path}: unknown keys: {', '.join(stray)}")
        say(f"{path}: not used: {listed(stray, 8)}")  # a library saved the file, and others add keys of their own
    needed = vocabulary_size(tokenizer)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = make_model_config({"vocab_size": vocab_size or needed, **values, **ends}, str(path), ConfigError)
    if config.vocab_size < needed:
        raise ConfigError(
            f"{path}: vocab_size {config.vocab_size} is less than the {needed} tokens of the data's tokenizer",
            "leave vocab_size out, so that it follows from the data",
        )
    return config


def make_model_config(values: dict[str, Any], where: str, error: type[TinyGPT2Error]) -> GPT2Config:
    """Build GPT-2's configuration from the settings that describe the model, and check them. Other keys are left out.

    Args:
        values: keys and values as in config.json.
        where: where they come from, for error messages.
        error: the class of the exception, which depends on who wrote the values.

    Raises:
        TinyGPT2Error: of the given class: the configuration is not GPT-2's, or no model can have these values.
    """
    from transformers import GPT2Config

    if (kind := values.get("model_type") or "gpt2") != "gpt2":
        raise error(f"{where}: model_type {kind!r} is not gpt2")
    if values.get("quantization_config"):
        raise error(f"{where}: the model is quantized (quantization_config), which is not supported")
    names = {*_SETTINGS, *GPT2Config.attribute_map}
    try:
        config = GPT2Config(**{key: value for key, value in values.items() if key in names})
    except Exception as problem:  # the library raises errors of many kinds
        raise error(f"{where}: {one_line(problem, 300)}") from problem
    if (wrong := next(_impossible(config), None)) is not None:
        raise error(f"{where}: {wrong}")
    return config


def _known_keys() -> set[str]:
    """Return the keys that a configuration file may have. Some of them do not describe the model."""
    from transformers import GPT2Config

    return {*GPT2Config().to_dict(), *GPT2Config.attribute_map, "task_specific_params", "n_ctx", "torch_dtype"}


def _impossible(config: GPT2Config) -> Iterator[str]:
    """Yield a message for each value with which there is no model."""
    from transformers.activations import ACT2FN

    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
        size = getattr(config, name)
        if size is not None and (isinstance(size, bool) or not 1 <= size < 2**31):
            yield f"{name} is {size}: expected a whole number from 1"
    if config.n_embd % config.n_head:
        yield f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}"
    if config.activation_function not in ACT2FN:
        close = get_close_matches(config.activation_function, ACT2FN, n=1)
        known = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(ACT2FN))}"
        yield f"activation_function {config.activation_function!r} is unknown, {known}"
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if not 0 <= getattr(config, name) <= 1:
            yield f"{name} is {getattr(config, name)}: expected a number from 0 to 1"
    for name in ("layer_norm_epsilon", "initializer_range"):
        if not 0 <= getattr(config, name) < float("inf"):
            yield f"{name} is {getattr(config, name)}: expected a number from 0"
