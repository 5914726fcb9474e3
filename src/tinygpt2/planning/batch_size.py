"""The largest micro-batch that fits into memory."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from tinygpt2.errors import ConfigError
from tinygpt2.planning.memory_estimate import step_memory
from tinygpt2.runtime.memory import available_memory
from tinygpt2.training.job import Job
from tinygpt2.training.step import Step
from tinygpt2.utils.progress import say

_FILLED = 0.8  # largest share of the free memory to use


def fit_batch(job: Job, accelerator: Accelerator, module: Step | None = None) -> None:
    """Set the job's micro-batch to the largest that fits into memory; accumulation keeps the global batch the same.

    On a GPU, sizes are tried from the largest down. On a CPU, or without a module, the size is estimated with
    `step_memory`: on a CPU, a failed trial could kill this process or another one.

    Raises:
        ConfigError: not even one block fits.
    """
    config, length = job.config, job.data.sequence_length
    whole = config.micro_batch_size * config.gradient_accumulation_steps
    sizes = [size for size in range(whole, 0, -1) if whole % size == 0]
    if accelerator.device.type == "cuda" and module is not None:
        largest = next((size for size in sizes if _fits(job, accelerator, module, size)), 0)
    else:
        fixed, each = step_memory(job.model, job.teacher, job.weights, config, length)
        on_gpu = accelerator.device.type == "cuda"
        budget = torch.cuda.mem_get_info()[0] if on_gpu else available_memory() / accelerator.num_processes
        budget *= _FILLED
        largest = next((size for size in sizes if fixed + each * size <= budget), 0)
    largest = int(accelerator.gather(torch.tensor([largest], device=accelerator.device)).min())
    if not largest:
        raise ConfigError(
            f"not even one block of {length} tokens fits into memory",
            "add --gradient-checkpointing or --precision bf16, or run tinygpt2 pregenerate with a shorter "
            "--sequence-length",
        )
    turns = whole // largest
    job.config = config.model_copy(update={"micro_batch_size": largest, "gradient_accumulation_steps": turns})
    accelerator.gradient_accumulation_steps = turns
    say(f"--auto-batch-size: {largest} blocks in a micro-batch, {turns} micro-batches in a step")


def _fits(job: Job, accelerator: Accelerator, module: Step, size: int) -> bool:
    """Return whether a micro-batch of this size fits into the GPU's memory, with room for AdamW's two moments."""
    moments: list[torch.Tensor] = []
    blocks = [index % len(job.data.train) for index in range(size)]
    try:
        module.to(accelerator.device).train()
        moments = [torch.empty_like(parameter) for parameter in module.parameters() for _ in range(2)]
        for _ in range(2):  # the second time, memory also holds all gradients
            with accelerator.autocast():
                loss, _ = module(*job.data.train.batch(blocks).to(accelerator.device))
            loss.backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        del moments
        module.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
