"""GPT-2 models: presets, random weights, loading, checking, saving. Always plain `transformers` models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.files import atomic_contents, write_text
from tinygpt2.hub import local_directory
from tinygpt2.tokenizer import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def preset_names() -> list[str]:
    """Return the names of the shipped shapes."""
    return sorted(Path(item.name).stem for item in files("tinygpt2.presets").iterdir() if item.name.endswith(".yaml"))


def is_shape(name: str) -> bool:
    """Say whether a name means a shape (preset or config file) and not a directory of weights."""
    return not Path(name).is_dir() and (name in preset_names() or Path(name).suffix in (".json", ".yaml", ".yml"))


def read_shape(name: str, tokenizer: Tokenizer) -> GPT2Config:
    """Read a preset, a config.json or a YAML file as GPT-2's configuration.

    Start and end of text are the tokenizer's. A preset takes the size of the vocabulary from it too; a file that
    gives one must agree.

    Raises:
        ConfigError: no such preset or file, no GPT-2, unknown or impossible values, another vocabulary.
    """
    path = Path(str(files("tinygpt2.presets").joinpath(f"{name}.yaml"))) if name in preset_names() else Path(name)
    if not path.is_file():
        raise ConfigError(f"no model configuration {name!r}", f"a file, or one of: {', '.join(preset_names())}")
    try:
        # JSON apart: YAML 1.1 reads its 1e-05 as text
        read = json.loads if path.suffix == ".json" else yaml.safe_load
        values = read(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold a model configuration")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = make_config({"vocab_size": len(tokenizer), **values, **ends}, str(path))
    if config.vocab_size != len(tokenizer):
        raise ConfigError(
            f"{path}: vocab_size {config.vocab_size}, but the data's tokenizer has {len(tokenizer)} tokens",
            "leave vocab_size out to take it from the data",
        )
    return config


def make_config(values: dict[str, Any], where: str) -> GPT2Config:
    """Build GPT-2's configuration and check that it makes sense.

    Raises:
        ConfigError: it is not GPT-2's, has unknown keys, or the heads do not divide the width.
    """
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
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
    if config.n_embd % config.n_head:
        raise ConfigError(f"{where}: n_embd {config.n_embd} is no multiple of n_head {config.n_head}")
    return config


def random_model(config: GPT2Config, seed: int, *, hollow: bool = False) -> GPT2LMHeadModel:
    """Make a model with GPT-2's initial weights, the same for the same seed; `hollow` is one of shapes alone."""
    if hollow:
        with torch.device("meta"):
            return _fast(GPT2LMHeadModel(config))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _fast(GPT2LMHeadModel(config))


def load_model(
    name: str, role: str = "model", *, allow_pickle: bool = False, hollow: bool = False
) -> tuple[GPT2LMHeadModel, Path]:
    """Load float32 weights, in evaluation mode, from a local directory or the Hub.

    Args:
        name: where from.
        role: what it is, for messages.
        allow_pickle: read pickled weights where there are no others.
        hollow: read shapes alone, on the meta device; a Hub id's weights are not fetched for that.

    Returns:
        The model, and the directory that it came from.

    Raises:
        ModelError: no model, no weights, pickled weights without `allow_pickle`, another architecture,
            weights that are missing, left over or of another shape.
    """
    directory = local_directory(name, role, allow_pickle=allow_pickle, weights=not hollow)
    config = _directory_config(directory, role)
    if hollow and not Path(name).is_dir():
        return random_model(config, 0, hollow=True).eval(), directory
    if not any(directory.glob("model*.safetensors")):
        pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
        if not pickles:
            raise ModelError(f"no weights in {role} {directory}: model.safetensors is missing")
        if not allow_pickle:
            raise ModelError(
                f"{role} {directory} holds pickled weights only ({', '.join(pickles)}), which can run code when read",
                "convert them to safetensors, or add --allow-pickle if you trust their author",
            )
    if hollow:
        return _check_shapes(random_model(config, 0, hollow=True), directory, role), directory
    try:
        model, info = GPT2LMHeadModel.from_pretrained(
            str(directory),
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
            use_safetensors=None if allow_pickle else True,
        )
    except Exception as error:  # whatever broken weights make the library raise
        raise ModelError(f"cannot load {role} {directory}: {' '.join(str(error).split())}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(item) for item in info.get(what) or ()):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(f"{role} {directory}: {what.replace('_keys', '')} weights: {shown}")
    return _fast(model).eval(), directory


def _check_shapes(model: GPT2LMHeadModel, directory: Path, role: str) -> GPT2LMHeadModel:
    """Compare a hollow model with the headers of the weights' files, where there are safetensors."""
    found: dict[str, list[int]] = {}
    for file in directory.glob("model*.safetensors"):
        try:
            with safe_open(file, "pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - it is no dictionary
                    found[key.removeprefix("transformer.")] = weights.get_slice(key).get_shape()
        except Exception as error:  # whatever a broken file makes the library raise
            raise ModelError(f"cannot load {role} {file}: {' '.join(str(error).split())}") from error
    for name, tensor in model.transformer.state_dict().items():
        if found and found.get(name) != list(tensor.shape):
            have, want = found.get(name, "nothing"), list(tensor.shape)
            raise ModelError(f"{role} {directory}: {name} is of shape {have}, config.json says {want}")
    return model.eval()


def _directory_config(directory: Path, role: str) -> GPT2Config:
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{role} {directory} has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error
    if values.get("model_type") != "gpt2":
        raise ModelError(f"{role} {directory} is of type {values.get('model_type')!r}, not gpt2")
    try:
        return GPT2Config(**values)
    except Exception as error:
        raise ModelError(f"{path}: {' '.join(str(error).split())}") from error


def _fast(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Let GPT-2's tanh GELU run as torch's one kernel; the configuration keeps the name it came with."""
    if model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
    return model


def default_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_tokenizer(directory: Path) -> Tokenizer | None:
    """Load the tokenizer beside a model's weights, if there is one."""
    return load_tokenizer(str(directory)) if has_tokenizer(directory) else None


def set_dropout(model: GPT2LMHeadModel, rate: float) -> None:
    """Use one dropout rate for embeddings, attention and residuals while training; the configuration stays."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Exclude the parameters whose names match a pattern (as in a shell) from training.

    Raises:
        ConfigError: a pattern matches nothing, or all together leave nothing to train.
    """
    for pattern in patterns:
        matched = [parameter for name, parameter in model.named_parameters() if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(
                f"--freeze {pattern!r} matches no parameter",
                "names look like transformer.h.0.attn.c_attn.weight",
            )
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"--freeze {', '.join(patterns)} leaves nothing to train")


def count_parameters(model: nn.Module) -> int:
    """Count weights, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_model(
    model: GPT2LMHeadModel,
    out: Path,
    tokenizer: Tokenizer | None,
    card: str,
    weights: dict[str, Tensor] | None = None,
    run: str | None = None,
) -> None:
    """Write a directory that plain `transformers` opens; each file appears whole.

    Args:
        card: the model card, README.md.
        weights: the model's, where it holds only a shard of them itself.
        run: the resolved configuration, config.yaml.

    Raises:
        ModelError: the disk is full, or does not let us write.
    """
    try:
        with atomic_contents(out) as temporary:
            model.save_pretrained(str(temporary), state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(temporary))
        write_text(out / "README.md", card)
        if run is not None:
            write_text(out / "config.yaml", run)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ModelError(f"cannot save the model in {out}: {reason}", "check rights and space") from error


def check_model(directory: Path) -> Iterator[str]:
    """Yield one message per fault of a model directory: weights, shapes, finite numbers, tokenizer."""
    try:
        model, _ = load_model(str(directory))
        tokenizer = model_tokenizer(directory)
    except ModelError as error:
        yield str(error)
        return
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            yield f"{name} holds numbers that are not finite"
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        yield f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}"
