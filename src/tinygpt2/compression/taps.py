"""See what the modules of a model read while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from tinygpt2.models.activations import collect_activations


def tap(
    model: GPT2LMHeadModel, ids: Int[Tensor, "B T"], inputs: dict[nn.Module, Callable[[Tensor], object]]
) -> Float[Tensor, "B T D"]:
    """Run the transformer once, pass the input of each given module to its function, and return the last state."""
    with ExitStack() as hooks:
        for module, see in inputs.items():
            hooks.enter_context(removed(module.register_forward_pre_hook(lambda _, x, see=see: _shown(see, x[0]))))
        layers = len(model.transformer.h)
        return collect_activations(model, ids, states=[layers]).states[layers]


def _shown(see: Callable[[Tensor], object], x: Tensor) -> None:
    see(x)  # return nothing, because a hook's return value would replace the module's input


@contextmanager
def removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove a hook at the end."""
    try:
        yield
    finally:
        handle.remove()
