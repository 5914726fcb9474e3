"""The one training loop: gradients of a global batch, a step, figures, evaluation, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from tinygpt2.capture import capture
from tinygpt2.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from tinygpt2.config import TrainOptions
from tinygpt2.dataset import Blocks, Packed, Shuffle
from tinygpt2.errors import ConfigError, DivergedError, InterruptedRunError
from tinygpt2.interrupt import stop_on_signals
from tinygpt2.metrics import MetricsLog
from tinygpt2.objectives import Counts, Objectives, Weights
from tinygpt2.objectives.prediction import head_operand
from tinygpt2.optim import learning_rate, make_optimizer
from tinygpt2.perplexity import exponential, token_losses
from tinygpt2.progress import say, track


@dataclass(frozen=True)
class Evaluation:
    """Cross-entropy on the held-out blocks, in nats per token, and its exponential."""

    loss: float
    perplexity: float


@dataclass
class Job:
    """What a command hands to the loop."""

    command: str
    config: TrainOptions
    how: str
    model: GPT2LMHeadModel
    data: Packed
    weights: Weights = field(default_factory=Weights)
    teacher: GPT2LMHeadModel | None = None


class Step(nn.Module):
    """One micro-batch to one loss. The student and the learned map are its parameters, the teacher is not.

    Args:
        student, teacher: the teacher may be None where no objective looks at one.
        weights: the objectives.
        config: how to run: compiled, with gradient checkpointing, with which chunk of logits.
    """

    def __init__(
        self, student: GPT2LMHeadModel, teacher: GPT2LMHeadModel | None, weights: Weights, config: TrainOptions
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = Objectives(weights, student.config, teacher.config if teacher else None, config.logit_chunk)
        # in a tuple and a list: not registered, so never trained, wrapped or saved
        self._teacher = (teacher,)
        self._teacher_head: list[Tensor] = []
        self._capture = torch.compile(capture) if config.compile else capture
        self._checkpointing = config.gradient_checkpointing

    def forward(
        self, input_ids: Int[Tensor, "B T"], lengths: Int[Tensor, " B"] | None = None, share: Counts | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and the detached terms; see `Objectives` for the arguments."""
        wanted = self.objectives
        student = self._capture(
            self.student,
            input_ids,
            wanted.student_states,
            wanted.student_attention,
            checkpointing=self._checkpointing,
        )
        head = self.student.lm_head.weight
        (teacher,) = self._teacher
        if teacher is None:
            loss, terms = wanted(input_ids, student, head, lengths=lengths, share=share)
        else:
            with torch.no_grad():
                taught = self._capture(teacher, input_ids, wanted.teacher_states, wanted.teacher_attention)
                if wanted.weights.prediction and not self._teacher_head:
                    self._teacher_head = [head_operand(teacher.lm_head.weight)]
            loss, terms = wanted(input_ids, student, head, taught, *self._teacher_head, lengths=lengths, share=share)
        if not loss.requires_grad:
            raise ConfigError("no objective reaches a parameter that is trained", "name fewer with --freeze")
        return loss, terms


def total_steps(config: TrainOptions, sequences: int, global_batch: int, length: int) -> int:
    """Return the optimizer steps that --max-steps, --max-tokens or --num-epochs (1 by default) ask for."""
    if config.max_steps is not None:
        return config.max_steps
    if config.max_tokens is not None:
        return max(1, math.ceil(config.max_tokens / (global_batch * length)))
    return max(1, math.ceil((config.num_epochs or 1) * sequences / global_batch))


def run_loop(job: Job, accelerator: Accelerator, module: Step) -> dict[str, Any]:
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
                progress.advance(0, "evaluating")
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
    share = None
    if blocks.padded:  # a mean over the global batch, whatever padding falls into which micro-batch
        count = turns * accelerator.num_processes
        share = Counts.of(blocks.lengths(order[step * count * size : (step + 1) * count * size])).over(count)
    for turn in range(turns):
        # The global batch is the same for any number of processes: each takes its slice of it.
        first = ((step * turns + turn) * accelerator.num_processes + accelerator.process_index) * size
        batch = blocks.batch(order[first : first + size]).to(accelerator.device)
        with accelerator.no_sync(module) if turn + 1 < turns else nullcontext():
            loss, terms = module(*batch, share)
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
        batch = blocks.batch(mine[start : start + batch_size]).to(accelerator.device)
        losses = token_losses(model, batch.input_ids)  # (B, T - 1)
        if batch.lengths is not None:
            losses = losses[torch.arange(1, losses.shape[1] + 1, device=losses.device) < batch.lengths[:, None]]
        sums += torch.stack([losses.double().sum(), torch.tensor(float(losses.numel()), device=sums.device)])
    total, count = accelerator.reduce(sums, "sum").tolist()
    model.train(was_training)
    loss = total / max(count, 1)
    return Evaluation(loss, exponential(loss))
