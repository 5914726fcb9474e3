"""`--plan`: find how many steps fit into a given time, and for `distill` which student, by timing a few steps."""

from __future__ import annotations

import math
import shlex
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.alignment.teacher import other_tokens
from tinygpt2.config.common import FINALISTS, ROUND_RUNS, STEP_TOKENS, STEPS
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.training import FinetuneConfig, PretrainConfig, TrainOptions, dataset_shares
from tinygpt2.data.dataset import PackedDataset
from tinygpt2.data.mixture import load_datasets
from tinygpt2.errors import ConfigError, MachineError
from tinygpt2.models.loading import load_causal_lm
from tinygpt2.models.parameters import count_parameters, freeze, set_dropout
from tinygpt2.planning.scaling_law import Law
from tinygpt2.runtime.devices import computes_on_device
from tinygpt2.runtime.processes import launched
from tinygpt2.training.failures import step_explained
from tinygpt2.training.job import Job, cast_teacher, distillation_job, loss_weights, make_job, settle_batch
from tinygpt2.training.optimizers import make_optimizer
from tinygpt2.training.own_text.source import OwnText
from tinygpt2.training.preparation import TrainingSetup, training_arithmetic, training_setup
from tinygpt2.training.resuming import with_precision
from tinygpt2.training.schedule import MAX_PASSES, proposed_batch_tokens
from tinygpt2.training.step import Step, StepData, TeacherEvaluation
from tinygpt2.training.throughput import evaluation_seconds, step_seconds
from tinygpt2.utils.files import absolute
from tinygpt2.utils.progress import say
from tinygpt2.workflows.train import TrainResult, distill, finetune, pretrain

DEFAULT_MINUTES = 60.0
_TIMED = 3  # steps to time, after one that warms up
_NO_PLAN = {"plan": False, "budget_minutes": None, "pilot": False, "target_perplexity": None}
_PILOTS = (1 / 48, 1 / 24, 1 / 12)  # of the planned steps
_KEPT = 0.9  # share of the time for steps and evaluations; start, checkpoints and slower steps need the rest
_SEARCHING = 0.25  # largest share of the time for a search for the student's shape
_FITTING = 2.0  # time of a whole search, divided by that of its training steps: a rule of thumb
_DEPTHS = (3 / 4, 1 / 2, 1 / 3, 1 / 6)  # shares of the teacher's layers


@dataclass(frozen=True)
class Candidate:
    """A model that was timed, and the training that fits into the time.

    Attributes:
        student: the given model, or a description of a cut of the teacher, such as "6 of 12 layers".
        num_layers: the layers of a cut; None for a model that was given.
        tokens_per_second: the speed of training steps.
        passes: over the data.
        evaluation_seconds: the part of the time that all evaluations take.
        fixed_seconds: of the evaluations that a run of any length has: those before its first and after its last step.
        batch_tokens: a proposal for --batch-tokens, by the length of the run (see `schedule.proposed_batch_tokens`), in
            whole micro-batches. It is only a proposal: the steps were timed with the batch that the options give.
    """

    student: str
    num_layers: int | None
    parameters: int
    tokens_per_second: float
    steps: int
    tokens: int
    passes: float
    learning_rate: float
    evaluation_seconds: float
    fixed_seconds: float
    batch_tokens: int


@dataclass(frozen=True)
class LossPrediction:
    """The held-out loss of the planned run, predicted from short ones (`--pilot`); see `planning.scaling_law.Law`.

    Attributes:
        pilots: tokens and held-out loss of each short run, in nats per token.
        loss: predicted for the planned run; None if it cannot be predicted.
        error: its standard error, in nats per token.
        note: why there is no prediction, or what it leaves out.
        target_tokens, target_minutes: until the loss of --target-perplexity is predicted; None without that option, or
            if this is too far away to be predicted.
    """

    pilots: list[tuple[int, float]]
    loss: float | None = None
    error: float | None = None
    note: str | None = None
    target_tokens: int | None = None
    target_minutes: float | None = None


@dataclass(frozen=True)
class BudgetPlan:
    """The models that were timed in a precision, the chosen one, and the commands that train it within the time.

    Attributes:
        search_seconds: about how long the first command looks for the best student with as many parameters as the
            chosen cut; None if the time is too short for that, and the student is the cut itself.
        prediction: with --pilot.
    """

    minutes: float
    precision: str
    candidates: list[Candidate]
    chosen: str
    commands: list[str]
    search_seconds: float | None = None
    prediction: LossPrediction | None = None


def cuts(teacher: GPT2Config) -> list[int]:
    """Return the numbers of layers to try, largest first."""
    depths = {max(1, round(share * teacher.n_layer)) for share in _DEPTHS}
    return sorted((depth for depth in depths if depth < teacher.n_layer), reverse=True)


@computes_on_device
def plan_budget(config: TrainOptions, data: PackedDataset | None = None) -> BudgetPlan:
    """Find the number of steps that fit into `config.budget_minutes`, and for `distill` the student (`--plan`).

    A few steps and a batch of the evaluation are timed. `distill` without a student times several cuts of the teacher.
    Its choice is the largest student that sees at least as many tokens as it has parameters. A student that is cut from
    the teacher starts with the teacher's weights, so a larger one is better from the first step. One token for each
    parameter (a rule of thumb) makes sure that it also learns. If no student sees that many tokens, the smallest is
    chosen. Where the time allows it, the first command looks for the best student with as many parameters, which need
    not be a cut in depth. At most four passes over the data are planned (see `schedule.passes_over_data`).

    With `pilot`, three short runs follow, and from their held-out losses a prediction of that of the planned run.

    Args:
        config: of `pretrain`, `distill` or `finetune`, with `plan=True`, which makes the student optional.
        data: replaces the dataset that `config.data` names.

    Raises:
        ConfigError: not even one step fits into the time, or there is more than one process.
        MachineError: no candidate fits into memory.
        DataError, ModelError: the dataset or a model is wrong.
    """
    if launched():
        raise ConfigError("--plan uses one process", "run the command without a launcher")
    config = with_precision(config.model_copy(update={"plan": True}))
    with training_arithmetic(config), training_setup(config, loss_weights(config)) as setup:
        plan = _choose(_jobs(config, data, setup), setup.accelerator, config)
    return replace(plan, prediction=_predicted(plan, config, data)) if config.pilot else plan


def _jobs(
    config: TrainOptions, data: PackedDataset | None, setup: TrainingSetup
) -> Iterator[tuple[str, int | None, Job]]:
    """Yield each candidate's name, number of layers and job: the given model, or cuts of the teacher."""
    if not isinstance(config, DistillConfig) or config.student is not None:
        yield _given(config), None, make_job(config, data, setup)
        return
    teacher, _ = load_causal_lm(config.teachers[0], "teacher", allow_pickle=config.allow_pickle, hollow=True)
    if not isinstance(teacher, GPT2LMHeadModel):
        raise ConfigError(
            f"--plan without --student times cuts of a GPT-2, and the teacher is a {type(teacher).__name__}",
            "give a student with --student, such as a preset",
        )
    data = data or load_datasets(config.data)  # once for all cuts
    if other_tokens(config, data) is not None:
        raise ConfigError(
            "--plan without --student times cuts that have the teacher's tokens, and the data has others",
            "give a student with --student",
        )
    for layers in cuts(teacher.config):
        shape = GPT2Config.from_dict({**teacher.config.to_dict(), "n_layer": layers})
        # with random weights: its steps take as long as those of the real cut
        yield f"{layers} of {teacher.config.n_layer} layers", layers, distillation_job(config, data, setup, shape)


def _given(config: TrainOptions) -> str:
    """Return the name of the model that a run was told to train."""
    shape = config.shape if isinstance(config, PretrainConfig) else None
    return absolute(str(shape or getattr(config, "student" if isinstance(config, DistillConfig) else "model")))


def _choose(jobs: Iterator[tuple[str, int | None, Job]], accelerator: Accelerator, config: TrainOptions) -> BudgetPlan:
    """Time every candidate, and choose one."""
    minutes = config.budget_minutes or DEFAULT_MINUTES
    candidates, failure, command = [], None, ""
    for name, layers, job in jobs:
        command = job.command
        try:
            with step_explained(config, job.data.sequence_length):
                candidates.append(_timed(name, layers, job, accelerator, minutes))
        except MachineError as error:
            failure = MachineError(error.message, error.hint)  # without the traceback, which holds the step's memory
            say(f"{name} is left out: {error.message}")
        del job  # free its memory before the next job is made
        accelerator.free_memory()
    if not candidates and failure is not None:
        raise failure
    if not candidates:
        raise ConfigError("a teacher with one layer cannot be cut in depth", "give a student with --student")
    able = [candidate for candidate in candidates if candidate.steps]
    if not able:
        raise ConfigError(
            f"not one step fits into {minutes:g} minutes", "raise --budget-minutes, or lower --micro-batch-size"
        )
    seeing = [candidate for candidate in able if candidate.tokens >= candidate.parameters]
    chosen = max(seeing, key=lambda one: one.parameters) if seeing else min(able, key=lambda one: one.parameters)
    searching = _search_seconds(chosen, minutes)
    commands = _commands(command, config, chosen, _steps_after(chosen, minutes, searching), searching is not None)
    return BudgetPlan(minutes, config.precision, candidates, chosen.student, commands, searching)


def _search_seconds(chosen: Candidate, minutes: float) -> float | None:
    """Return the time for finding the best shape of a cut's size; None if the training could not do without it."""
    if chosen.num_layers is None:
        return None
    seconds = _FITTING * (FINALISTS + ROUND_RUNS) * STEPS * STEP_TOKENS / chosen.tokens_per_second
    steps = _steps_after(chosen, minutes, seconds)
    enough = steps * chosen.tokens / chosen.steps >= min(chosen.tokens, chosen.parameters)
    return seconds if enough and seconds <= _SEARCHING * 60 * minutes else None


def _steps_after(chosen: Candidate, minutes: float, searching: float | None) -> int:
    """Return the steps that fit into the time after a search."""
    if searching is None:
        return chosen.steps
    each = chosen.tokens / chosen.steps / chosen.tokens_per_second
    return min(chosen.steps, int((_KEPT * 60 * minutes - chosen.evaluation_seconds - searching) / each))


def _timed(name: str, layers: int | None, job: Job, accelerator: Accelerator, minutes: float) -> Candidate:
    """Time a few steps like those of the training loop, and compute how many fit into the time."""
    settle_batch(job, accelerator)
    config, data, parameters = job.config, job.data, count_parameters(job.model)
    say(f"timing {name}")
    freeze(job.model, config.freeze)
    set_dropout(job.model, config.dropout)
    if job.teacher is not None:
        job.teacher.to(accelerator.device)
    step = Step(job.model, job.teacher, job.weights, config, job.cache)
    module, optimizer = accelerator.prepare(step, make_optimizer(step, config))
    module.train()
    sequences = job.sequences(accelerator.num_processes)
    size, own = config.micro_batch_size, None
    if isinstance(config, DistillConfig) and config.on_policy_fraction:
        own = OwnText(config, accelerator, job.model, job.teacher, data)

    def with_text(read: StepData, rows: list[int], step: int) -> StepData:
        batch, share = (read.batch, None) if own is None else own.into(read.batch, rows, step)
        return read if share is None else read._replace(batch=batch, share=share)

    evaluation = evaluation_seconds(accelerator, module, job.evaluated, size)
    fixed = evaluation + _before_training(job, accelerator, size, evaluation)
    cast_teacher(job, accelerator)
    place = (accelerator, module, optimizer, data.train, sequences, size)
    _, *seconds = step_seconds(*place, _TIMED + 1, prepare=with_text)
    # of the steps on the same texts, one samples them
    each = statistics.median(seconds) if own is None else statistics.fmean(seconds)
    between = evaluation / config.eval_every if config.eval_every else 0.0
    steps = max(0, int((_KEPT * 60 * minutes - fixed) / (each + between)))
    steps = min(steps, math.ceil(MAX_PASSES * len(data.train) / sequences))
    tokens, passes = sequences * data.sequence_length, steps * sequences / len(data.train)
    spent, proposal = fixed + steps * between, _proposal(job, steps * tokens)
    return Candidate(
        name, layers, parameters, tokens / each, steps, steps * tokens, passes, job.peak_rate(), spent, fixed, proposal
    )


def _proposal(job: Job, tokens: int) -> int:
    """Return a number of tokens for a step of this run, in whole micro-batches."""
    unit = job.config.micro_batch_size * job.data.sequence_length
    proposed = proposed_batch_tokens(count_parameters(job.model.transformer.h), tokens) if tokens else unit
    return unit * max(1, round(proposed / unit))


def _before_training(job: Job, accelerator: Accelerator, size: int, evaluation: float) -> float:
    """Return the seconds of the evaluations before the first step: of the model, and of the teacher."""
    config, teacher = job.config, 0.0
    if job.teacher is not None:
        alone = TeacherEvaluation(job.teacher).eval()
        teacher = evaluation_seconds(accelerator, alone, job.evaluated, size)
    cut = isinstance(config, DistillConfig) and config.student is None  # is timed with random weights
    return teacher + (0.0 if job.new and not cut else evaluation)


def _commands(command: str, config: TrainOptions, chosen: Candidate, steps: int, search: bool) -> list[str]:
    commands: list[str] = []
    changed: dict[str, Any] = {**_NO_PLAN, "max_steps": steps}
    if isinstance(config, DistillConfig) and chosen.num_layers is not None:
        changed["student"] = student = f"{Path(config.out)}-start"
        data = next(iter(dataset_shares(config.data)))
        how = ["--num-layers", str(chosen.num_layers), "--refit"]
        how = ["--target-params", str(chosen.parameters)] if search else how
        words = ["--teacher", str(config.teacher), *how, "--data", data, "--out", student]
        words += ["--allow-pickle"] * config.allow_pickle
        words += ["--device", config.device] * (config.device != "auto")
        commands.append(f"tinygpt2 truncate-student {shlex.join(words)}")
    return [*commands, f"tinygpt2 {command} {config.model_copy(update=changed).flags()}"]


def _predicted(plan: BudgetPlan, config: TrainOptions, data: PackedDataset | None) -> LossPrediction:
    """Train short runs with the same options, and predict the loss of the planned run from theirs."""
    chosen = next(one for one in plan.candidates if one.student == plan.chosen)
    lengths = sorted({max(2, round(share * chosen.steps)) for share in _PILOTS})
    if len(lengths) < len(_PILOTS) or lengths[-1] >= chosen.steps:
        return LossPrediction([], note=f"a run of {chosen.steps} steps is too short to be predicted from shorter ones")
    pilots: list[tuple[int, float]] = []
    for number, steps in enumerate(lengths, 1):
        say(f"pilot {number} of {len(lengths)}: {steps} steps")
        result = _pilot(config, data, steps)
        if result.eval is None:
            return LossPrediction([], note="there are no held-out blocks to measure a loss on")
        pilots.append((result.tokens, result.eval.loss))
    try:
        law = Law([tokens for tokens, _ in pilots], [loss for _, loss in pilots])
    except ValueError as error:
        return LossPrediction(pilots, note=str(error))
    found, note = law.at(chosen.tokens), None
    if chosen.passes > 1:
        note = f"the run reads the data {chosen.passes:.3g} times; what it loses by repetition is not predicted"
    target = None
    if config.target_perplexity is not None:
        target = law.tokens_for(math.log(config.target_perplexity))
    if target is None:
        return LossPrediction(pilots, found.loss, found.error, note)
    each = 1 / chosen.tokens_per_second + (chosen.evaluation_seconds - chosen.fixed_seconds) / chosen.tokens
    seconds = chosen.fixed_seconds + target * each
    return LossPrediction(pilots, found.loss, found.error, note, math.ceil(target), seconds / 60 / _KEPT)


def _pilot(config: TrainOptions, data: PackedDataset | None, steps: int) -> TrainResult:
    """Train a run of so many steps with a schedule of its own, in a directory that is deleted."""
    with tempfile.TemporaryDirectory() as scratch:
        changed = {**_NO_PLAN, "out": f"{scratch}/pilot", "max_steps": steps, "save_every": steps, "log_every": steps}
        none: dict[str, Any] = {"early_stopping_patience": None, "eval_task": [], "report_to": [], "profile": None}
        if not getattr(config, "fraction_growth", 0):  # by which evaluations decide how much text is sampled
            none["eval_every"] = None
        short = config.model_copy(update={**changed, **none, "resume": False})
        commands = {DistillConfig: distill, PretrainConfig: pretrain, FinetuneConfig: finetune}
        return cast("TrainResult", commands[type(short)](short, data))  # type: ignore[operator]
