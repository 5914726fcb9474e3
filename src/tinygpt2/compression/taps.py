"""See what the modules of a model read while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from tinygpt2.models.activations import collect_activations


def tap(
    model: GPT2LMHeadModel, ids: Int[Tensor, "B T"], inputs: Mapping[nn.Module, Callable[[Tensor], object]]
) -> Float[Tensor, "B T D"]:
    """Run the transformer once, pass the input of each given module to its function, and return the last state."""
    with tapped(inputs):
        layers = len(model.transformer.h)
        return collect_activations(model, ids, states=[layers]).states[layers]


@contextmanager
def tapped(inputs: Mapping[nn.Module, Callable[[Tensor], object]]) -> Iterator[None]:
    """Pass what each given module reads to its function, in every forward pass within."""
    with ExitStack() as hooks:
        for module, see in inputs.items():
            hooks.enter_context(removed(module.register_forward_pre_hook(lambda _, x, see=see: _shown(see, x[0]))))
        yield


def _shown(see: Callable[[Tensor], object], x: Tensor) -> None:
    see(x.detach())  # return nothing, because a hook's return value would replace the module's input


@contextmanager
def removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove a hook at the end."""
    try:
        yield
    finally:
        handle.remove()
