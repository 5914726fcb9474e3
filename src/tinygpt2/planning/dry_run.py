"""Before a run: `plan_run` estimates its time, memory and disk space, `compile_step` compiles and times one step."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.training import TrainOptions
from tinygpt2.data.dataset import PackedDataset
from tinygpt2.errors import ConfigError
from tinygpt2.models.parameters import count_parameters, set_dropout
from tinygpt2.objectives.sparse import SparseForm
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.planning.batch_size import fit_batch
from tinygpt2.planning.memory_estimate import step_memory
from tinygpt2.runtime.devices import device_peak, float32_products, measured_rate
from tinygpt2.runtime.memory import free_memory, memory_in_use
from tinygpt2.training.job import Job, cast_teacher, prepared_job
from tinygpt2.training.step import Step
from tinygpt2.training.teacher_cache import cache_bytes
from tinygpt2.training.throughput import step_operations, step_seconds
from tinygpt2.utils.units import size

_REACHED = 0.4  # share of a device's rate that a whole step reaches: small models reach less, large ones more


@dataclass(frozen=True)
class RunPlan:
    """The size of a run. Memory (of one process), disk space and seconds are estimates.

    Attributes:
        eval_sequences: the held-out blocks of an evaluation.
        seconds: of training steps and evaluations together; `evaluation_seconds` are those of the evaluations.
    """

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
    precision: str
    memory_bytes: int
    memory_available_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    seconds: float
    training_seconds: float
    evaluation_seconds: float


@dataclass(frozen=True)
class CompiledStep:
    """The results of `compile_step`.

    Attributes:
        compile_seconds: the time of the first step, which compiles.
        step_seconds: the time of the second step.
        cache: the directory of the compiled code.
    """

    compile_seconds: float
    step_seconds: float
    cache: str


def plan_run(config: TrainOptions, data: PackedDataset | None = None) -> RunPlan:
    """Check a run's options and files, and estimate its time, memory and disk space (`--validate-only`).

    It loads the models' shapes but not their weights, and does not write any files.

    Args:
        config: of `pretrain`, `distill` or `finetune`.
        data: replaces the dataset that the configuration names.

    Raises:
        ConfigError, DataError, ModelError: an option, a dataset or a model is wrong, or the disk has too little space.
    """
    with prepared_job(config.model_copy(update={"validate_only": True}), data) as (job, accelerator):
        return _plan(job, accelerator)


def _plan(job: Job, accelerator: Accelerator) -> RunPlan:
    if job.config.auto_batch_size:
        fit_batch(job, accelerator)
    config, data = job.config, job.data
    processes = config.num_processes or accelerator.num_processes
    fixed, block = step_memory(job.model, job.teacher, job.weights, config, data.sequence_length)
    parameters, step_tokens = count_parameters(job.model), job.sequences(processes) * data.sequence_length
    device = accelerator.device
    # processes share one CPU, but each has its own GPU
    reached = _REACHED * (processes if device.type == "cuda" else 1)
    rate = reached * (device_peak(device, config.precision) or measured_rate(device, config.precision))
    with float32_products(tf32=False):  # as evaluation computes
        exact = reached * (device_peak(device, "fp32") or measured_rate(device, "fp32"))
    each = step_tokens * job.operations() / rate
    steps = _steps(job, processes, each, exact)
    training, evaluation = steps * each, _evaluation_seconds(job, steps, exact)
    # checkpoints with weights, AdamW's moments and perhaps masters or a mean: the newest `keep`, the best, a new one
    each_weight = 16 if config.quantize or config.average_tail else 12  # bytes
    disk, free = (
        each_weight * parameters * (config.keep + 2) + 4 * parameters + _cached(job),
        shutil.disk_usage(_existing(Path(config.out))).free,
    )
    if disk > free:
        raise ConfigError(
            f"--out {config.out}: the run needs about {size(disk)}, but {size(free)} are free",
            "free some space, or lower --keep",
        )
    return RunPlan(
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
        tokens=steps * step_tokens,
        learning_rate=job.peak_rate(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision=config.precision,
        memory_bytes=memory_in_use() + fixed + block * config.micro_batch_size,
        memory_available_bytes=free_memory(processes),
        disk_bytes=disk,
        disk_free_bytes=free,
        seconds=training + evaluation,
        training_seconds=training,
        evaluation_seconds=evaluation,
    )


def _steps(job: Job, processes: int, each: float, rate: float) -> int:
    """Return the number of optimizer steps; with --max-minutes, an estimate from the seconds of `each`.

    Args:
        rate: see `_evaluation_seconds`.
    """
    minutes, every = job.config.max_minutes, job.config.eval_every
    if minutes is None:
        return job.total_steps(processes)
    one = _evaluation_seconds(job, 1, rate)  # at the beginning and at the end
    between = (_evaluation_seconds(job, every + 1, rate) - one) / every if every else 0.0
    return max(1, int((60 * minutes - one) / (each + between)))


def _evaluation_seconds(job: Job, steps: int, rate: float) -> float:
    """Return the seconds of all evaluations of a run: only forward passes, in float32.

    Args:
        rate: operations per second in float32.
    """
    every, length = job.config.eval_every, job.evaluated.sequence_length
    during = math.ceil(steps / every) if every else 1
    student = step_operations(job.model.config, None, LossWeights(), length) / 3
    shape = None if job.teacher is None else job.teacher.shape
    teacher = 0 if shape is None else shape.operations(length) + 2 * shape.last_width * shape.vocabulary
    return len(job.evaluated) * length * ((during + (not job.new)) * student + teacher) / rate


def _cached(job: Job) -> int:
    """Return the bytes of the cache of the teacher's states, or 0 if the run does not use one."""
    config, teacher = job.config, job.teacher
    if teacher is None or not isinstance(config, DistillConfig) or config.teacher_cache is None:
        return 0
    form = SparseForm.of(config.teacher_cache_kind, job.model.config.vocab_size, config.temperature)
    return cache_bytes(teacher, job.data, form)


def _existing(path: Path) -> Path:
    path = path.resolve()
    return path if path.exists() else _existing(path.parent)


def compile_step(config: TrainOptions, data: PackedDataset | None = None) -> CompiledStep:
    """Compile one training step into torch's cache on disk, and time the step after it (`--compile-only`).

    Args, Raises:
        As `plan_run`; also ConfigError if there is no C++ compiler.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with prepared_job(config.model_copy(update={"compile_only": True}), data) as (job, accelerator):
        set_dropout(job.model, config.dropout)
        set_seed(config.seed)
        if job.teacher is not None:
            job.teacher.to(accelerator.device)
            cast_teacher(job, accelerator)  # as the run does, so that it finds this step in the cache
        module = accelerator.prepare(Step(job.model, job.teacher, job.weights, job.config, job.cache))
        module.train()
        blocks = job.config.micro_batch_size
        first, second = step_seconds(
            accelerator, module, None, job.data.train, blocks * accelerator.num_processes, blocks, steps=2
        )
        return CompiledStep(first, second, cache_dir())
