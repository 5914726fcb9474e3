"""The only training loop: `pretrain`, `distill` and `finetune` differ in what they hand to it."""

from __future__ import annotations

import math
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from tinygpt2.capture import capture
from tinygpt2.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from tinygpt2.config import (
    DEFAULT_SEQUENCE_LENGTH,
    DistillConfig,
    FinetuneConfig,
    PregenerateConfig,
    PretrainConfig,
    TrainOptions,
    changed_mathematics,
)
from tinygpt2.dataset import Blocks, Packed, Shuffle, is_packed, load_packed
from tinygpt2.errors import ConfigError, DivergedError, InterruptedRunError, ModelError
from tinygpt2.files import require_free, write_text
from tinygpt2.interrupt import stop_on_signals
from tinygpt2.metrics import MetricsLog, model_card, plot_curves
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
from tinygpt2.objectives import Objectives, Weights
from tinygpt2.optim import learning_rate, make_optimizer
from tinygpt2.pack import pregenerate
from tinygpt2.perplexity import check_fits, token_losses
from tinygpt2.progress import say, track
from tinygpt2.tokenizer import fingerprint

RUN_FILE = "config.yaml"


@dataclass(frozen=True)
class Evaluation:
    """Cross-entropy on the held-out blocks, in nats per token, and its exponential."""

    loss: float
    perplexity: float


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


@dataclass
class Job:
    """What the three commands hand to the loop."""

    config: TrainOptions
    how: str
    model: GPT2LMHeadModel
    data: Packed
    weights: Weights = field(default_factory=Weights)
    teacher: GPT2LMHeadModel | None = None


class Step(nn.Module):
    """One micro-batch to one loss. The student and the learned map are its parameters, the teacher is not."""

    def __init__(self, student: GPT2LMHeadModel, teacher: GPT2LMHeadModel | None, weights: Weights) -> None:
        super().__init__()
        self.student = student
        self.objectives = Objectives(weights, student.config, teacher.config if teacher else None)
        self._teacher = (teacher,)  # in a tuple: not registered, so never trained, wrapped or saved

    def forward(self, input_ids: Int[Tensor, "B T"]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and the detached terms."""
        wanted = self.objectives
        student = capture(self.student, input_ids, wanted.student_states, wanted.student_scores)
        head = self.student.lm_head.weight
        (teacher,) = self._teacher
        if teacher is None:
            loss, terms = wanted(input_ids, student, head)
        else:
            with torch.no_grad():
                taught = capture(teacher, input_ids, wanted.teacher_states, wanted.teacher_scores)
            loss, terms = wanted(input_ids, student, head, taught, teacher.lm_head.weight)
        return loss, terms


def pretrain(config: PretrainConfig) -> TrainResult:
    """Train a language model from random or given weights on a pregenerated dataset.

    Raises:
        ConfigError, DataError, ModelError: see the exit codes of the command line.
        DivergedError: a loss or gradient is not finite.
        InterruptedRunError: stopped by a signal, after saving.
    """
    data = load_packed(config.data)
    if config.shape is not None:
        model = random_model(read_shape(config.shape, data.tokenizer()), config.seed)
        check_fits(data, model.config, None, f"the configuration {config.shape}")
        how = f"A GPT-2 of shape {config.shape}, trained from random weights on {_sources(data)}."
    else:
        model, directory = load_model(config.model or "", allow_pickle=config.allow_pickle)
        check_fits(data, model.config, _fingerprint(directory), f"model {config.model}")
        how = f"A GPT-2, trained further from {config.model} on {_sources(data)}."
    return _train(Job(config, how, model, data))


def distill(config: DistillConfig) -> TrainResult:
    """Teach a student what its teacher computes; the teacher is loaded only if an objective looks at it.

    Raises:
        As `pretrain`; also ModelError where teacher and student have different vocabularies.
    """
    data = load_packed(config.data)
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
        teacher.requires_grad_(False)
    check_fits(data, student.config, _fingerprint(directory), f"student {config.student}")
    how = (
        f"A GPT-2 that learned from {config.teacher} by recipe {config.recipe}, "
        f"started from {config.student}, on {_sources(data)}."
    )
    return _train(Job(config, how, student, data, Weights.of(config), teacher))


def finetune(config: FinetuneConfig) -> TrainResult:
    """Fine-tune any GPT-2 on a pregenerated dataset, or on a text that is packed into OUT/data first.

    Raises:
        As `pretrain`.
    """
    model, directory = load_model(config.model, allow_pickle=config.allow_pickle)
    _check_out(config)
    if is_packed(Path(config.data)):
        data = load_packed(config.data)
    else:
        data = load_packed(_pack_text(config, directory, model.config.n_positions))
    check_fits(data, model.config, _fingerprint(directory), f"model {config.model}")
    return _train(Job(config, f"{config.model}, fine-tuned on {_sources(data)}.", model, data))


def _pack_text(config: FinetuneConfig, tokenizer: Path, positions: int) -> str:
    out = Path(config.out) / "data"
    if not (config.resume and is_packed(out)):
        length = config.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, positions)
        if length > positions:
            raise ConfigError(f"--sequence-length {length} is beyond the {positions} positions of {config.model}")
        shared = {
            key: getattr(config, key)
            for key in ("document", "text_column", "test_fraction", "append_eos", "num_workers")
        }
        pregenerate(
            PregenerateConfig(
                source=[config.data],
                tokenizer=str(tokenizer),
                out=str(out),
                sequence_length=length,
                seed=config.seed,
                **shared,
            )
        )
    return str(out)


def _fingerprint(directory: Path | None) -> str | None:
    tokenizer = None if directory is None else model_tokenizer(directory)
    return None if tokenizer is None else fingerprint(tokenizer)


def _sources(data: Packed) -> str:
    return ", ".join(data.manifest.get("sources", [str(data.path)]))


def total_steps(config: TrainOptions, sequences: int, global_batch: int, length: int) -> int:
    """Return the optimizer steps that --max-steps, --max-tokens or --num-epochs (1 by default) ask for."""
    if config.max_steps is not None:
        return config.max_steps
    if config.max_tokens is not None:
        return max(1, math.ceil(config.max_tokens / (global_batch * length)))
    return max(1, math.ceil((config.num_epochs or 1) * sequences / global_batch))


def _check_out(config: TrainOptions) -> None:
    """Refuse to overwrite, and to resume a run whose mathematics were others."""
    out = Path(config.out)
    run = out / RUN_FILE
    if not config.resume or (out.is_dir() and any(out.iterdir()) and not run.is_file()):
        require_free(out, "give another --out, or --resume to continue a run")
    elif run.is_file():
        changed = changed_mathematics(config, yaml.safe_load(run.read_text(encoding="utf-8")))
        if changed:
            raise ConfigError(
                f"--resume: {', '.join(changed)} differ from the run in {out}",
                f"its options are in {run}; or give another --out",
            )


def _accelerator(config: TrainOptions) -> Accelerator:
    cpu = not torch.cuda.is_available()
    if cpu and config.precision == "fp16":
        raise ConfigError("--precision fp16 needs a GPU", "on a CPU use bf16 or fp32")
    return Accelerator(
        cpu=cpu,
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=list(config.report_to) or None,
        project_dir=config.out,
    )


def _train(job: Job) -> TrainResult:
    """Set up, run the loop, evaluate and write the model."""
    config, out = job.config, Path(job.config.out)
    _check_out(config)
    freeze(job.model, config.freeze)
    set_dropout(job.model, config.dropout)
    accelerator = _accelerator(config)
    set_seed(config.seed)
    module = Step(job.model, job.teacher, job.weights)
    if job.teacher is not None:
        job.teacher.to(accelerator.device)
    if accelerator.is_main_process:
        write_text(out / RUN_FILE, config.to_yaml())
    if config.report_to:
        accelerator.init_trackers("tensorboard")
    tokenizer = job.data.tokenizer()
    state = _loop(job, accelerator, module)
    result = _result(job, accelerator, state)
    if accelerator.is_main_process:
        save_model(job.model, out, tokenizer, _card(job, result), config.to_yaml())
        plot_curves(out)
    accelerator.end_training()
    return result


def _loop(job: Job, accelerator: Accelerator, module: Step) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start, to the last step; return the final state."""
    config, out, data = job.config, Path(job.config.out), job.data
    sequences = config.micro_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    step_tokens = sequences * data.sequence_length
    total = total_steps(config, len(data.train), sequences, data.sequence_length)
    wrapped, optimizer = accelerator.prepare(module, make_optimizer(module, config))
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    order = Shuffle(len(data.train), config.seed)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "loss": math.nan, "eval": None}
    if config.resume and (found := checkpoints(out)):
        state = load_checkpoint(accelerator, found[-1])
        say(f"resuming from {found[-1]}")
    log = MetricsLog(out, state["step"]) if accelerator.is_main_process else None
    clock = Stopwatch(state["step"], state["seconds"])
    job.model.train()
    with stop_on_signals() as stop, track(out.name, total) as progress:
        progress.advance(state["step"])
        for step in range(state["step"], total):
            rate = learning_rate(step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            terms = _gradients(accelerator, wrapped, data.train, order, step, config)
            norm = accelerator.clip_grad_norm_(trainable, config.grad_clip or math.inf)
            _require_finite(step, terms, norm, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done, last = step + 1, step + 1 == total
            row: dict[str, Any] = {}
            if done == 1 or last or done % config.log_every == 0:
                row = {name: float(accelerator.reduce(term, "mean")) for name, term in terms.items()}
                speed = clock.lap(done) * step_tokens
                row |= {"learning_rate": rate, "grad_norm": float(norm), "tokens_per_second": speed}
                state["loss"] = row["loss"]
                note = f"loss {row['loss']:.4f}  {speed:,.0f} tokens/s"
                progress.line(f"step {done}/{total}  {note}  eta {(total - done) * step_tokens / speed:.0f} s")
                progress.advance(0, note)
            if len(data.test) and (last or (config.eval_every and done % config.eval_every == 0)):
                with clock.paused():
                    state["eval"] = asdict(evaluate(accelerator, job.model, data.test, config.micro_batch_size))
                row |= {f"eval/{name}": value for name, value in state["eval"].items()}
            if row and log is not None:
                log.write({"step": done, "tokens": done * step_tokens, **row})
                accelerator.log(row, step=done)
            state |= {"step": done, "tokens": done * step_tokens, "seconds": clock.seconds()}
            if last or stop or done % config.save_every == 0:
                save_checkpoint(accelerator, out, done, state, config.keep)
            progress.advance()
            if stop and not last:
                raise InterruptedRunError(
                    f"stopped after step {done} of {total}; saved", f"add --resume to continue {out}"
                )
    job.model.eval()
    return state


def _gradients(
    accelerator: Accelerator,
    module: nn.Module,
    blocks: Blocks,
    order: Shuffle,
    step: int,
    config: TrainOptions,
) -> dict[str, Tensor]:
    """Accumulate the gradients of one global batch; return this process's mean loss and its parts."""
    size, turns = config.micro_batch_size, config.gradient_accumulation_steps
    means: dict[str, Tensor] = {}
    for turn in range(turns):
        # The global batch is the same for any number of processes: each takes its slice of it.
        first = ((step * turns + turn) * accelerator.num_processes + accelerator.process_index) * size
        batch = blocks.batch(order[first : first + size]).to(accelerator.device)
        with accelerator.no_sync(module) if turn + 1 < turns else nullcontext():
            loss, terms = module(batch)
            accelerator.backward(loss / turns)
        for name, term in {"loss": loss, **{f"loss/{name}": term for name, term in terms.items()}}.items():
            means[name] = means.get(name, 0) + term.detach().float() / turns
    return means


def _require_finite(step: int, terms: dict[str, Tensor], norm: Tensor, config: TrainOptions) -> None:
    # fp16's loss scaler meets infinite gradients by design and skips them itself
    if math.isfinite(terms["loss"]) and (config.precision == "fp16" or math.isfinite(norm)):
        return
    parts = ", ".join(f"{name} {float(term):g}" for name, term in terms.items())
    raise DivergedError(
        f"step {step + 1} is not finite: {parts}, gradient norm {float(norm):g}",
        "lower --learning-rate, lengthen --warmup-ratio or lower --grad-clip; checkpoints saved so far are intact",
    )


class Stopwatch:
    """Seconds of a run, those before a resume included, and steps per second between two laps."""

    def __init__(self, step: int, seconds: float) -> None:
        self._start = self._mark = time.perf_counter()
        self._step, self._before = step, seconds

    def seconds(self) -> float:
        """Return the seconds since the run's first step."""
        return self._before + time.perf_counter() - self._start

    def lap(self, step: int) -> float:
        """Return the steps per second since the last lap."""
        now = time.perf_counter()
        speed = (step - self._step) / (now - self._mark)
        self._mark, self._step = now, step
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out of the current lap."""
        before = time.perf_counter()
        yield
        self._mark += time.perf_counter() - before


def evaluate(accelerator: Accelerator, model: GPT2LMHeadModel, blocks: Blocks, batch_size: int) -> Evaluation:
    """Measure cross-entropy on held-out blocks, in float32, each process on its share."""
    was_training = model.training
    model.eval()
    mine = range(accelerator.process_index, len(blocks), accelerator.num_processes)
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for start in range(0, len(mine), batch_size):
        losses = token_losses(model, blocks.batch(mine[start : start + batch_size]).to(accelerator.device))
        sums += torch.stack([losses.double().sum(), torch.tensor(float(losses.numel()), device=sums.device)])
    total, count = accelerator.reduce(sums, "sum").tolist()
    model.train(was_training)
    loss = total / count
    return Evaluation(loss, math.exp(loss) if loss < 700 else math.inf)


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
    return model_card(Path(job.config.out).name, job.how, figures, shlex.join(["tinygpt2", *sys.argv[1:]]))
