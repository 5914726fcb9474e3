"""Before a run: what it will take, the largest micro-batch that fits, and a compiled step."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from tinygpt2.config.training import DistillConfig
from tinygpt2.errors import ConfigError
from tinygpt2.models.loading import count_parameters
from tinygpt2.planning.memory_estimate import device_peak, measured_rate, step_memory
from tinygpt2.runtime.cpu import available_memory
from tinygpt2.training.loop import Job
from tinygpt2.training.step import Step, step_seconds
from tinygpt2.training.teacher_cache import cache_bytes
from tinygpt2.training.throughput import memory_in_use
from tinygpt2.utils.progress import say

_FILLED = 0.8  # of the memory that is there, at most
_REACHED = 0.4  # of a device's rate, by a whole step: between what small and large models reach


@dataclass(frozen=True)
class Plan:
    """What a run will take, as far as it can be known: memory of a process, disk and seconds are estimates."""

    command: str
    parameters: int
    teacher_parameters: int
    train_sequences: int
    eval_sequences: int
    sequence_length: int
    processes: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    steps: int
    tokens: int
    learning_rate: float
    device: str
    memory_bytes: int
    memory_available_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    seconds: float


@dataclass(frozen=True)
class Compiled:
    """What --compile-only did: seconds of the first step, which compiles, and of the next; where the cache is."""

    compile_seconds: float
    step_seconds: float
    cache: str


def make_plan(job: Job, accelerator: Accelerator) -> Plan:
    """Say what a run will take, from shapes alone.

    Raises:
        ConfigError: the shapes do not fit an objective, or there is too little space on the disk.
    """
    if job.config.auto_batch_size:
        fit_batch(job, accelerator)
    config, data = job.config, job.data
    processes = config.num_processes or accelerator.num_processes
    fixed, each = step_memory(job.model, job.teacher, job.weights, config, data.sequence_length)
    parameters, steps = count_parameters(job.model), job.total_steps(processes)
    tokens = steps * job.sequences(processes) * data.sequence_length
    device = accelerator.device
    rate = device_peak(device, config.precision) or measured_rate(device, config.precision)
    # processes share a CPU, and have a GPU each
    rate *= _REACHED * (processes if device.type == "cuda" else 1)
    # weights and AdamW's moments: the newest, the best, and one that is being written
    disk, free = (
        12 * parameters * (config.keep + 2) + 4 * parameters + _cached(job),
        shutil.disk_usage(_existing(Path(config.out))).free,
    )
    if disk > free:
        raise ConfigError(
            f"--out {config.out}: the run needs about {disk / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            "free some space, or lower --keep",
        )
    return Plan(
        command=job.command,
        parameters=parameters,
        teacher_parameters=0 if job.teacher is None else count_parameters(job.teacher),
        train_sequences=len(data.train),
        eval_sequences=len(job.evaluated),
        sequence_length=data.sequence_length,
        processes=processes,
        micro_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        steps=steps,
        tokens=tokens,
        learning_rate=job.peak_rate(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        memory_bytes=memory_in_use() + fixed + each * config.micro_batch_size,
        memory_available_bytes=available_memory(),
        disk_bytes=disk,
        disk_free_bytes=free,
        seconds=tokens * job.operations() / rate,
    )


def _cached(job: Job) -> int:
    """Return the bytes of the cache of the teacher's states, if there is to be one."""
    config, teacher = job.config, job.teacher
    if teacher is None or not isinstance(config, DistillConfig) or config.teacher_cache is None:
        return 0
    return cache_bytes(teacher.config, job.data)


def _existing(path: Path) -> Path:
    path = path.resolve()
    return path if path.exists() else _existing(path.parent)


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


def compile_step(job: Job, accelerator: Accelerator, module: Step) -> Compiled:
    """Compile one step's forward and backward passes into torch's cache on disk, and measure a step after that."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    module = accelerator.prepare(module)
    module.train()
    size = job.config.micro_batch_size
    first, second = step_seconds(
        accelerator, module, None, job.data.train, size * accelerator.num_processes, size, steps=2
    )
    return Compiled(first, second, cache_dir())
