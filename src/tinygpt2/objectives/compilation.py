"""Which devices run the losses as compiled passes, and what happens where torch cannot compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tinygpt2.errors import one_line
from tinygpt2.utils.progress import warn

Pass = Callable[..., tuple[Tensor, Tensor]]

_failed: set[Pass] = set()


def compiles_losses(device: str) -> bool:
    """Return whether the losses of a chunk run as one compiled pass on this type of device.

    On a GPU, an eager pass moves every intermediate result through memory, which takes half of a training step. On a
    CPU, the eager passes over a few rows work in its cache, and nothing has to be compiled first.
    """
    return device == "cuda"


def compiled_or_eager(function: Pass, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Call a pure function compiled; where torch cannot compile it, warn once and call it as it is.

    One graph serves every number of rows of the tensors among the arguments.
    """
    if function in _failed:
        return function(*arguments)
    for argument in arguments:
        if isinstance(argument, Tensor):
            torch._dynamo.maybe_mark_dynamic(argument, 0)
    try:
        return _compiled(function)(*arguments)
    except torch._dynamo.exc.TorchDynamoException as error:
        _failed.add(function)
        warn(
            f"torch cannot compile the losses here, so they run slower: {one_line(error)}. It needs Triton, a C "
            "compiler and Python's header files"
        )
        return function(*arguments)


@cache
def _compiled(function: Pass) -> Pass:
    # Intermediate results are computed again where they are needed, and never stored: the passes wait for memory.
    return torch.compile(function, options={"realize_reads_threshold": 1000, "realize_opcount_threshold": 1000})
