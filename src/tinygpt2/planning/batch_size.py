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

_FILLED = 0.8  # of the memory that is there, at most


def fit_batch(job: Job, accelerator: Accelerator, module: Step | None = None) -> None:
    """Give the job the largest micro-batch that fits, with accumulation that keeps the global batch.

    On a GPU by trying from the largest down; on a CPU, where a trial that fails takes the process or a neighbour with
    it, and without a module by `step_memory`.

    Raises:
        ConfigError: not even one block fits.
    """
    config, length = job.config, job.data.sequence_length
    whole = config.micro_batch_size * config.gradient_accumulation_steps
    sizes = [size for size in range(whole, 0, -1) if whole % size == 0]
    if accelerator.device.type == "cuda" and module is not None:
        found = next((size for size in sizes if _fits(job, accelerator, module, size)), 0)
    else:
        fixed, each = step_memory(job.model, job.teacher, job.weights, config, length)
        on_gpu = accelerator.device.type == "cuda"
        budget = torch.cuda.mem_get_info()[0] if on_gpu else available_memory() / accelerator.num_processes
        budget *= _FILLED
        found = next((size for size in sizes if fixed + each * size <= budget), 0)
    found = int(accelerator.gather(torch.tensor([found], device=accelerator.device)).min())
    if not found:
        raise ConfigError(
            f"not even one block of {length} tokens fits into memory",
            "add --gradient-checkpointing or --precision bf16, or pregenerate shorter blocks",
        )
    job.config = config.model_copy(update={"micro_batch_size": found, "gradient_accumulation_steps": whole // found})
    accelerator.gradient_accumulation_steps = whole // found
    say(f"--auto-batch-size: {found} blocks at a time, {whole // found} times a step")


def _fits(job: Job, accelerator: Accelerator, module: Step, size: int) -> bool:
    """Try one micro-batch, with room for what AdamW will hold."""
    moments: list[torch.Tensor] = []
    blocks = [index % len(job.data.train) for index in range(size)]
    try:
        module.to(accelerator.device).train()
        moments = [torch.empty_like(parameter) for parameter in module.parameters() for _ in range(2)]
        for _ in range(2):  # the second time with all gradients there
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
