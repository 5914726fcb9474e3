"""Load GPT-2 models, or make them with random weights. They are always plain `transformers` models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tinygpt2.data.tokenizer import has_tokenizer, load_tokenizer
from tinygpt2.errors import ModelError, one_line
from tinygpt2.models.weights import PICKLES, stored_shapes, weight_files
from tinygpt2.utils.hub import local_directory

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer


def random_model(config: GPT2Config, seed: int, *, hollow: bool = False) -> GPT2LMHeadModel:
    """Make a model with GPT-2's random initial weights; the same seed gives the same weights.

    With `hollow`, the model is on the meta device: its tensors have shapes but no values.
    """
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
        name: a local directory or a Hub id.
        role: what error messages call the model, such as `teacher`.
        allow_pickle: read pickled weights if there are no safetensors.
        hollow: load only the shapes, on the meta device; the weights of a Hub id are not downloaded then.

    Returns:
        The model, and the directory that it was loaded from.

    Raises:
        ModelError: there is no such model, it has no weights, or only pickled ones without `allow_pickle`, it is not a
            GPT-2, or weights are missing, left over or of another shape.
    """
    directory = local_directory(name, role, allow_pickle=allow_pickle, weights=not hollow)
    config = _directory_config(directory, role)
    if hollow and not Path(name).is_dir():
        return random_model(config, 0, hollow=True).eval(), directory
    if not weight_files(directory):
        pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
        if not pickles:
            raise ModelError(f"there are no weights in {role} {directory}: model.safetensors is missing")
        if not allow_pickle:
            raise ModelError(
                f"{role} {directory} has pickled weights only ({', '.join(pickles)}), and loading them can run code",
                "convert them to safetensors, or add --allow-pickle if you trust their author",
            )
    if hollow:
        return _check_shapes(random_model(config, 0, hollow=True), directory, role), directory
    unset_hf_deepspeed_config()  # with ZeRO-3, each process would otherwise load only its shard of the weights
    try:
        model, info = GPT2LMHeadModel.from_pretrained(
            str(directory),
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
            use_safetensors=None if allow_pickle else True,
        )
    except Exception as error:  # broken weights can make the library raise any exception
        raise ModelError(f"cannot load {role} {directory}: {one_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(item) for item in info.get(what) or ()):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(f"{role} {directory}: {what.replace('_keys', '')} weights: {shown}")
    return _fast(model).eval(), directory


def _check_shapes(model: GPT2LMHeadModel, directory: Path, role: str) -> GPT2LMHeadModel:
    """Compare a hollow model's shapes with the headers of its safetensors files, if there are any."""
    found: dict[str, list[int]] = {}
    for file in weight_files(directory):
        try:
            found |= stored_shapes(file)
        except Exception as error:  # a broken file can make the library raise any exception
            raise ModelError(f"cannot load {role} {file}: {one_line(error)}") from error
    for name, tensor in model.transformer.state_dict(prefix="transformer.").items():
        if found and found.get(name) != list(tensor.shape):
            have, want = found.get(name, "no such tensor"), list(tensor.shape)
            raise ModelError(
                f"{role} {directory}: {name} should have shape {want} (from config.json), "
                f"but the weight files have {have}"
            )
    return model.eval()


def _directory_config(directory: Path, role: str) -> GPT2Config:
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{role} {directory} has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if values.get("model_type") != "gpt2":
        raise ModelError(f"{role} {directory} has the model type {values.get('model_type')!r}, not gpt2")
    try:
        return GPT2Config(**values)
    except Exception as error:
        raise ModelError(f"{path}: {one_line(error)}") from error


def _fast(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Run GPT-2's tanh GELU as a single torch kernel. The configuration keeps the activation's original name."""
    if model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
    return model


def model_tokenizer(directory: Path) -> Tokenizer | None:
    """Load the tokenizer in a model's directory; return None if there is none."""
    return load_tokenizer(str(directory)) if has_tokenizer(directory) else None
