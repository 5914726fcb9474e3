"""The values that rules give to a run's options, as far as files tell them without loading a model or a dataset."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinygpt2.config.base import Config
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.training import PretrainConfig, TrainOptions, dataset_shares, length_options
from tinygpt2.config.yaml_files import load_yaml
from tinygpt2.data.block_writers import MANIFEST
from tinygpt2.data.tokenizer import fingerprint, has_tokenizer, load_tokenizer
from tinygpt2.errors import TinyGPT2Error
from tinygpt2.models.configuration import is_gpt2, is_model_config, model_config_file, parameters_of
from tinygpt2.training.schedule import passes_over_data, peak_learning_rate


def known_options(config: Config) -> tuple[Config, list[str]]:
    """Return a configuration with the values that rules give, and the names of the options that are not known yet.

    The learning rate follows from the model's width, and the length of `distill` from the sizes of student and data.
    """
    if not isinstance(config, TrainOptions):
        return config, []
    shape = _shape(config)
    values: dict[str, float | None] = {"learning_rate": _rate(config, shape)}
    if not config.plan and all(getattr(config, name) is None for name in length_options()):
        values["num_epochs"] = _passes(config, shape)
    return config.model_copy(update=values), [name for name, value in values.items() if value is None]


def _rate(config: TrainOptions, shape: dict[str, Any]) -> float | None:
    width = 1 if config.learning_rate else shape.get("n_embd")  # a given rate does not follow from the width
    return None if width is None else peak_learning_rate(config, int(width))


def _passes(config: TrainOptions, shape: dict[str, Any]) -> float | None:
    if not isinstance(config, DistillConfig):
        return float(passes_over_data(config, 1, 1))
    tokens = _training_tokens(config)
    try:
        parameters = parameters_of(shape)
    except (KeyError, TypeError):
        return None
    if shape.get("tie_word_embeddings") is False:
        parameters += shape["vocab_size"] * shape["n_embd"]
    return float(passes_over_data(config, parameters, tokens)) if tokens and "vocab_size" in shape else None


def _shape(config: TrainOptions) -> dict[str, Any]:
    """Return the shape of the model that is trained; empty if there is no such directory or file."""
    if isinstance(config, PretrainConfig) and config.shape is not None:
        return _values(model_config_file(config.shape))
    name = (config.student if isinstance(config, DistillConfig) else getattr(config, "model", None)) or ""
    if not is_model_config(name):
        return _values(Path(name) / "config.json")
    sizes = [*_predicted_tokens(config), *_manifest(config, "vocab_size")] if isinstance(config, DistillConfig) else []
    return {**({"vocab_size": sizes[0]} if sizes else {}), **_values(model_config_file(name))}


def _predicted_tokens(config: DistillConfig) -> list[int]:
    """Return the numbers of tokens that teachers with the data's tokens predict, or a cache without its teacher."""
    if config.from_cache_alone:  # torch is imported for it, which other configurations do not need
        from tinygpt2.data.mixture import content_of_datasets
        from tinygpt2.objectives.stored import find_predictions

        root, kind = Path(config.teacher_cache or ""), config.teacher_cache_kind
        with suppress(TinyGPT2Error):
            content = content_of_datasets(config.data)
            return [find_predictions(root, content, kind, config.temperature).form.vocabulary]
        return []
    if not config.needs_teacher:
        return []
    same, found = set(_manifest(config, "tokenizer_fingerprint")), []
    for path in map(Path, config.teachers):
        values = _values(path / "config.json")
        if not is_gpt2(values) or "vocab_size" not in values:
            continue
        with suppress(TinyGPT2Error):
            if not has_tokenizer(path) or fingerprint(load_tokenizer(str(path))) in same:
                found.append(int(values["vocab_size"]))
    return found


def _training_tokens(config: TrainOptions) -> int:
    blocks = [splits["train"]["sequences"] for splits in _manifest(config, "splits")]
    length: int = next(iter(_manifest(config, "sequence_length")), 0)
    return int(sum(blocks)) * length


def _manifest(config: Any, key: str) -> list[Any]:
    """Return a value of each dataset, or of each shard of one; empty if one is not there."""
    found = []
    for name in dataset_shares(config.data):
        files = (
            [Path(name) / MANIFEST] if (Path(name) / MANIFEST).is_file() else sorted(Path(name).glob(f"*/{MANIFEST}"))
        )
        found.append([_values(file).get(key) for file in files])
    values = [value for part in found for value in part]
    return values if all(found) and all(value is not None for value in values) else []


def _values(file: Path) -> dict[str, Any]:
    """Return the content of a JSON or YAML file; empty if it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if file.suffix == ".json" else load_yaml(text, file)
    except (OSError, ValueError, TinyGPT2Error):
        return {}
    return values if isinstance(values, dict) else {}
