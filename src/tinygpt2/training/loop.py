"""The training loop of every command: gradients, optimizer step, metrics, evaluation, checkpoints."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from tinygpt2.config.training import TrainOptions
from tinygpt2.data.dataset import Blocks
from tinygpt2.data.mixture import training_order
from tinygpt2.errors import ConfigError, InterruptedRunError
from tinygpt2.evaluation.scoring import perplexity_of
from tinygpt2.models.activations import attention_kernel
from tinygpt2.models.lm_head import default_chunk
from tinygpt2.models.saving import save_description
from tinygpt2.runtime.devices import DTYPES, device_peak
from tinygpt2.runtime.signals import stop_on_signals
from tinygpt2.runtime.threads import tell_machine
from tinygpt2.training.checkpoint import Checkpoints
from tinygpt2.training.failures import may_step, memory_explained
from tinygpt2.training.job import Job
from tinygpt2.training.metrics import MetricsLog
from tinygpt2.training.optimizers import FixedPositions, clip_gradients, make_optimizer, unwrapped
from tinygpt2.training.resuming import earlier_lengths, record_run
from tinygpt2.training.schedule import learning_rate, warmup_steps
from tinygpt2.training.state import RunState
from tinygpt2.training.step import Evaluation, Step, evaluate, gradients, seed_step
from tinygpt2.training.throughput import ThroughputMeter
from tinygpt2.utils.progress import ProgressStage, detail, say, track


def run_loop(job: Job, accelerator: Accelerator, module: Step) -> tuple[RunState, nn.Module]:
    """Train to the last step; with --resume, start from the newest checkpoint.

    Returns:
        The final state, and `module` as Accelerate wrapped it. Its weights are those of the last step; with early
        stopping, those with the lowest evaluation loss.

    Raises:
        DivergedError: a loss or a gradient is NaN or infinite.
        InterruptedRunError: a signal stopped the run; a checkpoint was saved.
        MachineError: the disk is full, or memory ran out.
        ModelError: a checkpoint cannot be written or restored.
        ConfigError: the checkpoint belongs to another run.
    """
    config, run = job.config, _Run(job, accelerator, module)
    memory = memory_explained(config, job.data.sequence_length)
    bar = track(run.out.name, run.total, done=run.state.step, lines=False)  # the lines are those of `_Run.log`
    with closing(run.checkpoints), memory, stop_on_signals() as stop, bar as progress:
        while not run.finished:
            outcome = run.step(stop=bool(stop))
            row, improved = {}, False
            if run.state.step == 1 or run.due(config.log_every):
                row = run.log(outcome, progress)
            if len(job.evaluated) and run.due(config.eval_every):
                progress.advance(0, "evaluating")
                figures, improved = run.evaluate()
                row |= figures
            run.record(row)
            if outcome.stop or improved or run.due(config.save_every):
                run.checkpoints.save(run.state)
            progress.advance()
            if outcome.stop and not run.finished:
                run.checkpoints.settle()
                raise InterruptedRunError(
                    f"stopped after step {run.state.step} of {run.total}; a checkpoint was saved",
                    f"add --resume to continue {run.out}",
                )
        run.checkpoints.settle()
    run.take_best_weights()
    run.module.eval()
    return run.state, run.module


class _Outcome(NamedTuple):
    """The results of one optimizer step, which are the same in every process.

    Attributes:
        terms: loss and its parts, means over the global batch.
        stop: whether a signal asked any process to stop.
    """

    terms: dict[str, float]
    learning_rate: float
    grad_norm: float
    stop: bool


class _Run:
    """A training run in progress, with methods for stepping, logging, evaluating and saving.

    Attributes:
        module: as Accelerate wrapped it.
        total: optimizer steps of the whole run.
        state: the progress so far.
    """

    def __init__(self, job: Job, accelerator: Accelerator, module: Step) -> None:
        config, self._job, self._accelerator = job.config, job, accelerator
        self.out, self._blocks = Path(config.out), job.data.train
        self._sequences, self.total = (
            job.sequences(accelerator.num_processes),
            job.total_steps(accelerator.num_processes),
        )
        self._peak_rate = job.peak_rate()
        _tell_choices(job, accelerator)
        _tell_deepspeed(accelerator, config)
        self.module, optimizer = accelerator.prepare(module, make_optimizer(module, config))
        self._optimizer = unwrapped(accelerator, optimizer)
        self._parameters = list(self.module.parameters())
        self._order = training_order(job.data, config.seed)
        beside = None
        if accelerator.is_main_process:  # a checkpoint is a model, too
            beside = partial(save_description, job.model, tokenizer=job.data.tokenizer())
        self.checkpoints = Checkpoints(
            self.out, accelerator, self.module, self._optimizer, config.keep, config.on_save_error, beside
        )
        self.state = RunState(self._sequences, job.data.content, warmup_steps(self.total, config))
        if config.resume:
            self.state = self.checkpoints.resume(self.state)
            if accelerator.is_main_process:
                _check_length(job, self.state, accelerator.num_processes)
                record_run(job.pinned_config())
        positions = accelerator.unwrap_model(self.module).student.transformer.wpe.weight
        decays = positions.requires_grad and config.weight_decay
        self._fixed = FixedPositions(positions, job.data.sequence_length) if decays else None
        self._metrics = MetricsLog(self.out, self.state.step) if accelerator.is_main_process else None
        self._step_tokens = self._sequences * job.data.sequence_length
        self._meter = ThroughputMeter(self.state, self._step_tokens, _peak_tokens_per_second(job, accelerator))
        self.module.train()

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or early stopping ends the run."""
        patience = self._job.config.early_stopping_patience
        return self.state.step >= self.total or (patience is not None and self.state.worse >= patience)

    def due(self, every: int | None) -> bool:
        """Return whether something that happens every `every` steps and at the end is due now."""
        return self.finished or (every is not None and self.state.step % every == 0)

    def step(self, *, stop: bool) -> _Outcome:
        """Take one optimizer step on the next global batch.

        Args:
            stop: whether a signal asked this process to stop.
        """
        config, state, accelerator = self._job.config, self.state, self._accelerator
        rate = learning_rate(state.step, self.total, config, self._peak_rate, state.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        seed_step(config.seed, state.step, accelerator.process_index)
        indices = self._order[state.step * self._sequences : (state.step + 1) * self._sequences]
        parts = gradients(accelerator, self.module, self._blocks, indices, config.micro_batch_size)
        norm = clip_gradients(accelerator, self._optimizer, self._parameters, config.grad_clip)
        terms, stop = _agree(accelerator, parts, stop)
        if may_step(accelerator, state, terms, norm, indices, config):
            self._optimizer.step()
            if self._fixed is not None:
                self._fixed.restore()
        for parameter in self._parameters:
            parameter.grad = None
        state.step += 1
        state.tokens = state.step * self._step_tokens
        state.loss = terms["loss"] if math.isfinite(terms["loss"]) else None
        return _Outcome(terms, rate, norm, stop)

    def log(self, outcome: _Outcome, progress: ProgressStage) -> dict[str, float]:
        """Show the progress to the user; return the step's metrics for metrics.jsonl."""
        step, speed = self.state.step, self._meter.lap(self.state.step)
        progress.line(f"step {step}/{self.total}  {self._meter.note(outcome.terms, speed, self.total - step)}")
        progress.advance(0, self._meter.note(outcome.terms, speed))
        row = {**outcome.terms, "learning_rate": outcome.learning_rate, "grad_norm": outcome.grad_norm, **speed}
        return row | ({"skipped": self.state.skipped} if self.state.skipped else {})

    def evaluate(self) -> tuple[dict[str, float], bool]:
        """Evaluate; return the metrics for metrics.jsonl, and whether the loss is the lowest so far."""
        with self._meter.paused():
            by_data = {name: self._evaluate(blocks) for name, blocks in self._job.evaluated_by_data().items()}
            whole = _joined(by_data, self._job) if by_data else self._evaluate(self._job.evaluated)
        self.state.eval_by_data = {name: asdict(one) for name, one in by_data.items()} or None
        row = {f"eval/{key}": value for key, value in asdict(whole).items()}
        row |= {f"eval/{name}/{key}": value for name, one in by_data.items() for key, value in asdict(one).items()}
        return row, self.state.evaluated(**asdict(whole))

    def _evaluate(self, blocks: Blocks) -> Evaluation:
        return evaluate(self._accelerator, self.module, blocks, self._job.config.micro_batch_size)

    def record(self, row: dict[str, float]) -> None:
        """Write metrics to metrics.jsonl and to the trackers, if there are any; update the time in the state."""
        if row and self._metrics is not None:
            with self.checkpoints.may_fail("metrics.jsonl"):
                place = {"step": self.state.step, "total_steps": self.total, "tokens": self.state.tokens}
                self._metrics.write({**place, **row})
            self._accelerator.log(row, step=self.state.step)
        self.state.seconds = self._meter.seconds()

    def take_best_weights(self) -> None:
        """With early stopping, restore the weights that had the lowest evaluation loss."""
        best = self.state.best
        if self._job.config.early_stopping_patience and best is not None and self.checkpoints.restore_best(self.state):
            say(f"Using the weights from step {best.step}, which had the lowest evaluation loss.")
            self.state.eval = {"loss": best.loss, "perplexity": best.perplexity}
            self.state.eval_by_data = self.state.eval_by_data if best.step == self.state.step else None


def _tell_choices(job: Job, accelerator: Accelerator) -> None:
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


def _joined(by_data: dict[str, Evaluation], job: Job) -> Evaluation:
    """Return the evaluation on the blocks of all datasets together."""
    targets = {
        name: sum(max(0, length - 1) for length in blocks.lengths(range(len(blocks))))
        for name, blocks in job.evaluated_by_data().items()
    }
    loss = sum(one.loss * targets[name] for name, one in by_data.items()) / max(1, sum(targets.values()))
    return Evaluation(loss, perplexity_of(loss))


def _check_length(job: Job, state: RunState, processes: int) -> None:
    """Check that a resumed run may end after another number of steps than it began with.

    It may if the learning rates of the steps that are done are the same for both lengths. So a run whose schedule is
    constant, or wsd and not yet decaying, can be made longer.

    Raises:
        ConfigError: the learning rates differ, or more steps are done than the run may now have.
    """
    config, total, peak = job.config, job.total_steps(processes), job.peak_rate()
    before = replace(job, config=config.model_copy(update=earlier_lengths(Path(config.out)))).total_steps(processes)
    if before == total:
        return
    rates = [
        [learning_rate(step, end, config, peak, state.warmup) for step in range(state.step)] for end in (before, total)
    ]
    if rates[0] != rates[1] or total < state.step:
        raise ConfigError(
            f"--resume: the run has {before} steps, and {state.step} of them are done with a learning rate that does "
            f"not fit a run of {total} steps (--max-steps, --max-tokens, --num-epochs)",
            "keep the length; only a run with --lr-schedule constant, or wsd before its decay, can be made longer",
        )
    if state.warmup not in (None, warmup_steps(total, config)):
        say(f"the run now has {total} steps instead of {before}, and keeps its warm-up of {state.warmup} steps")


def _tell_deepspeed(accelerator: Accelerator, config: TrainOptions) -> None:
    """If DeepSpeed is used, set the options it would read from a data loader; they override those in its file."""
    if accelerator.state.deepspeed_plugin is None:
        return
    options = accelerator.state.deepspeed_plugin.deepspeed_config
    options |= {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.grad_clip,
    }
    if options.get("zero_optimization", {}).get("stage") == 3:
        options["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # also gathers 32-bit ones


def _peak_tokens_per_second(job: Job, accelerator: Accelerator) -> float | None:
    """Return the tokens per second at the peak rate of all devices, or None if it is not known."""
    peak = device_peak(accelerator.device, job.config.precision)
    return None if peak is None else peak * accelerator.num_processes / job.operations()


def _agree(accelerator: Accelerator, parts: dict[str, torch.Tensor], stop: bool) -> tuple[dict[str, float], bool]:
    """Return the mean loss and its parts over all processes, and whether any process was asked to stop."""
    both = torch.stack([*parts.values(), parts["loss"].new_tensor(float(stop))])
    *means, asked = accelerator.reduce(both, "mean").tolist()
    return dict(zip(parts, means, strict=True)), asked > 0
