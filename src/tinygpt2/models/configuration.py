"""Model configurations of GPT-2: presets (the YAML files in presets/), the user's files, Cerebras' parameter files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt2.config.base import whole_number
from tinygpt2.config.cerebras import is_cerebras, shape_of
from tinygpt2.config.models import PresetsConfig
from tinygpt2.config.yaml_files import load_yaml
from tinygpt2.data.tokenizer import vocabulary_size
from tinygpt2.errors import ConfigError, TinyGPT2Error, listed, one_line
from tinygpt2.utils.progress import say
from tinygpt2.utils.suggestions import did_you_mean

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
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
GPT2_DEFAULTS = {
    "vocab_size": GPT2_VOCABULARY, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
}  # fmt: skip
_ALIASES = {
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}  # fmt: skip
# Keys that a configuration file may also have. They do not describe the model.
_KNOWN = {
    *_SETTINGS, *_ALIASES, "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label",
    "is_encoder_decoder", "label2id", "model_type", "n_ctx", "output_attentions", "output_hidden_states",
    "problem_type", "return_dict", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "torch_dtype", "transformers_version",
}  # fmt: skip


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

    The ids of the start and the end of text come from the tokenizer. A file may only name the same ones; what lies
    outside the vocabulary, such as GPT-2's 50256 beside a smaller one, is not used.

    Args:
        vocab_size: the size of the vocabulary if the file does not set it; by default the tokenizer's.

    Raises:
        ConfigError: there is no such preset or file, it does not describe a GPT-2, it has unknown or impossible values,
            its vocabulary is smaller than the tokenizer's, or its start or end of text is another token.
    """
    path = model_config_file(name)
    values, stray = read_shape(name)
    if stray:  # a library saved the file, and others add keys of their own
        say(f"{path}: not used: {listed(stray, 8)}")
    needed = vocabulary_size(tokenizer)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for key, ours in ends.items():
        if ours is not None and isinstance(theirs := values.get(key), int) and theirs != ours and theirs < needed:
            raise ConfigError(
                f"{path}: {key} is {theirs}, but the data's tokenizer has {ours}",
                f"leave {key} out, so that it follows from the data",
            )
    config = make_model_config({"vocab_size": vocab_size or needed, **values, **ends}, str(path), ConfigError)
    if config.vocab_size < needed:
        raise ConfigError(
            f"{path}: vocab_size {config.vocab_size} is less than the {needed} tokens of the data's tokenizer",
            "leave vocab_size out, so that it follows from the data",
        )
    return config


def read_shape(name: str) -> tuple[dict[str, Any], list[str]]:
    """Read a preset, a config.json, a YAML file or a Cerebras parameter file as settings of a GPT-2, and check them.

    Returns:
        The settings, with the names of config.json, and the keys that are not used.

    Raises:
        ConfigError: there is no such preset or file, it does not describe a GPT-2, or it has unknown or impossible
            values.
    """
    path = model_config_file(name)
    if not path.is_file():
        raise ConfigError(
            f"no model configuration {name!r}: there is no such preset or file{did_you_mean(name, preset_names())}",
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
    stray = sorted(str(key) for key in values if key not in _KNOWN)
    if stray and not {"architectures", "transformers_version"} & values.keys():
        guesses = {key: did_you_mean(key, _SETTINGS).removeprefix(", ") for key in stray}
        unknown = ", ".join(f"{key} ({guess})" if guess else key for key, guess in guesses.items())
        raise ConfigError(f"{path}: unknown keys: {unknown}")
    return check_settings(values, str(path), ConfigError), stray


def is_gpt2(values: dict[str, Any]) -> bool:
    """Return whether a config.json describes a GPT-2. One without a type does."""
    return (values.get("model_type") or "gpt2") == "gpt2"


def check_settings(values: dict[str, Any], where: str, error: type[TinyGPT2Error]) -> dict[str, Any]:
    """Check the settings that describe a GPT-2, as far as this needs no library, and return them without other keys.

    Sizes such as 1e3 become whole numbers. The arguments are those of `make_model_config`.
    """
    if not is_gpt2(values):
        raise error(
            f"{where}: model_type {values['model_type']!r} is not gpt2",
            "only the teacher of distill and the models of ppl and generate may be of another architecture; "
            "truncate-student makes a GPT-2 of GPT-Neo, OPT and GPT-BigCode",
        )
    if values.get("quantization_config"):
        raise error(f"{where}: the model is quantized (quantization_config), which is not supported")
    named = {_ALIASES.get(key, key): value for key, value in values.items()}
    settings = {key: whole_number(named[key]) if key in _SIZES else named[key] for key in _SETTINGS if key in named}
    if (wrong := next(_impossible(GPT2_DEFAULTS | settings), None)) is not None:
        raise error(f"{where}: {wrong}")
    return settings


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
    from transformers.activations import ACT2FN

    try:
        config = GPT2Config(**check_settings(values, where, error))
    except TinyGPT2Error:
        raise
    except Exception as problem:  # the library raises errors of many kinds
        raise error(f"{where}: {one_line(problem, 300)}") from problem
    if (name := config.activation_function) not in ACT2FN:
        known = did_you_mean(name, ACT2FN) or f", known are {', '.join(sorted(ACT2FN))}"
        raise error(f"{where}: activation_function {name!r} is unknown{known}")
    return config


def _impossible(settings: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each value with which there is no model."""
    right = True
    for name in _SIZES:
        size = settings[name]
        if size is None and name == "n_inner":
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**31:
            right = False
            yield f"{name} is {size!r}: expected a whole number from 1"
    if right and settings["n_embd"] % settings["n_head"]:
        yield f"n_embd {settings['n_embd']} is not a multiple of n_head {settings['n_head']}"
    if not isinstance(settings["activation_function"], str):
        yield f"activation_function is {settings['activation_function']!r}: expected a name"
    rates = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    for name in (*rates, "layer_norm_epsilon", "initializer_range"):
        value, most = settings[name], 1 if name in rates else float("inf")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most or value == most > 1:
            yield f"{name} is {value!r}: expected a number from 0{' to 1' * (most == 1)}"
