"""`pretrain`, `distill` and `finetune`: they differ only in what they hand to the loop."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, set_seed

from tinygpt2.config import (
    DEFAULT_SEQUENCE_LENGTH,
    DistillConfig,
    FinetuneConfig,
    PackOptions,
    PregenerateConfig,
    PretrainConfig,
    TrainOptions,
    changed_mathematics,
)
from tinygpt2.dataset import Packed, is_packed, load_packed
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.files import require_free, write_text
from tinygpt2.loop import Evaluation, Job, Step, run_loop
from tinygpt2.machine import fast_products
from tinygpt2.metrics import model_card, plot_curves
from tinygpt2.model import (
    count_parameters,
    freeze,
    is_shape,
    load_model,
    model_tokenizer,
    random_model,
    read_shape,
    save_model,
    set_dropout,
)
from tinygpt2.objectives import Weights
from tinygpt2.pack import pregenerate
from tinygpt2.perplexity import check_fits
from tinygpt2.tokenizer import fingerprint
from tinygpt2.workplace import workplace_of

RUN_FILE = "config.yaml"


@dataclass(frozen=True)
class TrainResult:
    """What a training run made. `loss` is the last step's mean over the global batch."""

    model: str
    steps: int
    tokens: int
    seconds: float
    loss: float
    eval: Evaluation | None
    parameters: int
    tokens_per_second: float
    peak_memory_bytes: int


def pretrain(config: PretrainConfig, data: Packed | None = None) -> TrainResult:
    """Train a language model from random or given weights on a pregenerated dataset.

    Args:
        data: takes the place of the dataset that `config.data` names; see `from_map_style`.

    Raises:
        ConfigError, DataError, ModelError: see the exit codes of the command line.
        DivergedError: a loss or gradient is not finite.
        InterruptedRunError: stopped by a signal, after saving.
    """
    _check_start(config)
    data = data or load_packed(config.data)
    if config.shape is not None:
        model = random_model(read_shape(config.shape, data.tokenizer()), config.seed)
        check_fits(data, model.config, None, f"the configuration {config.shape}")
        how = f"A GPT-2 of shape {config.shape}, trained from random weights on {_sources(data)}."
    else:
        model, directory = load_model(config.model or "", allow_pickle=config.allow_pickle)
        check_fits(data, model.config, _fingerprint(directory), f"model {config.model}")
        how = f"A GPT-2, trained further from {config.model} on {_sources(data)}."
    return _train(Job("pretrain", config, how, model, data))


def distill(config: DistillConfig, data: Packed | None = None) -> TrainResult:
    """Teach a student what its teacher computes; the teacher is loaded only if an objective looks at it.

    Raises:
        As `pretrain`; also ModelError where teacher and student have different vocabularies.
    """
    _check_start(config)
    data = data or load_packed(config.data)
    if is_shape(config.student):
        student, directory = random_model(read_shape(config.student, data.tokenizer()), config.seed), None
    else:
        student, directory = load_model(config.student, "student", allow_pickle=config.allow_pickle)
    teacher = None
    if config.needs_teacher and config.teacher is not None:
        teacher, source = load_model(config.teacher, "teacher", allow_pickle=config.allow_pickle)
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
    return _train(Job("distill", config, how, student, data, Weights.of(config), teacher))


def finetune(config: FinetuneConfig, data: Packed | None = None) -> TrainResult:
    """Fine-tune any GPT-2 on a pregenerated dataset, or on a text that is packed into OUT/data first.

    Raises:
        As `pretrain`.
    """
    _check_start(config)
    model, directory = load_model(config.model, allow_pickle=config.allow_pickle)
    freeze(model, config.freeze)  # here already: a pattern that matches nothing stops before a text is packed
    if data is None:
        packed = is_packed(Path(config.data))
        data = load_packed(config.data if packed else _pack_text(config, directory, model.config.n_positions))
    check_fits(data, model.config, _fingerprint(directory), f"model {config.model}")
    return _train(Job("finetune", config, f"{config.model}, fine-tuned on {_sources(data)}.", model, data))


def _pack_text(config: FinetuneConfig, tokenizer: Path, positions: int) -> str:
    out = Path(config.out) / "data"
    if not (config.resume and is_packed(out)):
        length = config.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, positions)
        if length > positions:
            raise ConfigError(f"--sequence-length {length} is beyond the {positions} positions of {config.model}")
        shared = {key: getattr(config, key) for key in PackOptions.model_fields}
        pregenerate(
            PregenerateConfig(
                source=[config.data],
                tokenizer=str(tokenizer),
                out=str(out),
                sequence_length=length,
                seed=config.seed,
                resume=config.resume,
                **shared,
            )
        )
    return str(out)


def _fingerprint(directory: Path | None) -> str | None:
    tokenizer = None if directory is None else model_tokenizer(directory)
    return None if tokenizer is None else fingerprint(tokenizer)


def _sources(data: Packed) -> str:
    return ", ".join(data.manifest.get("sources", [data.name]))


def _check_start(config: TrainOptions) -> None:
    """Refuse, before anything is loaded: what would overwrite, another run's resume, what the machine cannot do."""
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("--precision fp16 needs a GPU", "on a CPU use bf16 or fp32")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if config.compile and shutil.which(compiler) is None:
        raise ConfigError(
            f"--compile needs a C++ compiler: {compiler} was not found", "install it, or set CXX to another"
        )
    out = Path(config.out)
    run = out / RUN_FILE
    data = out / "data"  # a text may be packed before the run begins
    begun = run.is_file() or is_packed(data) or workplace_of(data).is_dir()
    if not (config.resume and begun):
        require_free(out, "give another --out, or --resume to continue a run")
    elif run.is_file():
        changed = changed_mathematics(config, yaml.safe_load(run.read_text(encoding="utf-8")))
        if changed:
            raise ConfigError(
                f"--resume: {', '.join(changed)} differ from the run in {out}",
                f"its options are in {run}; or give another --out",
            )


def _accelerator(job: Job) -> Accelerator:
    AcceleratorState._reset_state()  # a process may train twice, in another precision
    config, weights = job.config, job.weights
    # objectives that never reach the logits may leave the top of the student without gradients
    whole = bool(weights.ce or weights.prediction)
    return Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not whole)],
        cpu=not torch.cuda.is_available(),
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=list(config.report_to) or None,
        project_dir=config.out,
    )


@fast_products()
def _train(job: Job) -> TrainResult:
    """Set up, run the loop, evaluate and write the model."""
    config, out = job.config, Path(job.config.out)
    freeze(job.model, config.freeze)
    set_dropout(job.model, config.dropout)
    accelerator = _accelerator(job)
    set_seed(config.seed)
    module = Step(job.model, job.teacher, job.weights, config)
    if job.teacher is not None:
        job.teacher.to(accelerator.device)
    if accelerator.is_main_process:
        write_text(out / RUN_FILE, config.to_yaml())
    if config.report_to:
        accelerator.init_trackers("tensorboard")
    tokenizer = job.data.tokenizer()
    state = run_loop(job, accelerator, module)
    result = _result(job, accelerator, state)
    if accelerator.is_main_process:
        save_model(job.model, out, tokenizer, _card(job, result), config.to_yaml())
        plot_curves(out)
    accelerator.end_training()
    return result


def _result(job: Job, accelerator: Accelerator, state: dict[str, Any]) -> TrainResult:
    on_gpu = accelerator.device.type == "cuda"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return TrainResult(
        model=str(Path(job.config.out).resolve()),
        steps=state["step"],
        tokens=state["tokens"],
        seconds=state["seconds"],
        loss=state["loss"],
        eval=None if state["eval"] is None else Evaluation(**state["eval"]),
        parameters=count_parameters(job.model),
        tokens_per_second=state["tokens"] / state["seconds"],
        peak_memory_bytes=peak,
    )


def _card(job: Job, result: TrainResult) -> str:
    shape = job.model.config
    figures: dict[str, Any] = {
        "parameters": f"{result.parameters:,}",
        "layers, width, heads": f"{shape.n_layer}, {shape.n_embd}, {shape.n_head}",
        "positions, vocabulary": f"{shape.n_positions}, {shape.vocab_size}",
        "steps, tokens trained on": f"{result.steps:,}, {result.tokens:,}",
        "seconds": f"{result.seconds:.0f}",
        "last training loss": f"{result.loss:.4f}",
    }
    if result.eval is not None:
        figures["held-out loss (nats/token)"] = f"{result.eval.loss:.4f}"
        figures["held-out perplexity"] = f"{result.eval.perplexity:.2f}"
    figures["tokenizer fingerprint of the data"] = f"`{job.data.manifest['tokenizer_fingerprint'][:16]}`"
    return model_card(Path(job.config.out).name, job.how, figures, job.command)
