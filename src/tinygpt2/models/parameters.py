"""Count, freeze and cast a model's parameters, and set its dropout."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tinygpt2.errors import ConfigError


def set_dropout(model: GPT2LMHeadModel, rate: float) -> None:
    """Set one dropout rate for embeddings, attention and residuals. The model's configuration is not changed."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Exclude from training all parameters whose names match a shell-style pattern.

    Raises:
        ConfigError: a pattern matches no parameter, or no parameter is left to train.
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


def cast_linear_layers(layers: nn.Module, dtype: torch.dtype) -> None:
    """Cast the linear layers among some layers of a model to autocast's type, in place.

    For a frozen model, autocast would do so again in every forward pass, with the same numbers as result. Embeddings,
    layer norms and the output matrix keep their type, because autocast computes with them as they are, or rounds later.
    The model can then be used only under autocast.
    """
    for module in layers.modules():
        if isinstance(module, Conv1D | nn.Linear):
            module.to(dtype)


def count_parameters(model: nn.Module) -> int:
    """Count a model's weights. Tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())
