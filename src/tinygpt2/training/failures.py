"""Errors of a training step and what helps to find the cause: NaN, infinity, too little memory, a GPU that fails."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from tinygpt2.config.training import TrainOptions
from tinygpt2.errors import (
    ConfigError,
    DivergedError,
    MachineError,
    gpu_failure,
    one_line,
    out_of_gpu_memory,
    out_of_memory,
)
from tinygpt2.runtime.memory import available_memory, memory_in_use
from tinygpt2.training.state import RunState
from tinygpt2.utils.progress import warn
from tinygpt2.utils.units import size

_SHOWN = 32  # block numbers in a message
_CONTINUE = "The checkpoints saved so far are intact: add --resume to continue from the newest"


def may_step(
    accelerator: Accelerator,
    state: RunState,
    terms: dict[str, float],
    norm: float,
    indices: list[int],
    config: TrainOptions,
) -> bool:
    """Return whether the optimizer may take this step; if not, count it in `state.skipped`.

    A step whose scaled gradients overflow is not taken either, but it does not count: the loss scaler lowers its scale.

    Args:
        terms: loss and parts, the means over the global batch.
        norm: of the gradient.
        indices: of the batch's blocks.

    Raises:
        DivergedError: loss or gradient is NaN or infinite, and --skip-non-finite does not allow another skipped step.
    """
    if math.isfinite(terms["loss"]) and math.isfinite(norm):
        return True
    # infinite gradients are normal while fp16's loss scaler lowers its scale; at a scale of 1 they are an error
    if math.isfinite(terms["loss"]) and accelerator.scaler is not None and accelerator.scaler.get_scale() > 1:
        return False
    state.skipped += 1
    parts = ", ".join(f"{name} {term:g}" for name, term in terms.items())
    shown = ", ".join(map(str, indices[:_SHOWN])) + (f" and {len(indices) - _SHOWN} more" if indices[_SHOWN:] else "")
    values = f"{parts}, gradient norm {norm:g}; training blocks {shown}"
    message = f"the loss or the gradient of step {state.step + 1} is NaN or infinite: {values}"
    if state.skipped <= config.skip_non_finite:
        warn(f"{message}: skipped ({state.skipped} of --skip-non-finite {config.skip_non_finite})")
        return False
    raise DivergedError(
        message,
        "lower --learning-rate, raise --warmup-ratio or lower --grad-clip; if it happens rarely, skip up to N such "
        "steps with --skip-non-finite N. The checkpoints saved so far are intact",
    )


@contextmanager
def step_explained(config: TrainOptions, length: int) -> Iterator[None]:
    """Turn errors of memory, GPU and driver into ones that say what helps, such as the options which reduce memory.

    Raises:
        MachineError: there was not enough memory for a step, or the GPU failed.
        DataError: an operation on the GPU refused its input.
        ConfigError: --deterministic, and an operation has no algorithm that repeats its result.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise _no_memory(config, length, on_gpu=out_of_gpu_memory(error)) from error
        if failure := gpu_failure(error, _CONTINUE):
            raise failure from error
        if config.deterministic and "deterministic" in str(error):
            raise ConfigError(
                f"--deterministic: {one_line(error, 200)}", "run it without --deterministic, in another directory"
            ) from error
        raise


def _no_memory(config: TrainOptions, length: int, *, on_gpu: bool) -> MachineError:
    lower = [f"--micro-batch-size (with more --gradient-accumulation-steps; now {config.micro_batch_size})"]
    lower.append("--logit-chunk" + (f" (now {config.logit_chunk})" if config.logit_chunk else ""))
    lower += [] if config.gradient_checkpointing else ["or add --gradient-checkpointing"]
    other = " A new run with --precision bf16 needs less, too." if config.precision == "fp32" else ""
    return MachineError(
        f"out of memory in a step of {config.micro_batch_size} x {length} tokens: {_usage(on_gpu=on_gpu)}",
        f"lower {', '.join(lower)}; --auto-batch-size finds a size that fits. {_CONTINUE}.{other}",
    )


def _usage(*, on_gpu: bool) -> str:
    """Return how much memory was in use and free."""
    if not on_gpu:
        return f"the process held {size(memory_in_use())}, {size(available_memory())} were free"
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # after some errors, the driver answers nothing more
        return "the GPU no longer says how much of its memory was in use"
    return f"{size(total - free)} of the GPU's {size(total)} were in use"
