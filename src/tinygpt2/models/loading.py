"""GPT-2 models: random weights, loading, freezing, saving. Always plain `transformers` models."""

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
    from transformers import PreTrainedTokenizerFast as Tokenizer


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
    if not weight_files(directory):
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
    unset_hf_deepspeed_config()  # in a run with ZeRO-3 a process would get nothing but its shard
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
        raise ModelError(f"cannot load {role} {directory}: {one_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(item) for item in info.get(what) or ()):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(f"{role} {directory}: {what.replace('_keys', '')} weights: {shown}")
    return _fast(model).eval(), directory


def _check_shapes(model: GPT2LMHeadModel, directory: Path, role: str) -> GPT2LMHeadModel:
    """Compare a hollow model with the headers of the weights' files, where there are safetensors."""
    found: dict[str, list[int]] = {}
    for file in weight_files(directory):
        try:
            found |= stored_shapes(file)
        except Exception as error:  # whatever a broken file makes the library raise
            raise ModelError(f"cannot load {role} {file}: {one_line(error)}") from error
    for name, tensor in model.transformer.state_dict(prefix="transformer.").items():
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
        raise ModelError(f"{path}: {one_line(error)}") from error


def _fast(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Let GPT-2's tanh GELU run as torch's one kernel; the configuration keeps the name it came with."""
    if model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
    return model


def model_tokenizer(directory: Path) -> Tokenizer | None:
    """Load the tokenizer beside a model's weights, if there is one."""
    return load_tokenizer(str(directory)) if has_tokenizer(directory) else None
