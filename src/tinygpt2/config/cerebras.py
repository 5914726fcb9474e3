"""Translate Cerebras' parameter files for GPT-2 into options of `pretrain`.

A parameter file has the sections train_input, eval_input, model, optimizer and runconfig.
docs/from-other-tools.md describes the mapping. Keys without a counterpart here are returned, so that the caller can
report them. A key that would lead to a different model or training run is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tinygpt2.config.base import whole_number
from tinygpt2.errors import ConfigError

SECTIONS = ("train_input", "eval_input", "model", "optimizer", "runconfig")

_OPTIONS = {
    "train_input.data_dir": "data",
    "train_input.batch_size": "micro_batch_size",
    "eval_input.data_dir": "eval_data",
    "model.dropout_rate": "dropout",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.weight_decay_rate": "weight_decay",
    "optimizer.max_gradient_norm": "grad_clip",
    "runconfig.max_steps": "max_steps",
    "runconfig.num_epochs": "num_epochs",
    "runconfig.checkpoint_steps": "save_every",
    "runconfig.log_steps": "log_every",
    "runconfig.eval_frequency": "eval_every",
    "runconfig.seed": "seed",
    "runconfig.model_dir": "out",
}
"""Keys that mean the same as one of our options."""

_SHAPE = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "filter_size": "n_inner",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "share_embedding_weights": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
"""Keys of `model` that describe the model's shape, with their names in config.json."""

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "train_input.shuffle": (True,),
    "model.position_embedding_type": ("learned",),
    "model.attention_type": ("scaled_dot_product",),
    "model.use_position_embedding": (True,),
    "model.use_projection_bias_in_attention": (True,),
    "model.use_ffn_bias_in_attention": (True,),
    "model.use_ffn_bias": (True,),
    "model.use_bias_in_output": (False,),
    "model.loss_scaling": ("num_tokens",),
    "model.loss_weight": (1.0,),
    "optimizer.optimizer_type": ("adamw", "AdamW"),
}
"""Keys whose value is fixed for every GPT-2, or for every run of this program. They may have only these values."""

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "relu": "relu", "tanh": "tanh", "swish": "silu", "silu": "silu"}


def is_cerebras(values: Mapping[str, Any]) -> bool:
    """Return whether these are Cerebras parameters: `model` is a section, and there is another known section."""
    return isinstance(values.get("model"), dict) and any(key in values for key in SECTIONS if key != "model")


def shape_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the model shape in a parameter file, with the names of config.json.

    Args:
        values: the content of the file.
        where: the file's path, for error messages.

    Raises:
        ConfigError: the file does not describe a GPT-2.
    """
    _check(values, where)
    model = values["model"]
    shape = {name: model[key] for key, name in _SHAPE.items() if key in model}
    nonlinearity = str(model.get("nonlinearity", "gelu"))
    if nonlinearity not in _ACTIVATIONS:
        raise ConfigError(f"{where}: model.nonlinearity {nonlinearity!r}: expected one of {', '.join(_ACTIVATIONS)}")
    return {**shape, "activation_function": _ACTIVATIONS[nonlinearity]}


def options_of(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Return options of `pretrain` for a parameter file, and the keys that have no counterpart.

    Args:
        values: the content of the file.
        where: the file's path. It becomes `model_config`, because `pretrain` reads the shape from the file again.

    Raises:
        ConfigError: the file describes another model, another optimizer, or an unsupported learning-rate schedule.
    """
    _check(values, where)
    flat = dict(_flat(values))
    options = {name: flat[key] for key, name in _OPTIONS.items() if key in flat}
    options |= {"model_config": where, "optimizer": "adamw"}
    if "model.mixed_precision" in flat:
        options["precision"] = "bf16" if flat["model.mixed_precision"] else "fp32"
    if "optimizer.learning_rate" in flat:
        options |= _schedule(flat["optimizer.learning_rate"], flat.get("runconfig.max_steps"), where)
    understood = {*_OPTIONS, *_MUST_BE, "model.mixed_precision", "model.nonlinearity", "optimizer.learning_rate"}
    understood |= {f"model.{key}" for key in _SHAPE}
    rates = ("model.attention_dropout_rate", "model.embedding_dropout_rate", "model.residual_dropout_rate")
    understood |= {key for key in rates if flat.get(key) == flat.get("model.dropout_rate")}  # here all rates are equal
    return options, sorted(key for key in flat if key not in understood)


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, inside in values.items():
        if section not in SECTIONS or not isinstance(inside, dict):
            yield section, inside
            continue
        for key, value in inside.items():
            yield f"{section}.{key}", value


def _check(values: Mapping[str, Any], where: str) -> None:
    wrong = [
        f"{key} is {value!r}, not {allowed[0]!r}"
        for key, value in _flat(values)
        if (allowed := _MUST_BE.get(key)) is not None and value not in allowed
    ]
    if wrong:
        raise ConfigError(f"{where}: {'; '.join(wrong)}: this would be a different model or a different training run")


def _schedule(rate: Any, steps: Any, where: str) -> dict[str, Any]:
    """Return the options for a learning rate, given as a number, as one phase, or as a linear warm-up and a decay."""
    if isinstance(rate, int | float):
        return {"learning_rate": float(rate), "lr_schedule": "constant", "warmup_ratio": 0.0}
    phases = rate if isinstance(rate, list) else [rate]
    if not all(isinstance(phase, dict) for phase in phases) or not phases:
        raise ConfigError(f"{where}: optimizer.learning_rate: expected a number or a list of schedulers")
    warmup = phases[0] if len(phases) > 1 else {"scheduler": "Linear", "initial_learning_rate": 0}
    decay = phases[-1]
    shapes = {"Linear": "linear", "CosineDecay": "cosine", "Constant": "constant"}
    name = str(decay.get("scheduler"))
    peak = decay.get("initial_learning_rate", decay.get("learning_rate", decay.get("val")))
    rises = warmup.get("scheduler") == "Linear" and warmup.get("initial_learning_rate") == 0
    meets = warmup.get("end_learning_rate", peak) == peak
    falls = name == "Constant" or not decay.get("end_learning_rate", 0.0)
    if len(phases) > 2 or name not in shapes or not isinstance(peak, int | float) or not (rises and meets and falls):
        raise ConfigError(
            f"{where}: optimizer.learning_rate: expected a linear warm-up from 0, then Linear or CosineDecay to 0, "
            "or Constant",
            "for other schedules, set lr_schedule, learning_rate and warmup_ratio in a YAML file of tinygpt2 options",
        )
    first, rest = _length(warmup, where), _length(decay, where)
    steps = whole_number(steps)
    total = steps if isinstance(steps, int) and steps else (first + rest if rest else 0)
    if (name != "Constant" and rest and total != first + rest) or first > total:
        raise ConfigError(
            f"{where}: optimizer.learning_rate: its phases take {first} + {rest} steps, but "
            f"runconfig.max_steps is {steps}",
            "the phases must fit runconfig.max_steps, because here the learning rate reaches 0 at the last step",
        )
    return {"learning_rate": float(peak), "lr_schedule": shapes[name], "warmup_ratio": first / total if first else 0.0}


def _length(phase: Mapping[str, Any], where: str) -> int:
    """Return the number of steps of a phase, or 0 if it has none."""
    steps = next((phase[key] for key in ("total_iters", "steps", "decay_steps") if phase.get(key) is not None), 0)
    if not isinstance(steps, int | float) or steps != steps // 1:
        raise ConfigError(f"{where}: optimizer.learning_rate: {steps!r} is not a number of steps")
    return int(steps)
