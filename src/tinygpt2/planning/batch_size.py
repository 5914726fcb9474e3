"""The largest micro-batch that fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from tinygpt2.config.yaml_files import read_yaml
from tinygpt2.errors import ConfigError, out_of_gpu_memory
from tinygpt2.planning.memory_estimate import step_memory
from tinygpt2.runtime.memory import free_memory
from tinygpt2.training.job import Job
from tinygpt2.training.state import RUN_FILE
from tinygpt2.training.step import Step
from tinygpt2.utils.progress import say

_FILLED = 0.8  # largest share of the free memory to use by an estimate
_TRIED = 0.9  # largest share of a GPU's free memory to use in a trial: a run fragments it, and evaluates


def fit_batch(job: Job, accelerator: Accelerator, module: Step | None = None) -> None:
    """Set the job's micro-batch to the largest that fits into memory; accumulation keeps the global batch the same.

    On a GPU, sizes are tried, from the smallest up. On a CPU, or without a module, the size is estimated with
    `step_memory`: on a CPU, a failed trial could kill this process or another one.

    Raises:
        ConfigError: not even one block fits.
    """
    config, length = job.config, job.data.sequence_length
    whole = config.micro_batch_size * config.gradient_accumulation_steps
    sizes = [size for size in range(1, whole + 1) if whole % size == 0]
    if accelerator.device.type == "cuda" and module is not None:
        with _margin(accelerator.device):
            largest = largest_fitting(sizes, lambda size: _fits(job, accelerator, module, size))
        if config.compile:  # the next size would otherwise be compiled for all sizes, which is slower
            torch.compiler.reset()
    else:
        fixed, each = step_memory(job.model, job.teacher, job.weights, config, length)
        budget = _FILLED * free_memory(max(accelerator.num_processes, config.num_processes or 1))
        largest = max((size for size in sizes if fixed + each * size <= budget), default=0)
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


def fitted_before(job: Job, accelerator: Accelerator) -> bool:
    """With --resume, use the micro-batch that --auto-batch-size chose at first; return whether there was one.

    So the resumed run computes the same as the run would have without the interruption.
    """
    file, config = Path(job.config.out) / RUN_FILE, job.config
    if not (config.resume and file.is_file()):
        return False
    earlier = read_yaml(file)
    size, turns = earlier["micro_batch_size"], earlier["gradient_accumulation_steps"]
    if not earlier["auto_batch_size"] or size * turns != config.micro_batch_size * config.gradient_accumulation_steps:
        return False
    job.config = config.model_copy(update={"micro_batch_size": size, "gradient_accumulation_steps": turns})
    accelerator.gradient_accumulation_steps = turns
    return True


def largest_fitting(sizes: list[int], fits: Callable[[int], bool]) -> int:
    """Return the largest of the sizes that fits, or 0; sizes above one that does not fit do not fit either.

    The sizes are doubled, as far as there are such sizes, until one does not fit; then the interval between is halved.

    Args:
        sizes: from the smallest to the largest.
        fits: tries a size.
    """
    good, bad, place = 0, len(sizes), 0  # the first `good` sizes fit, and those from `bad` on do not
    while good < bad:
        if fits(sizes[place]):
            good = place + 1
        else:
            bad = place
        doubled = [index for index in range(good, bad) if sizes[index] <= 2 * sizes[good - 1]] if good else []
        place = max([good, *doubled]) if bad == len(sizes) else (good + bad) // 2
    return sizes[good - 1] if good else 0


@contextmanager
def _margin(device: torch.device) -> Iterator[None]:
    """While the block runs, let this process use only a share of the memory that it holds or that is free."""
    free, total = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(_TRIED * usable / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _fits(job: Job, accelerator: Accelerator, module: Step, size: int) -> bool:
    """Return whether a micro-batch of this size fits into the GPU's memory."""
    try:
        _try(job, accelerator, module, size)
        fits = True
    except RuntimeError as error:
        if not out_of_gpu_memory(error):
            raise
        fits = False
    # here the trial's tensors are gone: an error would have kept them until now
    module.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return fits


def _try(job: Job, accelerator: Accelerator, module: Step, size: int) -> None:
    """Compute the gradients of a micro-batch, with room for AdamW's moments, DDP's buckets, masters and means."""
    module.to(accelerator.device).train()
    copies = 2 + (accelerator.num_processes > 1) + (job.config.quantize is not None)
    copies += 2 if job.config.average_tail else 0  # an evaluation exchanges the weights for their mean
    room = [torch.empty_like(one) for one in module.parameters() if one.requires_grad for _ in range(copies)]
    blocks = [index % len(job.data.train) for index in range(size)]
    device = accelerator.device
    batch = job.data.train.batch(blocks)
    read = module.read_for_teacher(batch, blocks, device)
    batch, states = batch.to(device), None if read is None else read.to(device)
    for _ in range(2):  # the second time, memory also holds all gradients
        with accelerator.autocast():
            loss, _ = module(**batch._asdict(), read=states)
        loss.backward()
    del room
