"""`distill --plan`: find which student and how many steps fit into a given time, by timing a few steps."""

from __future__ import annotations

import math
import shlex
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import GPT2Config

from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.training import dataset_shares
from tinygpt2.data.dataset import PackedDataset
from tinygpt2.errors import ConfigError
from tinygpt2.models.loading import load_model
from tinygpt2.models.parameters import count_parameters, freeze, set_dropout
from tinygpt2.objectives.combined import LossWeights
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.runtime.devices import computes_on_device
from tinygpt2.runtime.processes import launched
from tinygpt2.training.failures import memory_explained
from tinygpt2.training.job import Job, distillation_job
from tinygpt2.training.optimizers import make_optimizer
from tinygpt2.training.preparation import TrainingSetup, training_setup
from tinygpt2.training.schedule import MAX_PASSES
from tinygpt2.training.step import Step, step_seconds
from tinygpt2.utils.progress import say

DEFAULT_MINUTES = 60.0
_TIMED = 3  # steps to time, after one that warms up
_KEPT = 0.9  # share of the time for steps and evaluations; start, checkpoints and slower steps need the rest
_DEPTHS = (3 / 4, 1 / 2, 1 / 3, 1 / 6)  # shares of the teacher's layers


@dataclass(frozen=True)
class Candidate:
    """A student that was timed, and the training that fits into the time.

    Attributes:
        student: the given student, or a description of a cut of the teacher, such as "6 of 12 layers".
        num_layers: the layers of a cut; None for a student that was given.
        tokens_per_second: the speed of training steps.
        passes: over the data.
    """

    student: str
    num_layers: int | None
    parameters: int
    tokens_per_second: float
    steps: int
    tokens: int
    passes: float
    learning_rate: float


@dataclass(frozen=True)
class BudgetPlan:
    """The students that were timed, the chosen one, and the commands that train it within the time."""

    minutes: float
    candidates: list[Candidate]
    chosen: str
    commands: list[str]


def cuts(teacher: GPT2Config) -> list[int]:
    """Return the numbers of layers to try, largest first."""
    depths = {max(1, round(share * teacher.n_layer)) for share in _DEPTHS}
    return sorted((depth for depth in depths if depth < teacher.n_layer), reverse=True)


@computes_on_device
def plan_budget(config: DistillConfig, data: PackedDataset | None = None) -> BudgetPlan:
    """Find the student and the number of steps that fit into `config.budget_minutes` (`distill --plan`).

    A few steps of each candidate are timed. The candidates are `config.student`, or several cuts of the teacher. The
    choice is the largest student that sees at least as many tokens as it has parameters. A student that is cut from
    the teacher starts with the teacher's weights, so a larger one is better from the first step. One token for each
    parameter (a rule of thumb) makes sure that it also learns. If no student sees that many tokens, the smallest is
    chosen. At most four passes over the data are planned (see `schedule.passes_over_data`).

    Args:
        config: with `plan=True`, which makes `student` optional.
        data: replaces the dataset that `config.data` names.

    Raises:
        ConfigError: not even one step fits into the time, or there is more than one process.
        DataError, ModelError: the dataset or a model is wrong.
    """
    if launched():
        raise ConfigError("--plan uses one process", "run the command without a launcher")
    config = config.model_copy(update={"plan": True})
    with fast_products(), training_setup(config, LossWeights.of(config)) as setup:
        return _choose(_jobs(config, data, setup), setup.accelerator, config)


def _jobs(
    config: DistillConfig, data: PackedDataset | None, setup: TrainingSetup
) -> Iterator[tuple[str, int | None, Job]]:
    """Yield each candidate's name, number of layers and job: the given student, or cuts of the teacher."""
    if config.student is not None:
        yield config.student, None, distillation_job(config, data, setup)
        return
    teacher, _ = load_model(config.teacher or "", "teacher", allow_pickle=config.allow_pickle, hollow=True)
    for layers in cuts(teacher.config):
        shape = GPT2Config.from_dict({**teacher.config.to_dict(), "n_layer": layers})
        # with random weights: its steps take as long as those of the real cut
        yield f"{layers} of {teacher.config.n_layer} layers", layers, distillation_job(config, data, setup, shape)


def _choose(jobs: Iterator[tuple[str, int | None, Job]], accelerator: Accelerator, config: DistillConfig) -> BudgetPlan:
    """Time every candidate, and choose one."""
    minutes = config.budget_minutes or DEFAULT_MINUTES
    candidates = []
    for name, layers, job in jobs:
        with memory_explained(config, job.data.sequence_length):
            candidates.append(_timed(name, layers, job, accelerator, minutes))
        del job  # free its memory before the next job is made
        accelerator.free_memory()
    if not candidates:
        raise ConfigError("a teacher with one layer cannot be cut in depth", "give a student with --student")
    able = [candidate for candidate in candidates if candidate.steps]
    if not able:
        raise ConfigError(
            f"not one step fits into {minutes:g} minutes", "raise --budget-minutes, or lower --micro-batch-size"
        )
    seeing = [candidate for candidate in able if candidate.tokens >= candidate.parameters]
    chosen = max(seeing, key=lambda one: one.parameters) if seeing else min(able, key=lambda one: one.parameters)
    return BudgetPlan(minutes, candidates, chosen.student, _commands(config, chosen))


def _timed(name: str, layers: int | None, job: Job, accelerator: Accelerator, minutes: float) -> Candidate:
    """Time a few steps like those of the training loop, and compute how many fit into the time."""
    config, data, parameters = job.config, job.data, count_parameters(job.model)
    say(f"timing {name}")
    freeze(job.model, config.freeze)
    set_dropout(job.model, config.dropout)
    if job.teacher is not None:
        job.teacher.to(accelerator.device)
    step = Step(job.model, job.teacher, job.weights, config)
    module, optimizer = accelerator.prepare(step, make_optimizer(step, config))
    module.train()
    sequences = job.sequences(accelerator.num_processes)
    size, count = config.micro_batch_size, _TIMED + 1
    _, *seconds = step_seconds(accelerator, module, optimizer, data.train, sequences, size, count)
    each = statistics.median(seconds)
    evaluation = _evaluation(job, accelerator, module)
    between = evaluation / config.eval_every if config.eval_every else 0.0
    steps = max(0, int((_KEPT * 60 * minutes - evaluation) / (each + between)))
    steps = min(steps, math.ceil(MAX_PASSES * len(data.train) / sequences))
    tokens, passes = sequences * data.sequence_length, steps * sequences / len(data.train)
    return Candidate(name, layers, parameters, tokens / each, steps, steps * tokens, passes, job.peak_rate())


def _evaluation(job: Job, accelerator: Accelerator, module: torch.nn.Module) -> float:
    """Return the estimated seconds of an evaluation, from those of its first batch."""
    count = len(job.evaluated)
    size = min(job.config.micro_batch_size, count)
    if not count:
        return 0.0
    module.eval()
    batch = job.evaluated.batch(range(size)).to(accelerator.device)
    started = time.perf_counter()
    with torch.no_grad():
        module(batch.input_ids)[0].sum().item()
    return (time.perf_counter() - started) * count / size


def _commands(config: DistillConfig, chosen: Candidate) -> list[str]:
    student, commands = config.student, []
    if chosen.num_layers is not None:
        student = f"{Path(config.out)}-start"
        data = next(iter(dataset_shares(config.data)))
        words = ["--teacher", str(config.teacher), "--num-layers", str(chosen.num_layers), "--out", student]
        commands.append(f"tinygpt2 truncate-student {shlex.join([*words, '--refit', '--data', data])}")
    changed = {"student": student, "plan": False, "budget_minutes": None, "max_steps": chosen.steps}
    return [*commands, f"tinygpt2 distill {config.model_copy(update=changed).flags()}"]
