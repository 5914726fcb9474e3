"""The training loop of every command: gradients, optimizer step, metrics, evaluation, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.training import SAVE_EVERY
from tinygpt2.data.dataset import Blocks
from tinygpt2.data.mixture import training_order
from tinygpt2.errors import InterruptedRunError
from tinygpt2.models.parameters import Rounding, TailAverage, count_parameters
from tinygpt2.models.saving import save_description
from tinygpt2.runtime.profiling import profiled
from tinygpt2.runtime.read_ahead import ReadAhead
from tinygpt2.runtime.signals import stop_on_signals
from tinygpt2.training.checkpoint import MASTERS, MEAN, REPLAY, Checkpoints
from tinygpt2.training.failures import may_step, step_explained
from tinygpt2.training.job import Job, cast_teacher, figures_before_training, tell_choices
from tinygpt2.training.metrics import MetricsLog, agreed, metrics_of
from tinygpt2.training.optimizers import FixedPositions, clip_gradients, make_optimizer, unwrapped
from tinygpt2.training.own_text.figures import SAMPLES
from tinygpt2.training.own_text.source import OwnText
from tinygpt2.training.preparation import seed_step, tell_deepspeed
from tinygpt2.training.resuming import check_schedule, record_run
from tinygpt2.training.schedule import Plan, learning_rate, set_rates, warmup_steps
from tinygpt2.training.state import RunState
from tinygpt2.training.step import Evaluation, Step, StepData, evaluate, gradients, read_step
from tinygpt2.training.throughput import ThroughputMeter, TimeLimit, evaluation_seconds, step_seconds
from tinygpt2.utils.progress import ProgressStage, say, track

_SAVE_AFTER = 600.0  # seconds without a checkpoint, if --save-every is not given


def run_loop(job: Job, accelerator: Accelerator, module: Step) -> tuple[RunState, nn.Module]:
    """Train to the last step; with --resume, start from the newest checkpoint.

    Returns:
        The final state, and `module` as Accelerate wrapped it. Its weights are those of the last step or their mean
        (--average-tail); with early stopping, those with the lowest evaluation loss.

    Raises:
        DivergedError: a loss or a gradient is NaN or infinite.
        InterruptedRunError: a signal stopped the run; the message says whether a checkpoint was saved.
        MachineError: the disk is full, or memory ran out.
        ModelError: a checkpoint cannot be written or restored.
        ConfigError: the checkpoint belongs to another run.
    """
    config, run = job.config, _Run(job, accelerator, module)
    memory = step_explained(config, job.data.sequence_length)
    trace = profiled(config.profile, run.out / "profile")
    bar = track(run.out.name, unit="steps", done=run.state.step, lines=False)  # the lines are those of `_Run.log`
    with closing(run.checkpoints), closing(run.data), memory, stop_on_signals() as stop, bar as progress, trace as mark:
        run.begin(progress)
        while not run.finished:
            outcome = run.step(stop=bool(stop))
            mark.step()
            row, improved = {}, False
            if run.state.step == 1 or run.due(config.log_every):
                row = run.log(outcome, progress)
            if len(job.evaluated) and run.due(config.eval_every):
                progress.advance(0, "evaluating")
                figures, improved = run.evaluate()
                row |= figures
            run.record(row)
            if outcome.stop or improved or outcome.overdue or run.due(config.save_every or SAVE_EVERY):
                run.save()
            progress.advance()
            if outcome.stop and not run.finished:
                saved = "a checkpoint was saved" if run.checkpoints.settle() else "its checkpoint could not be saved"
                raise InterruptedRunError(
                    f"stopped after step {run.state.step} of {run.total}; {saved}",
                    f"add --resume to continue {run.out}",
                )
        run.checkpoints.settle()
    run.take_final_weights()
    run.module.eval()
    return run.state, run.module


class _Outcome(NamedTuple):
    """The results of one optimizer step, which are the same in every process.

    Attributes:
        terms: loss and its parts, means over the global batch.
        stop: whether a signal asked any process to stop.
        overdue: whether the last checkpoint is too old.
    """

    terms: dict[str, float]
    learning_rate: float
    grad_norm: float
    stop: bool
    overdue: bool


class _Run:
    """A training run in progress, with methods for stepping, logging, evaluating and saving.

    Attributes:
        module: as Accelerate wrapped it.
        data: of each step, which a thread reads during the step before.
        plan: the optimizer steps of the whole run, and their places in the schedule.
        state: the progress so far.
    """

    def __init__(self, job: Job, accelerator: Accelerator, module: Step) -> None:
        config, self._job, self._accelerator = job.config, job, accelerator
        self.out, self._blocks = Path(config.out), job.data.train
        self._sequences = job.sequences(accelerator.num_processes)
        self.plan = Plan.of(1 if config.max_minutes else job.total_steps(accelerator.num_processes))
        self._peak_rate = job.peak_rate()
        tell_choices(job, accelerator)
        tell_deepspeed(accelerator, config)
        self.module, optimizer = accelerator.prepare(module, make_optimizer(module, config))
        self._optimizer = unwrapped(optimizer)
        self._parameters = list(self.module.parameters())
        student = accelerator.unwrap_model(self.module).student
        self._rounding = Rounding(student, config.quantize, config.quantize_from)
        self._average = TailAverage(student, config.average_tail)
        self._own_text: OwnText | None = None
        if isinstance(config, DistillConfig) and config.samples_text:
            self._own_text = OwnText(config, accelerator, student, job.teacher, job.data, job.clock)
        self._order = training_order(job.data, config.seed)
        self.data = ReadAhead(self._read)
        beside = None
        if accelerator.is_main_process:  # a checkpoint is a model, too
            beside = partial(save_description, job.model, tokenizer=job.data.tokenizer())
        kept = {MASTERS: self._rounding.masters, MEAN: self._average.mean}
        kept |= {REPLAY: self._own_text.replayed if self._own_text else {}}
        saved, how = (self.module, self._optimizer, kept), (config.keep, config.on_save_error)
        self.checkpoints = Checkpoints(self.out, accelerator, *saved, *how, beside)
        self.state = RunState(self._sequences, job.data.content, warmup_steps(self.total, config))
        if config.resume:
            self.state = self.checkpoints.resume(self.state)
            if accelerator.is_main_process:
                self._check_schedule()
                record_run(job.recorded_config())
        if self.state.plan is not None:
            self.plan = Plan(**self.state.plan)
        self._said = self.plan
        with self._rounding.undone():
            self._fixed = FixedPositions(student.transformer.wpe.weight, job.data.sequence_length)
        self._metrics = MetricsLog(self.out, self.state.step) if accelerator.is_main_process else None
        self._step_tokens = self._sequences * job.data.sequence_length
        self._before: dict[str, float] = {}
        self._limit = self._time_limit()
        self._meter = ThroughputMeter(
            self.state,
            self._step_tokens,
            job.peak_tokens_per_second(accelerator),
            job.clock,
            *([self._limit.seconds / 10] if self._limit else []),
        )
        self._saved = job.clock()
        self.module.train()

    def _read(self, step: int) -> tuple[list[int], StepData]:
        """Read the blocks of a step; return the numbers of all, and what this process needs."""
        indices = self._order[step * self._sequences : (step + 1) * self._sequences]
        size = self._job.config.micro_batch_size
        return indices, read_step(self._accelerator, self.module, self._blocks, indices, size)

    def _with_own_text(self, data: StepData, indices: list[int], step: int) -> StepData:
        """Return the data of a step with sampled text in the place of some blocks, if the run has any."""
        if self._own_text is None:
            return data
        self.data.wait()  # it reads the beginnings of blocks
        batch, share = self._own_text.into(data.batch, indices, step, self.plan.share(step), self.state.own_text)
        return data if share is None else data._replace(batch=batch, share=share)

    def _check_schedule(self) -> None:
        """Check that a resumed run may have the length and the peak rate that it now has."""
        job, processes = self._job, self._accelerator.num_processes
        check_schedule(
            job.config,
            self.state,
            lambda options: replace(job, config=options).total_steps(processes),
            lambda options: replace(job, config=options).peak_rate(),
        )

    @property
    def total(self) -> int:
        """The number of optimizer steps of the whole run, as far as it is known."""
        return self.plan.steps

    def _time_limit(self) -> TimeLimit | None:
        """Return the limit of --max-minutes, which includes the time that interrupted attempts have used."""
        config, earlier, started, clock = self._job.config, self.state.used_seconds, self._job.started, self._job.clock
        self._used: Callable[[], float] = lambda: earlier + clock() - started
        if config.max_minutes is None:
            return None
        return TimeLimit(60 * config.max_minutes, self._used, config.eval_every, count_parameters(self._job.model))

    def begin(self, progress: ProgressStage) -> None:
        """Before the first step: measure student and teacher, and with --max-minutes the time of a step."""
        if self.state.step == 0:
            with self._meter.paused(evaluating=True):
                self._before = figures_before_training(self._job, self._accelerator, self.module, self.state)
        cast_teacher(self._job, self._accelerator)
        self._accelerator.unwrap_model(self.module).place_teacher(self._accelerator.device)
        if self._limit is not None and not self.finished:
            with self._meter.paused():
                self._plan_by_time(self._limit)
        self._rounding.reach(self.plan.share(self.state.step))
        progress.expect(self.total)

    def _plan_by_time(self, limit: TimeLimit) -> None:
        """Find the number of steps by timing a few, which change no weights; a resumed run has its plan already."""
        job, accelerator, clock = self._job, self._accelerator, self._job.clock
        size = job.config.micro_batch_size
        self._meter.eval_seconds = evaluation_seconds(accelerator, self.module, job.evaluated, size, clock)
        if self.state.plan is not None:
            return
        place = (accelerator, self.module, None, self._blocks, self._sequences, size)
        timed = partial(step_seconds, *place, clock=clock, prepare=self._with_own_text)
        _, first = timed(steps=2)
        more = self._from_main(min(4, int(0.01 * limit.seconds / max(first, 1e-9))))
        for seconds in [first, *timed(steps=more)]:
            self._meter.count(seconds)
        if self._own_text is not None:
            self._own_text.forget()
        self.plan = self._said = Plan.of(self._from_main(self._fitting()))
        self.state.plan, self.state.warmup = asdict(self.plan), warmup_steps(self.total, job.config)
        say(f"--max-minutes {job.config.max_minutes:g}: about {self.total:,} steps")

    def _from_main(self, number: int) -> int:
        """Return the main process's number in every process."""
        return broadcast_object_list([number])[0] if self._accelerator.num_processes > 1 else number

    def _fitting(self) -> int:
        """Return how many steps the whole run has by the time that is left; at least the next one is taken."""
        each = self._meter.step_seconds
        if self._limit is None or each is None:
            return self.total
        return self.state.step + max(1, self._limit.steps(each, self._meter.eval_seconds))

    def _replan(self, steps: int) -> None:
        """Change the number of steps. A change of more than 10 % is said."""
        if self._limit is None or steps == self.total:
            return
        self.plan = self.plan.changed(self.state.step, steps)
        self.state.plan = asdict(self.plan)
        before = self._said.steps
        if abs(steps - before) > 0.1 * before:
            self._said = self.plan
            say(f"--max-minutes {self._job.config.max_minutes:g}: now about {steps:,} steps instead of {before:,}")

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
        steps, overdue = self._fitting(), self._job.clock() - self._saved > _SAVE_AFTER and config.save_every is None
        seed_step(config.seed, state.step, accelerator.process_index)
        indices, data = self.data(state.step)
        data = self._with_own_text(data, indices, state.step)
        parts = gradients(accelerator, self.module, self._blocks, indices, config.micro_batch_size, data)
        total = clip_gradients(accelerator, self._optimizer, self._parameters, config.grad_clip)
        terms, norm, stop, overdue, steps = agreed(accelerator, parts, total, stop, overdue, steps)
        self._replan(steps)
        now = partial(learning_rate, self.plan.at(state.step), self.plan.length, config, warmup=state.warmup)
        rate = set_rates(self._optimizer, now, self._peak_rate)
        if may_step(accelerator, state, terms, norm, indices, config):
            with self._rounding.undone():
                self._optimizer.step()
                self._fixed.restore()
        if accelerator.scaler is not None:
            accelerator.scaler.update()
        for parameter in self._parameters:
            parameter.grad = None
        state.step += 1
        state.tokens = state.step * self._step_tokens
        state.loss = terms["loss"] if math.isfinite(terms["loss"]) else None
        self._rounding.reach(self.plan.share(state.step))
        self._average.reach(self.plan.share(state.step))
        self._meter.stepped()
        return _Outcome(terms, rate, norm, stop, overdue)

    def log(self, outcome: _Outcome, progress: ProgressStage) -> dict[str, float]:
        """Show the progress to the user; return the step's metrics for metrics.jsonl."""
        step, speed = self.state.step, self._meter.lap(self.state.step)
        progress.expect(self.total)
        progress.line(f"step {step}/{self.total}  {self._meter.note(outcome.terms, speed, self.total - step)}")
        progress.advance(0, self._meter.note(outcome.terms, speed))
        row = {**outcome.terms, "learning_rate": outcome.learning_rate, "grad_norm": outcome.grad_norm, **speed}
        row |= self._before if step == 1 else {}
        row |= {} if self._own_text is None else self._own_text.metrics()
        return row | ({"skipped": self.state.skipped} if self.state.skipped else {})

    def evaluate(self) -> tuple[dict[str, float], bool]:
        """Evaluate; return the metrics for metrics.jsonl, and whether the loss is the lowest so far."""
        with self._meter.paused(evaluating=True), self._average.used():
            self.data.wait()
            whole, by_data = self._job.measured(self._evaluate)
        self.state.eval_by_data = {name: asdict(one) for name, one in by_data.items()} or None
        if self._own_text is not None:
            with self.checkpoints.may_fail(SAMPLES):
                self._own_text.show(self.state.step)
            self.state.own_text = self._own_text.evaluated(self.state.own_text, whole.loss)
        every = {"eval": whole, **{f"eval/{name}": one for name, one in by_data.items()}}
        return metrics_of(every), self.state.evaluated(**asdict(whole))

    def _evaluate(self, blocks: Blocks) -> Evaluation:
        return evaluate(self._accelerator, self.module, blocks, self._job.config.micro_batch_size)

    def record(self, row: dict[str, float]) -> None:
        """Write metrics to metrics.jsonl and to the trackers, if there are any; update the time in the state."""
        if row and self._metrics is not None:
            with self.checkpoints.may_fail("metrics.jsonl"):
                place = {"step": self.state.step, "total_steps": self.total, "tokens": self.state.tokens}
                self._metrics.write({**place, **row})
            self._accelerator.log(row, step=self.state.step)
        self.state.seconds, self.state.used_seconds = self._meter.seconds(), self._used()

    def save(self) -> None:
        """Save a checkpoint, in the background where that is possible."""
        self.checkpoints.save(self.state)
        self._saved = self._job.clock()

    def take_final_weights(self) -> None:
        """Take the mean of the tail; with early stopping, restore the weights that had the lowest evaluation loss."""
        self._average.take()
        best = self.state.best
        if self._job.config.early_stopping_patience and best is not None and self.checkpoints.restore_best(self.state):
            say(f"Using the weights from step {best.step}, which had the lowest evaluation loss.")
            self.state.eval = {"loss": best.loss, "perplexity": best.perplexity, "stderr": best.stderr}
            self.state.eval_by_data = self.state.eval_by_data if best.step == self.state.step else None
