"""`pretrain`, `distill` and `finetune`: they run the same training loop on different jobs and save the model."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import time
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.evaluation import PplConfig
from tinygpt2.config.training import FinetuneConfig, PretrainConfig, TrainOptions
from tinygpt2.data.dataset import PackedDataset
from tinygpt2.data.mixture import MixedOrder, training_order
from tinygpt2.errors import ConfigError, InterruptedRunError, listed, reason_of
from tinygpt2.evaluation.perplexity import ppl
from tinygpt2.evaluation.results import short_names
from tinygpt2.models.card import held_out_table, model_card
from tinygpt2.models.parameters import count_parameters, set_dropout
from tinygpt2.models.saving import save_model
from tinygpt2.objectives.sparse import SparseForm
from tinygpt2.planning.batch_size import fit_batch, fitted_before
from tinygpt2.runtime.devices import chosen_precision, device_chosen
from tinygpt2.runtime.launch import check_number, launch
from tinygpt2.runtime.memory import peak_memory
from tinygpt2.runtime.processes import command_began, launched
from tinygpt2.training.job import Job, prepared_job
from tinygpt2.training.loop import run_loop
from tinygpt2.training.own_text.source import check_sampling
from tinygpt2.training.resuming import record_end, record_run
from tinygpt2.training.state import RUN_FILE, RunState
from tinygpt2.training.step import Evaluation, Step
from tinygpt2.training.teacher_cache import TeacherCache
from tinygpt2.utils.files import write_text
from tinygpt2.utils.progress import say
from tinygpt2.workflows.curves import PREDICTIONS, plot_curves
from tinygpt2.workflows.metadata import how_to_load, run_metadata
from tinygpt2.workflows.report import write_run_report

_LITTLE = 0.05  # share of the time that evaluations may take unsaid


@dataclass(frozen=True)
class TrainResult:
    """The model of a training run, and its measurements.

    Attributes:
        model: the path of its directory.
        loss: of the last step, the mean over the global batch.
        seconds: since the run began to train, with its evaluations.
        eval: the last evaluation.
        tokens_per_second: the speed of the steps, without evaluations.
        eval_by_data: the last evaluation on each dataset, if --data named several; else None.
        tokens_by_data: tokens of each dataset that the run trained on, if --data gave them shares; else None.
        tasks: perplexity on each --eval-task, in the default convention of `ppl`; None without --eval-task.
        accuracies: accuracy on those of them that have answers, also normalised by their characters; None if none has.
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
    eval_by_data: dict[str, Evaluation] | None = None
    tokens_by_data: dict[str, int] | None = None
    tasks: dict[str, float] | None = None
    accuracies: dict[str, float] | None = None


def pretrain(config: PretrainConfig, data: PackedDataset | None = None) -> TrainResult:
    """Train a language model on a pregenerated dataset, from random weights or from existing ones.

    Args:
        config: its `validate_only` and `compile_only` must be off; see `plan_run` and `compile_step`.
        data: replaces the dataset that `config.data` names; see `from_map_style`.

    Raises:
        ConfigError, DataError, ModelError: an option, a dataset or a model is wrong; see the exit codes.
        DivergedError: a loss or a gradient is NaN or infinite.
        InterruptedRunError: a signal stopped the run; a checkpoint was saved.
    """
    return _run("pretrain", config, data)


def distill(config: DistillConfig, data: PackedDataset | None = None) -> TrainResult:
    """Distil a teacher into a student. The teacher is loaded only if an objective uses it.

    Args:
        config: its `validate_only`, `compile_only` and `plan` must be off; see `plan_run`, `compile_step` and
            `plan_budget`.
        data: replaces the dataset that `config.data` names; see `from_map_style`.

    Raises:
        ModelError: also if teacher and student have different vocabularies.
        ConfigError, DataError, DivergedError, InterruptedRunError: as `pretrain`.
    """
    return _run("distill", config, data)


def finetune(config: FinetuneConfig, data: PackedDataset | None = None) -> TrainResult:
    """Fine-tune any GPT-2 on a pregenerated dataset, or on a text, which is packed into OUT/data first.

    Args, Raises:
        As `pretrain`.
    """
    return _run("finetune", config, data)


def _run(command: str, config: TrainOptions, data: PackedDataset | None) -> TrainResult:
    """Train in this process, or in as many processes as the configuration asks for."""
    if config.dry_run:
        raise ConfigError(
            f"{command} trains a model, so validate_only, compile_only and plan must be off",
            "call tinygpt2.plan_run, tinygpt2.compile_step or tinygpt2.plan_budget instead",
        )
    began = command_began()
    with device_chosen(config.device):
        check_number(config.num_processes)
    if (config.num_processes or 1) > 1 and not launched():
        result: TrainResult = launch(command, config.num_processes or 1, config, data)
        return result
    with prepared_job(config, data) as (job, accelerator):
        job.started = job.clock() - (time() - began)
        return _train(job, accelerator)


def _train(job: Job, accelerator: Accelerator) -> TrainResult:
    """Run the loop, write the model, and measure it on the evaluation tasks."""
    config, out = job.config, Path(job.config.out)
    set_dropout(job.model, config.dropout)
    set_seed(config.seed)
    module = Step(job.model, job.teacher, job.weights, config, _cache(job))
    if job.teacher is not None:
        job.teacher.to(accelerator.device)
    if isinstance(config, DistillConfig) and config.samples_text:
        check_sampling(config, accelerator, job.teacher)  # before the directory is begun
    if config.auto_batch_size and not fitted_before(job, accelerator):
        fit_batch(job, accelerator, module)
    config = job.config
    if accelerator.is_main_process and not (config.resume and (out / RUN_FILE).is_file()):
        record_run(job.recorded_config())  # a resumed run is recorded when it has turned out to be the same
    _begin_tracking(accelerator, config)
    tokenizer, parameters = job.data.tokenizer(), count_parameters(job.model)  # before ZeRO-3 splits the parameters
    try:
        state, wrapped = run_loop(job, accelerator, module)
        weights = accelerator.get_state_dict(wrapped)
        result = _result(job, state, parameters)
        if accelerator.is_main_process:
            own = {name.split("student.", 1)[1]: tensor for name, tensor in weights.items() if "student." in name}
            save_model(job.model, out, tokenizer, _card(job, result, state), own, _options_used(job, state))
            record_end(out, result=_recorded(result))
            plot_curves(out)
        # free the wrapper before the process group: otherwise both can wait for each other at the end
        (wrapped,) = accelerator.free_memory(wrapped)
        if config.eval_task:
            result = _measured(job, result, state, accelerator)
        if accelerator.is_main_process:
            write_run_report(out)
    except BaseException as error:
        for tracker in accelerator.trackers:
            tracker.finish()
        if accelerator.is_main_process and not isinstance(error, InterruptedRunError | KeyboardInterrupt):
            with suppress(OSError):  # the disk may be what failed
                record_end(out, failed=reason_of(error))
        raise
    accelerator.end_training()
    _say_share_of_evaluation(config, state)
    return result


def _options_used(job: Job, state: RunState) -> str:
    """Return what config.yaml says after the run; with --max-minutes, a comment has the number of steps."""
    minutes = job.config.max_minutes
    note = "" if minutes is None else f"# {state.step:,} steps were done in --max-minutes {minutes:g}\n"
    return note + job.recorded_config().to_yaml()


def _say_share_of_evaluation(config: TrainOptions, state: RunState) -> None:
    share = state.eval_seconds / max(state.seconds, 1e-9)
    if share > _LITTLE:
        ways = "--eval-blocks N" if config.eval_every is None else "--eval-blocks N or a larger --eval-every"
        say(f"evaluation took {share:.0%} of {state.seconds:.0f} seconds; {ways} shortens it")


def _cache(job: Job) -> TeacherCache | None:
    """Open the cache of what the teacher says, if the run uses one."""
    config = job.config
    if not isinstance(config, DistillConfig) or config.teacher_cache is None or job.teacher is None:
        return job.cache
    if not isinstance(job.data.made_with, Path):
        raise ConfigError("--teacher-cache needs a pregenerated dataset, because only its content has a fingerprint")
    form = SparseForm.of(config.teacher_cache_kind, job.model.config.vocab_size, config.temperature)
    precision = chosen_precision(config.precision)
    cache = TeacherCache(Path(config.teacher_cache), job.teacher, job.data, precision, form, config.teachers[0])
    job.cached = cache.filled
    say(f"{cache.path} holds {job.cached:.0%} of the teacher's {'states' if form is None else 'predictions'}")
    return cache


def _measured(job: Job, result: TrainResult, state: RunState, accelerator: Accelerator) -> TrainResult:
    """Measure the finished model on the tasks of --eval-task, and add the results to its card."""
    config = job.config
    if job.teacher is not None:
        job.teacher.to("cpu")
    job.model.to("cpu")
    accelerator.wait_for_everyone()  # until the main process has saved the model
    rows = ppl(PplConfig(model=[config.out], task=config.eval_task, task_data=config.task_data)).results
    names = short_names([row.task for row in rows])
    accuracies = {names[row.task]: row.accuracy for row in rows if row.accuracy is not None}
    accuracies |= {f"{names[row.task]}, normalised": row.accuracy_norm for row in rows if row.accuracy_norm is not None}
    tasks = {names[row.task]: row.perplexity for row in rows}
    result = replace(result, tasks=tasks, accuracies=accuracies or None)
    if accelerator.is_main_process:
        write_text(Path(config.out) / "README.md", _card(job, result, state))
    return result


def _begin_tracking(accelerator: Accelerator, config: TrainOptions) -> None:
    """Start the trackers. TensorBoard writes to OUT/tensorboard, or with W&B (project tinygpt2) to OUT/tinygpt2."""
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
        eval=None if state.eval is None else _evaluation(state.eval),
        parameters=parameters,
        tokens_per_second=state.tokens / max(state.seconds - state.eval_seconds, 1e-9),
        peak_memory_bytes=peak_memory(),
        eval_by_data={name: _evaluation(one) for name, one in (state.eval_by_data or {}).items()} or None,
        tokens_by_data=_tokens_by_data(job, state),
    )


def _evaluation(figures: dict[str, Any]) -> Evaluation:
    return Evaluation(**figures)


def _recorded(result: TrainResult) -> dict[str, Any]:
    """Return what run.json says of a finished run: the result without the place of the model."""
    return {key: value for key, value in asdict(result).items() if key != "model" and value is not None}


def _tokens_by_data(job: Job, state: RunState) -> dict[str, int] | None:
    order = training_order(job.data, job.config.seed)
    if not isinstance(order, MixedOrder):
        return None
    names = short_names([member.name for member in job.data.members])
    counts = order.counts(state.step * state.global_batch)
    return {
        names[member.name]: count * job.data.sequence_length
        for member, count in zip(job.data.members, counts, strict=True)
    }


def _card(job: Job, result: TrainResult, state: RunState) -> str:
    shape, data = job.model.config, job.data
    figures: dict[str, Any] = {
        "parameters": f"{result.parameters:,}",
        "layers, width, heads": f"{shape.n_layer}, {shape.n_embd}, {shape.n_head}",
        "positions, vocabulary": f"{shape.n_positions}, {shape.vocab_size}",
        "steps, tokens trained on": f"{result.steps:,}, {result.tokens:,}",
        "passes over the training data": f"{result.tokens / (len(data.train) * data.sequence_length):.3g}",
        "learning rate": f"{job.peak_rate():.3g} ({job.config.lr_schedule}, {job.config.optimizer})",
        **_rounding(job.config),
        "seconds": f"{result.seconds:.0f}",
        **{f"revision of the {role}": revision for role, revision in job.revisions.items()},
    }
    if result.loss is not None:
        figures[f"last training loss ({_training_loss(job)})"] = f"{result.loss:.4f}"
    if result.eval is not None:
        figures["held-out loss (nats/token)"] = f"{result.eval.loss:.4f}"
        figures["held-out perplexity"] = f"{result.eval.perplexity:.2f}"
    for name, one in (result.eval_by_data or {}).items():
        figures[f"held-out perplexity on {name}"] = f"{one.perplexity:.2f}"
    for name, tokens in (result.tokens_by_data or {}).items():
        figures[f"tokens of {name}"] = f"{tokens:,}"
    figures |= {f"perplexity on {name} (per token)": f"{value:.2f}" for name, value in (result.tasks or {}).items()}
    figures |= {f"accuracy on {name}": f"{value:.2%}" for name, value in (result.accuracies or {}).items()}
    figures["fingerprint of the data"] = f"`{job.data.content[:16]}`"
    figures["fingerprint of its tokenizer"] = f"`{job.data.manifest['tokenizer_fingerprint'][:16]}`"
    command = f"{job.command} {job.config.flags(shared=True)}"
    measured = {} if result.eval is None else {"held-out text": result.eval.perplexity}
    measured |= {f"held-out text of {name}": one.perplexity for name, one in (result.eval_by_data or {}).items()}
    metadata = run_metadata(job, measured | (result.tasks or {}))
    held_out = _held_out(job, state)
    return model_card(Path(job.config.out).name, job.how, figures, command, metadata, held_out, how_to_load(job))


def _rounding(config: TrainOptions) -> dict[str, str]:
    named = {0.0: "from the first step on", 1.0: "after the last step"}
    when = named.get(config.quantize_from, f"after {config.quantize_from:.0%} of the steps")
    return {} if config.quantize is None else {"matrices rounded to": f"{config.quantize} ({when})"}


def _held_out(job: Job, state: RunState) -> str:
    """Return the card's table of held-out losses: the teacher's, the model's before training, the model's."""
    models = {"teacher": state.teacher, "before training": state.before, "this model": state.eval}
    rows = {name: one for name, one in models.items() if one is not None}
    if not rows:
        return ""
    sources = [Path(source).name for source in job.data.manifest.get("sources", [job.data.name])]
    given = job.config.eval_data
    text = f"the test split of {listed(sources, 5)}" if given is None else Path(given).name
    return held_out_table(f"{text}, {len(job.evaluated):,} of {job.evaluated.stored:,} blocks", rows)


def _training_loss(job: Job) -> str:
    """Return in words what the training loss is."""
    terms = ("attention", "hidden", "prediction", "ce", "cosine", "relation")
    config, used = job.config, [name for name in terms if getattr(job.weights, name)]
    if not isinstance(config, DistillConfig) or used == ["ce"]:
        return "cross-entropy"
    if used != ["prediction"]:
        return "weighted sum of the objectives"
    return PREDICTIONS[config.prediction_loss]
