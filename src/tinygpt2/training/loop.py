"""The one training loop: gradients of a global batch, a step, figures, evaluation, checkpoints."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from tinygpt2.config.training import TrainOptions
from tinygpt2.data.dataset import Shuffle
from tinygpt2.errors import InterruptedRunError
from tinygpt2.runtime.devices import device_peak
from tinygpt2.runtime.signals import stop_on_signals
from tinygpt2.training.checkpoint import Checkpoints
from tinygpt2.training.failures import may_step, memory_explained
from tinygpt2.training.job import Job
from tinygpt2.training.metrics import MetricsLog
from tinygpt2.training.optimizers import clip_gradients, make_optimizer, unwrapped
from tinygpt2.training.schedule import learning_rate
from tinygpt2.training.state import RunState
from tinygpt2.training.step import Step, evaluate, gradients, seed_step
from tinygpt2.training.throughput import ThroughputMeter
from tinygpt2.utils.progress import say, track


def run_loop(job: Job, accelerator: Accelerator, module: Step) -> tuple[RunState, nn.Module]:
    """Train from the newest checkpoint, or from the start, to the last step.

    Returns:
        The final state, and `module` as Accelerate wrapped it. Its weights are the last ones, or with early stopping
        those that evaluated best.

    Raises:
        DivergedError: loss or gradient is not finite.
        InterruptedRunError: a signal asked to stop; saved.
        ModelError: a checkpoint cannot be written or restored.
        ConfigError: out of memory, or another run's checkpoint.
    """
    config, out, data = job.config, Path(job.config.out), job.data
    sequences, total = job.sequences(accelerator.num_processes), job.total_steps(accelerator.num_processes)
    peak = job.peak_rate()
    _tell_deepspeed(accelerator, config)
    wrapped, optimizer = accelerator.prepare(module, make_optimizer(module, config))
    optimizer = unwrapped(accelerator, optimizer)
    parameters = list(wrapped.parameters())
    order = Shuffle(len(data.train), config.seed)
    checkpoints = Checkpoints(out, accelerator, wrapped, optimizer, config.keep, config.on_save_error)
    state = RunState(sequences, data.content)
    if config.resume:
        state = checkpoints.resume(state)
    log = MetricsLog(out, state.step) if accelerator.is_main_process else None
    step_tokens = sequences * data.sequence_length
    meter = ThroughputMeter(state, step_tokens, _bound(job, accelerator))
    wrapped.train()
    explained = memory_explained(config, data.sequence_length)
    with closing(checkpoints), explained, stop_on_signals() as stop, track(out.name, total) as progress:
        progress.advance(state.step)
        while state.step < total and not _worse_for_long(state, config):
            rate = learning_rate(state.step, total, config, peak)
            for group in optimizer.param_groups:
                group["lr"] = rate
            seed_step(config.seed, state.step, accelerator.process_index)
            indices = order[state.step * sequences : (state.step + 1) * sequences]
            parts = gradients(accelerator, wrapped, data.train, indices, config.micro_batch_size)
            norm = clip_gradients(accelerator, optimizer, parameters, config.grad_clip)
            terms, stopping = _agree(accelerator, parts, bool(stop))
            if may_step(accelerator, state, terms, norm, indices, config):
                optimizer.step()
            for parameter in parameters:
                parameter.grad = None
            state.step += 1
            state.tokens = state.step * step_tokens
            state.loss = terms["loss"] if math.isfinite(terms["loss"]) else None
            done, last, improved = state.step, state.step == total, False
            row: dict[str, float] = {}
            if done == 1 or last or done % config.log_every == 0:
                speed = meter.lap(done)
                row = {**terms, "learning_rate": rate, "grad_norm": norm, **speed}
                row |= {"skipped": state.skipped} if state.skipped else {}
                progress.line(f"step {done}/{total}  {meter.note(terms, speed, total - done)}")
                progress.advance(0, meter.note(terms, speed))
            if len(job.evaluated) and (last or (config.eval_every and done % config.eval_every == 0)):
                progress.advance(0, "evaluating")
                with meter.paused():
                    found = asdict(evaluate(accelerator, wrapped, job.evaluated, config.micro_batch_size))
                row |= {f"eval/{name}": value for name, value in found.items()}
                improved = state.evaluated(**found)
                last = last or _worse_for_long(state, config)
            if row and log is not None:
                with checkpoints.may_fail("metrics.jsonl"):
                    log.write({"step": done, "tokens": state.tokens, **row})
                accelerator.log(row, step=done)
            state.seconds = meter.seconds()
            if last or stopping or improved or done % config.save_every == 0:
                checkpoints.save(state)
            progress.advance()
            if stopping and not last:
                checkpoints.settle()
                raise InterruptedRunError(
                    f"stopped after step {done} of {total}; saved", f"add --resume to continue {out}"
                )
        checkpoints.settle()
    if config.early_stopping_patience and state.best is not None and checkpoints.restore_best(state):
        say(f"the evaluation was best after step {state.best.step}: its weights are taken")
        state.eval = {"loss": state.best.loss, "perplexity": state.best.perplexity}
    wrapped.eval()
    return state, wrapped


def _tell_deepspeed(accelerator: Accelerator, config: TrainOptions) -> None:
    """Tell DeepSpeed, where it runs, what it would ask a data loader for, and what its file may have otherwise."""
    if accelerator.state.deepspeed_plugin is None:
        return
    options = accelerator.state.deepspeed_plugin.deepspeed_config
    options |= {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.grad_clip,
    }
    if options.get("zero_optimization", {}).get("stage") == 3:
        options["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # whatever their type


def _bound(job: Job, accelerator: Accelerator) -> float | None:
    """Return the tokens per second at the devices' peak, where that is known."""
    peak = device_peak(accelerator.device, job.config.precision)
    return None if peak is None else peak * accelerator.num_processes / job.operations()


def _agree(accelerator: Accelerator, parts: dict[str, torch.Tensor], stop: bool) -> tuple[dict[str, float], bool]:
    """Return loss and parts over the global batch, and whether any process was asked to stop: alike in all."""
    both = torch.stack([*parts.values(), parts["loss"].new_tensor(float(stop))])
    *means, asked = accelerator.reduce(both, "mean").tolist()
    return dict(zip(parts, means, strict=True)), asked > 0


def _worse_for_long(state: RunState, config: TrainOptions) -> bool:
    return config.early_stopping_patience is not None and state.worse >= config.early_stopping_patience
