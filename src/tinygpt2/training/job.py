"""A training run's model, data and objectives, and how `pretrain`, `distill` and `finetune` set them up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.alignment.teacher import aligned_teacher, other_tokens
from tinygpt2.config.common import DEFAULT_SEQUENCE_LENGTH
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.training import FinetuneConfig, PretrainConfig, TrainOptions, dataset_shares, length_options
from tinygpt2.data.dataset import Blocks, PackedDataset, load_packed_dataset
from tinygpt2.data.layout import is_packed_dataset
from tinygpt2.data.mixture import load_datasets
from tinygpt2.errors import ConfigError, listed
from tinygpt2.evaluation.conventions import ModelTokenizer
from tinygpt2.evaluation.perplexity import tokenize_fitting_tasks
from tinygpt2.evaluation.results import short_names
from tinygpt2.evaluation.tasks import load_tasks
from tinygpt2.models.activations import attention_kernel
from tinygpt2.models.compatibility import check_fits
from tinygpt2.models.configuration import is_model_config, read_model_config
from tinygpt2.models.lm_head import default_chunk
from tinygpt2.models.loading import load_model, model_tokenizer, random_model, tokenizer_fingerprint
from tinygpt2.models.parameters import count_parameters, freeze
from tinygpt2.models.teachers.ensemble import as_one, pinned
from tinygpt2.models.teachers.loading import load_teacher, read_as_student
from tinygpt2.models.teachers.teacher import GPT2Teacher, Teacher
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.runtime.devices import DTYPES, device_chosen, device_peak
from tinygpt2.runtime.launch import check_number
from tinygpt2.runtime.threads import tell_machine
from tinygpt2.training.metrics import metrics_of
from tinygpt2.training.preparation import (
    TrainingSetup,
    check_packed,
    documents_apart,
    training_arithmetic,
    training_setup,
)
from tinygpt2.training.resuming import as_begun, with_precision
from tinygpt2.training.schedule import batch_of, passes_over_data, peak_learning_rate, total_steps
from tinygpt2.training.state import RunState
from tinygpt2.training.step import Evaluation, TeacherEvaluation, evaluate, joined
from tinygpt2.training.teacher_cache import TeacherCache, open_without_teacher
from tinygpt2.training.throughput import step_operations
from tinygpt2.utils.files import shared_name
from tinygpt2.utils.hub import at_commit, hub_revision
from tinygpt2.utils.progress import detail


@dataclass
class Job:
    """One training run, ready to start.

    Attributes:
        command: `pretrain`, `distill` or `finetune`.
        how: one sentence for the model card, which says how the model was made.
        evaluated: the blocks to evaluate on.
        weights: the objectives and their weights.
        revisions: for each model that came from the Hub, its commit by its role.
        new: whether the model begins with random weights.
        cached: share of what the teacher says that a cache holds when the run starts.
        cache: of a teacher's predictions, if it is used without the teacher.
        clock: returns the time in seconds.
        started: the time at which the command began.
    """

    command: str
    config: TrainOptions
    how: str
    model: GPT2LMHeadModel
    data: PackedDataset
    evaluated: Blocks
    weights: LossWeights = field(default_factory=LossWeights)
    teacher: Teacher | None = None
    revisions: dict[str, str] = field(default_factory=dict)
    new: bool = False
    cached: float = 0.0
    cache: TeacherCache | None = None
    clock: Callable[[], float] = time.perf_counter
    started: float = field(default_factory=time.perf_counter)

    def sequences(self, processes: int) -> int:
        """Return the number of blocks in one optimizer step."""
        return self.config.micro_batch_size * self.config.gradient_accumulation_steps * processes

    def operations(self) -> int:
        """Return the floating-point operations of a training step, per token."""
        teacher = None if self.teacher is None else self.teacher.shape
        predictions = isinstance(self.config, DistillConfig) and self.config.caches_predictions
        known = self.cached, self.cached if predictions else 0.0
        return step_operations(self.model.config, teacher, self.weights, self.data.sequence_length, *known)

    def peak_tokens_per_second(self, accelerator: Accelerator) -> float | None:
        """Return the tokens per second at the peak rate of all devices, or None if it is not known."""
        peak = device_peak(accelerator.device, self.config.precision)
        return None if peak is None else peak * accelerator.num_processes / self.operations()

    def total_steps(self, processes: int) -> int:
        """Return the number of optimizer steps of the whole run. With --max-minutes, timing finds it."""
        sequences, length = len(self.data.train), self.data.sequence_length
        return total_steps(self.config, sequences, self.sequences(processes), length, count_parameters(self.model))

    def peak_rate(self) -> float:
        """Return the peak learning rate."""
        return peak_learning_rate(self.config, self.model.config.n_embd)

    def recorded_config(self) -> TrainOptions:
        """Return the configuration that runs again what this run does: the values that rules gave, and ID@COMMIT."""
        tokens = len(self.data.train) * self.data.sequence_length
        values: dict[str, object] = {"learning_rate": self.peak_rate()}
        if all(getattr(self.config, name) is None for name in length_options()):
            values["num_epochs"] = float(passes_over_data(self.config, count_parameters(self.model), tokens))
        commits = {"model" if role == "base" else role: commit for role, commit in self.revisions.items()}
        pinned = {option: at_commit(getattr(self.config, option), commit) for option, commit in commits.items()}
        return self.config.model_copy(update={**values, **pinned})

    def hub_models(self) -> dict[str, str]:
        """Return the ids of the models that came from the Hub, by the options that named them."""
        options = ["model" if role == "base" else role for role in self.revisions]
        return {option: str(getattr(self.config, option)).partition("@")[0] for option in options}

    def evaluated_by_data(self) -> dict[str, Blocks]:
        """Return the blocks to evaluate on of each dataset by its name, if it is several: in proportion to all."""
        if self.config.eval_data is not None:
            return {}
        names = short_names([member.name for member in self.data.members])
        share = len(self.evaluated) / max(1, len(self.data.test))
        return {
            names[member.name]: member.test.spaced(max(1, round(share * len(member.test))))
            for member in self.data.members
            if len(member.test)
        }

    def measured(self, one: Callable[[Blocks], Evaluation]) -> tuple[Evaluation, dict[str, Evaluation]]:
        """Evaluate with a function of blocks: on all held-out blocks, and if several datasets have some, on each."""
        blocks = self.evaluated_by_data()
        if not blocks:
            return one(self.evaluated), {}
        by_data = {name: one(part) for name, part in blocks.items()}
        return joined(by_data, blocks), by_data


def figures_before_training(job: Job, accelerator: Accelerator, module: nn.Module, state: RunState) -> dict[str, float]:
    """Evaluate the model before training, unless its weights are random, and the teacher, if there is one.

    Args:
        module: a `Step`, as Accelerate prepared it.
        state: keeps the figures.

    Returns:
        The metrics for metrics.jsonl: `before/loss`, `teacher/loss` and so on.
    """
    size, row = job.config.micro_batch_size, {}
    if not len(job.evaluated):
        return {}
    if not job.new:
        whole, _ = job.measured(lambda blocks: evaluate(accelerator, module, blocks, size))
        state.before, row = asdict(whole), metrics_of({"before": whole})
    if job.teacher is not None:
        teacher = TeacherEvaluation(job.teacher).eval()
        whole, _ = job.measured(lambda blocks: evaluate(accelerator, teacher, blocks, size))
        state.teacher, row = asdict(whole), row | metrics_of({"teacher": whole})
    return row


def cast_teacher(job: Job, accelerator: Accelerator) -> None:
    """Cast the teacher's linear layers to the type of the run's products, once.

    Call it when the teacher has been evaluated, which is done in float32.
    """
    with accelerator.autocast():
        kind = accelerator.device.type
        if job.teacher is not None and torch.is_autocast_enabled(kind):
            job.teacher.cast(torch.get_autocast_dtype(kind))


def tell_choices(job: Job, accelerator: Accelerator) -> None:
    """Say with --verbose on what and how the run computes."""
    config, device, vocabulary = job.config, accelerator.device, int(job.model.config.vocab_size)
    tell_machine(device, config.precision)
    kernel = attention_kernel(device.type, DTYPES[config.precision], gradients=True)
    if config.dropout and device.type == "cpu":
        kernel += ", which holds the whole matrix because of --dropout"
    detail(f"attention: {kernel}")
    named = "--logit-chunk" if config.logit_chunk else "from the vocabulary"
    detail(f"logits of {config.logit_chunk or default_chunk(vocabulary, device.type):,} tokens at a time ({named})")
    turns = f"{config.micro_batch_size} x {config.gradient_accumulation_steps} x {accelerator.num_processes}"
    detail(f"{job.data.sequence_length} tokens in a block; blocks in a step: {turns} (micro-batch, turns, processes)")


def settle_batch(job: Job, accelerator: Accelerator) -> None:
    """Set the job's micro-batch and accumulation from --batch-tokens, if it is given."""
    processes = accelerator.num_processes
    if processes == 1:  # --validate-only estimates a run of several processes in one
        processes = job.config.num_processes or 1
    job.config = batch_of(job.config, job.data.sequence_length, processes)
    accelerator.gradient_accumulation_steps = job.config.gradient_accumulation_steps


@contextmanager
def prepared_job(config: TrainOptions, data: PackedDataset | None = None) -> Iterator[tuple[Job, Accelerator]]:
    """Check a run's options and files, and yield the job with the accelerator to run it on.

    Args:
        data: replaces the dataset that the configuration names.

    Raises:
        ConfigError, DataError, ModelError: an option, a dataset or a model is wrong, or they do not fit each other.
    """
    with ExitStack() as stack:
        stack.enter_context(device_chosen(config.device))
        check_number(config.num_processes)
        config = with_precision(as_begun(config))
        stack.enter_context(training_arithmetic(config))
        setup = stack.enter_context(training_setup(config, loss_weights(config)))
        job = make_job(config, data, setup)
        settle_batch(job, setup.accelerator)
        freeze(job.model, config.freeze)
        if config.eval_task:  # report a task that does not fit the model now, not after the training
            tokenizer = ModelTokenizer(config.out, job.model.config, job.data.tokenizer())
            tokenize_fitting_tasks(load_tasks(config.eval_task, config.task_data), tokenizer)
        yield job, setup.accelerator


def loss_weights(config: TrainOptions) -> LossWeights:
    """Return the objectives of a run: those of `distill`, or plain language modelling."""
    return LossWeights.of(config) if isinstance(config, DistillConfig) else LossWeights()


def make_job(config: TrainOptions, data: PackedDataset | None, setup: TrainingSetup) -> Job:
    """Set up the job of `pretrain`, `distill` or `finetune`, whichever the configuration is for."""
    makers = {PretrainConfig: pretraining_job, DistillConfig: distillation_job, FinetuneConfig: finetuning_job}
    job: Job = makers[type(config)](config, data, setup)  # type: ignore[operator]
    job.data, job.evaluated = documents_apart(job.data, job.evaluated, config, job.weights)
    return job


def pretraining_job(config: PretrainConfig, data: PackedDataset | None, setup: TrainingSetup) -> Job:
    """Set up `pretrain`: read the dataset, make or load the model."""
    data = data or load_datasets(config.data)
    if config.shape is not None:
        shape = read_model_config(config.shape, data.tokenizer())
        model = random_model(shape, config.seed, hollow=config.validate_only)
        check_fits(data, model.config, None, f"the configuration {config.shape}")
        directory: Path | None = None
        name = shared_name(config.shape)
        how = f"A GPT-2 with the configuration {name}, trained from random weights on {_sources(data)}."
    else:
        model, directory = load_model(config.model or "", allow_pickle=config.allow_pickle, hollow=config.validate_only)
        check_fits(data, model.config, tokenizer_fingerprint(directory), f"model {config.model}")
        how = f"A GPT-2 that continued the training of {shared_name(config.model or '')} on {_sources(data)}."
    evaluated = setup.evaluated(data, model.config, config)
    revisions = _revisions(base=hub_revision(config.model, directory))
    return Job("pretrain", config, how, model, data, evaluated, revisions=revisions, new=directory is None)


def distillation_job(
    config: DistillConfig, data: PackedDataset | None, setup: TrainingSetup, shape: GPT2Config | None = None
) -> Job:
    """Set up `distill`: read the dataset, load student and teacher.

    Args:
        shape: uses a student of this shape with random weights instead of `config.student`.
    """
    data, hollow = data or load_datasets(config.data), config.validate_only
    start = config.student or ""
    other, names = other_tokens(config, data), config.teachers * config.needs_teacher
    options = {"allow_pickle": config.allow_pickle, "hollow": hollow, "other_tokens": other is not None}
    loaded = [load_teacher(name, data, DTYPES[config.teacher_dtype], **options) for name in names]
    cache = open_without_teacher(config, data) if config.from_cache_alone else None
    if shape is not None or is_model_config(start):
        same = [one.shape.vocabulary for one, _ in loaded if isinstance(one, GPT2Teacher) and other is None]
        vocab_size = next(iter(same), None if cache is None else cache.vocabulary)
        shape = shape or read_model_config(start, data.tokenizer(), vocab_size)
        student, directory = random_model(shape, config.seed, hollow=hollow), None
    else:
        student, directory = load_model(start, "student", allow_pickle=config.allow_pickle, hollow=hollow)
    for name, (one, source) in zip(names, loaded, strict=True):
        if other is None:
            own, both = model_tokenizer(source), (name, config.student)
            read_as_student(one, data, student.config, own, both, reverse_kl=config.has_reverse_kl)
    teacher, sources = as_one([one for one, _ in loaded]), [source for _, source in loaded]
    if len(loaded) > 1:
        config = config.model_copy(update={"teacher": pinned(names, sources)})
    check_fits(data, student.config, tokenizer_fingerprint(directory), f"student {config.student}")
    positions = teacher.shape.positions if teacher is not None and other is None else None
    evaluated = setup.evaluated(data, student.config, config, positions)
    if teacher is not None and other is not None:
        teacher = aligned_teacher(config, teacher, other, data, student.config.vocab_size, evaluated)
    if cache is not None:
        cache.check_student(start, student.config.vocab_size)
    how = (
        f"A GPT-2 distilled from {_named(config, teacher, cache)} with the recipe {config.recipe} on "
        f"{_sources(data)}. The training started from {shared_name(start)}."
    )
    alone = hub_revision(names[0], sources[0]) if len(names) == 1 else None
    revisions = _revisions(teacher=alone, student=hub_revision(start, directory))
    weights, new, cached = LossWeights.of(config), directory is None, float(cache is not None)
    return Job("distill", config, how, student, data, evaluated, weights, teacher, revisions, new, cached, cache)


def _named(config: DistillConfig, teacher: Teacher | None, cache: TeacherCache | None) -> str:
    """Return the teacher's name for the model card, with its class if it is no GPT-2."""
    if cache is not None:
        return f"{cache.kind} of the predictions of {cache.name or 'a teacher'}"
    name = " and ".join(map(shared_name, config.teachers)) or "no teacher"
    return name if teacher is None or isinstance(teacher, GPT2Teacher) else f"{name} ({teacher.shape.kind})"


def finetuning_job(config: FinetuneConfig, data: PackedDataset | None, setup: TrainingSetup) -> Job:
    """Set up `finetune`: load the model, read or make the dataset."""
    model, directory = load_model(config.model, allow_pickle=config.allow_pickle, hollow=config.validate_only)
    names = list(dataset_shares(config.data))
    if data is None and (len(names) > 1 or is_packed_dataset(Path(names[0]))):
        check_packed(data := load_datasets(config.data), config)
    elif data is None:
        freeze(model, config.freeze)  # before packing: it raises an error if a pattern matches no parameter
        length = config.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, model.config.n_positions)
        if length > model.config.n_positions:
            raise ConfigError(
                f"--sequence-length {length} is more than the {model.config.n_positions} positions of {config.model}"
            )
        data = load_packed_dataset(setup.packed("data", names[0], str(directory), length, config, config))
    check_fits(data, model.config, tokenizer_fingerprint(directory), f"model {config.model}")
    how = f"{shared_name(config.model)}, fine-tuned on {_sources(data)}."
    evaluated = setup.evaluated(data, model.config, config)
    revisions = _revisions(base=hub_revision(config.model, directory))
    return Job("finetune", config, how, model, data, evaluated, revisions=revisions)


def _sources(data: PackedDataset) -> str:
    return listed(map(shared_name, data.manifest.get("sources", [data.name])), 5)


def _revisions(**commits: str | None) -> dict[str, str]:
    """Return the commits of the models that came from the Hub, by their roles."""
    return {role: commit for role, commit in commits.items() if commit is not None}
