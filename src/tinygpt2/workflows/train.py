"""`pretrain`, `distill` and `finetune`: they differ only in what they hand to the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import GPT2Config

from tinygpt2.config.common import DEFAULT_SEQUENCE_LENGTH
from tinygpt2.config.models import PplConfig
from tinygpt2.config.training import DistillConfig, FinetuneConfig, PretrainConfig, TrainOptions
from tinygpt2.data.dataset import Packed, is_packed, load_packed
from tinygpt2.data.tokenizer import fingerprint
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.evaluation.conventions import Reader, check_fits
from tinygpt2.evaluation.perplexity import fitting_sheets, measure
from tinygpt2.evaluation.results import short_names
from tinygpt2.evaluation.tasks import load_tasks
from tinygpt2.models.configuration import is_shape, read_shape
from tinygpt2.models.loading import (
    count_parameters,
    freeze,
    load_model,
    model_tokenizer,
    random_model,
    save_model,
    set_dropout,
)
from tinygpt2.objectives.combined import Weights
from tinygpt2.planning.dry_run import Compiled, Plan, compile_step, fit_batch, make_plan
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.runtime.launch import check_number, launch, launched
from tinygpt2.training.loop import Job, run_loop
from tinygpt2.training.metrics import model_card, plot_curves
from tinygpt2.training.preparation import RUN_FILE, Setup, begin
from tinygpt2.training.state import RunState
from tinygpt2.training.step import Evaluation, Step
from tinygpt2.training.teacher_cache import TeacherCache
from tinygpt2.training.throughput import peak_memory
from tinygpt2.utils.files import write_text
from tinygpt2.utils.progress import say
from tinygpt2.workflows.budget import Budget, cuts, make_budget

Options = TypeVar("Options", bound=TrainOptions)


@dataclass(frozen=True)
class TrainResult:
    """What a training run made.

    Attributes:
        loss: the last step's mean over the global batch.
        tasks: perplexity on each --eval-task, by ppl's default convention; None without one.
    """

    model: str
    steps: int
    tokens: int
    seconds: float
    loss: float | None
    eval: Evaluation | None
    parameters: int
    tokens_per_second: float
    peak_memory_bytes: int
    tasks: dict[str, float] | None = None


def pretrain(config: PretrainConfig, data: Packed | None = None) -> TrainResult | Plan | Compiled:
    """Train a language model from random or given weights on a pregenerated dataset.

    Args:
        data: takes the place of the dataset that `config.data` names; see `from_map_style`.

    Returns:
        What was made; a `Plan` with `validate_only`, or what was `Compiled` with `compile_only`.

    Raises:
        ConfigError, DataError, ModelError: see the exit codes of the command line.
        DivergedError: a loss or gradient is not finite.
        InterruptedRunError: stopped by a signal, after saving.
    """
    return _run("pretrain", _pretraining, config, data, Weights())


def distill(config: DistillConfig, data: Packed | None = None) -> TrainResult | Plan | Compiled | Budget:
    """Teach a student what its teacher computes; the teacher is loaded only if an objective looks at it.

    Args, Returns, Raises:
        As `pretrain`; also a `Budget` with `plan`, and ModelError where teacher and student have different
        vocabularies.
    """
    if config.plan:
        if launched():
            raise ConfigError("--plan times one process", "start it without a launcher")
        with fast_products(), begin(config, Weights.of(config)) as setup:
            return make_budget(_candidates(config, data, setup), setup.accelerator, config)
    return _run("distill", _distillation, config, data, Weights.of(config))


def _candidates(config: DistillConfig, data: Packed | None, setup: Setup) -> Iterator[tuple[str, int | None, Job]]:
    """Yield the student that was given, or cuts of the teacher at several depths, by name."""
    if config.student is not None:
        yield config.student, None, _distillation(config, data, setup)
        return
    teacher, _ = load_model(config.teacher or "", "teacher", allow_pickle=config.allow_pickle, hollow=True)
    for layers in cuts(teacher.config):
        shape = GPT2Config.from_dict({**teacher.config.to_dict(), "n_layer": layers})
        # from random weights: a step takes as long
        yield f"{layers} of {teacher.config.n_layer} layers", layers, _distillation(config, data, setup, shape)


def finetune(config: FinetuneConfig, data: Packed | None = None) -> TrainResult | Plan | Compiled:
    """Fine-tune any GPT-2 on a pregenerated dataset, or on a text that is packed into OUT/data first.

    Args, Returns, Raises:
        As `pretrain`.
    """
    return _run("finetune", _finetuning, config, data, Weights())


def _run(
    name: str,
    make: Callable[[Options, Packed | None, Setup], Job],
    config: Options,
    data: Packed | None,
    weights: Weights,
) -> TrainResult | Plan | Compiled:
    """Run a command in this process, or in as many as it asks for."""
    check_number(config.num_processes)
    alone = config.passing or launched()
    if (config.num_processes or 1) > 1 and not alone:
        result: TrainResult = launch(name, config.num_processes or 1, config, data)
        return result
    with fast_products(), begin(config, weights) as setup:
        job = make(config, data, setup)
        freeze(job.model, config.freeze)
        if config.eval_task:  # what does not fit the model is said before it is trained
            reader = Reader(config.out, job.model.config, job.data.tokenizer())
            fitting_sheets(load_tasks(config.eval_task, config.task_data), reader)
        return make_plan(job, setup.accelerator) if config.validate_only else _train(job, setup.accelerator)


def _pretraining(config: PretrainConfig, data: Packed | None, setup: Setup) -> Job:
    data = data or load_packed(config.data)
    if config.shape is not None:
        shape = read_shape(config.shape, data.tokenizer())
        model = random_model(shape, config.seed, hollow=config.validate_only)
        check_fits(data, model.config, None, f"the configuration {config.shape}")
        how = f"A GPT-2 of shape {config.shape}, trained from random weights on {_sources(data)}."
    else:
        model, directory = load_model(config.model or "", allow_pickle=config.allow_pickle, hollow=config.validate_only)
        check_fits(data, model.config, _fingerprint(directory), f"model {config.model}")
        how = f"A GPT-2, trained further from {config.model} on {_sources(data)}."
    return Job("pretrain", config, how, model, data, setup.evaluated(data, model.config, config))


def _distillation(config: DistillConfig, data: Packed | None, setup: Setup, shape: GPT2Config | None = None) -> Job:
    data, hollow = data or load_packed(config.data), config.validate_only
    start = config.student or ""
    if shape is not None or is_shape(start):
        shape = shape or read_shape(start, data.tokenizer())
        student, directory = random_model(shape, config.seed, hollow=hollow), None
    else:
        student, directory = load_model(start, "student", allow_pickle=config.allow_pickle, hollow=hollow)
    teacher = None
    if config.needs_teacher and config.teacher is not None:
        teacher, source = load_model(config.teacher, "teacher", allow_pickle=config.allow_pickle, hollow=hollow)
        if teacher.config.vocab_size != student.config.vocab_size:
            raise ModelError(
                f"teacher {config.teacher} has a vocabulary of {teacher.config.vocab_size}, "
                f"student {config.student} of {student.config.vocab_size}",
                "teacher and student need the same tokenizer; cut the student with tinygpt2 truncate-student",
            )
        check_fits(data, teacher.config, _fingerprint(source), f"teacher {config.teacher}")
        teacher.requires_grad_(False).to({"fp32": torch.float32, "bf16": torch.bfloat16}[config.teacher_dtype])
    check_fits(data, student.config, _fingerprint(directory), f"student {config.student}")
    how = (
        f"A GPT-2 that learned from {config.teacher} by recipe {config.recipe}, "
        f"started from {config.student}, on {_sources(data)}."
    )
    evaluated = setup.evaluated(data, student.config, config)
    return Job("distill", config, how, student, data, evaluated, Weights.of(config), teacher)


def _finetuning(config: FinetuneConfig, data: Packed | None, setup: Setup) -> Job:
    model, directory = load_model(config.model, allow_pickle=config.allow_pickle, hollow=config.validate_only)
    if data is None and is_packed(Path(config.data)):
        data = load_packed(config.data)
    elif data is None:
        freeze(model, config.freeze)  # here already: a pattern that matches nothing stops before a text is packed
        length = config.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, model.config.n_positions)
        if length > model.config.n_positions:
            raise ConfigError(
                f"--sequence-length {length} is beyond the {model.config.n_positions} positions of {config.model}"
            )
        data = load_packed(setup.packed("data", config.data, str(directory), length, config, config))
    check_fits(data, model.config, _fingerprint(directory), f"model {config.model}")
    how = f"{config.model}, fine-tuned on {_sources(data)}."
    return Job("finetune", config, how, model, data, setup.evaluated(data, model.config, config))


def _fingerprint(directory: Path | None) -> str | None:
    tokenizer = None if directory is None else model_tokenizer(directory)
    return None if tokenizer is None else fingerprint(tokenizer)


def _sources(data: Packed) -> str:
    return ", ".join(data.manifest.get("sources", [data.name]))


def _train(job: Job, accelerator: Accelerator) -> TrainResult | Compiled:
    """Set up, run the loop, evaluate and write the model."""
    config, out = job.config, Path(job.config.out)
    set_dropout(job.model, config.dropout)
    set_seed(config.seed)
    module = Step(job.model, job.teacher, job.weights, config, _cache(job))
    if job.teacher is not None:
        job.teacher.to(accelerator.device)
    if config.compile_only:
        return compile_step(job, accelerator, module)
    if config.auto_batch_size and not _fitted_before(job, accelerator):
        fit_batch(job, accelerator, module)
    config = job.config
    if accelerator.is_main_process:
        write_text(out / RUN_FILE, config.to_yaml())
    _begin_tracking(accelerator, config)
    tokenizer, parameters = job.data.tokenizer(), count_parameters(job.model)  # ZeRO-3 leaves shards
    try:
        state, wrapped = run_loop(job, accelerator, module)
        weights = accelerator.get_state_dict(wrapped)
        result = _result(job, state, parameters)
        if accelerator.is_main_process:
            own = {name.split("student.", 1)[1]: tensor for name, tensor in weights.items() if "student." in name}
            save_model(job.model, out, tokenizer, _card(job, result), own, config.to_yaml())
            plot_curves(out)
        # the wrapper first: where it outlives the process group, its end waits for threads that wait for it
        (wrapped,) = accelerator.free_memory(wrapped)
        if config.eval_task:
            result = _measured(job, result, accelerator)
    except BaseException:
        for tracker in accelerator.trackers:
            tracker.finish()
        raise
    accelerator.end_training()
    return result


def _cache(job: Job) -> TeacherCache | None:
    """Open the cache of the teacher's states, if there is to be one."""
    config = job.config
    if not isinstance(config, DistillConfig) or config.teacher_cache is None or config.compile_only:
        return None
    assert job.teacher is not None  # or the options contradict each other
    if not isinstance(job.data.made_with, Path):
        raise ConfigError("--teacher-cache needs a pregenerated dataset, whose content has a fingerprint")
    cache = TeacherCache(Path(config.teacher_cache), job.teacher, job.data, config.precision)
    say(f"{cache.path}: {cache.filled:.0%} of the teacher's states are there")
    return cache


def _measured(job: Job, result: TrainResult, accelerator: Accelerator) -> TrainResult:
    """Measure the finished model on the tasks asked for, and write them into its card."""
    config = job.config
    if job.teacher is not None:
        job.teacher.to("cpu")
    job.model.to("cpu")
    accelerator.wait_for_everyone()  # until the model is there
    rows = measure(PplConfig(model=[config.out], task=config.eval_task, task_data=config.task_data)).results
    names = short_names([row.task for row in rows])
    result = replace(result, tasks={names[row.task]: row.perplexity for row in rows})
    if accelerator.is_main_process:
        write_text(Path(config.out) / "README.md", _card(job, result))
    return result


def _fitted_before(job: Job, accelerator: Accelerator) -> bool:
    """Take the micro-batch that the run found when it began, so that what it resumes computes the same."""
    file, config = Path(job.config.out) / RUN_FILE, job.config
    if not (config.resume and file.is_file()):
        return False
    earlier = yaml.safe_load(file.read_text(encoding="utf-8"))
    size, turns = earlier["micro_batch_size"], earlier["gradient_accumulation_steps"]
    if not earlier["auto_batch_size"] or size * turns != config.micro_batch_size * config.gradient_accumulation_steps:
        return False
    job.config = config.model_copy(update={"micro_batch_size": size, "gradient_accumulation_steps": turns})
    accelerator.gradient_accumulation_steps = turns
    return True


def _begin_tracking(accelerator: Accelerator, config: TrainOptions) -> None:
    """Start the trackers: TensorBoard in OUT/tensorboard, or beside W&B's project tinygpt2 in OUT/tinygpt2."""
    if not config.report_to:
        return
    options = config.model_dump(mode="json", by_alias=True)
    accelerator.init_trackers(
        "tinygpt2" if "wandb" in config.report_to else "tensorboard",
        config={key: value if isinstance(value, int | float | str) else str(value) for key, value in options.items()},
        init_kwargs={"wandb": {"name": Path(config.out).name, "dir": config.out}},
    )


def _result(job: Job, state: RunState, parameters: int) -> TrainResult:
    return TrainResult(
        model=str(Path(job.config.out).resolve()),
        steps=state.step,
        tokens=state.tokens,
        seconds=state.seconds,
        loss=state.loss,
        eval=None if state.eval is None else Evaluation(**state.eval),
        parameters=parameters,
        tokens_per_second=state.tokens / state.seconds,
        peak_memory_bytes=peak_memory(),
    )


def _card(job: Job, result: TrainResult) -> str:
    shape = job.model.config
    figures: dict[str, Any] = {
        "parameters": f"{result.parameters:,}",
        "layers, width, heads": f"{shape.n_layer}, {shape.n_embd}, {shape.n_head}",
        "positions, vocabulary": f"{shape.n_positions}, {shape.vocab_size}",
        "steps, tokens trained on": f"{result.steps:,}, {result.tokens:,}",
        "seconds": f"{result.seconds:.0f}",
    }
    if result.loss is not None:
        figures["last training loss"] = f"{result.loss:.4f}"
    if result.eval is not None:
        figures["held-out loss (nats/token)"] = f"{result.eval.loss:.4f}"
        figures["held-out perplexity"] = f"{result.eval.perplexity:.2f}"
    figures |= {f"perplexity on {name} (per token)": f"{value:.2f}" for name, value in (result.tasks or {}).items()}
    figures["fingerprint of the data"] = f"`{job.data.content[:16]}`"
    figures["fingerprint of its tokenizer"] = f"`{job.data.manifest['tokenizer_fingerprint'][:16]}`"
    return model_card(Path(job.config.out).name, job.how, figures, f"{job.command} {job.config.flags()}")
