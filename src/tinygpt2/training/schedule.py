"""The learning rate of each step and its default peak, the default length of a run, and the size of its batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.optimisation import Optimizer
from tinygpt2.config.training import PretrainConfig, TrainOptions
from tinygpt2.errors import ConfigError

T = TypeVar("T", bound=TrainOptions)

# by optimizer: the rate times the width, and the largest rate
FROM_WEIGHTS: dict[Optimizer, tuple[float, float]] = {"adamw": (0.2, 4e-3), "muon": (0.3, 4e-3)}
FROM_RANDOM: dict[Optimizer, tuple[float, float]] = {"adamw": (0.5, 1.5e-3), "muon": (2.5, 1e-2)}
SMALLEST_RATE = 1e-4
MAX_PASSES = 4


def peak_learning_rate(options: TrainOptions, width: int) -> float:
    """Return the peak learning rate: the one that is given, or a default.

    It is a constant divided by the width, because the best rate is proportional to 1 / width (Yang et al. 2022,
    arXiv:2203.03466, table 3), within bounds.

    For existing weights, the constant of each optimizer lies between those that were best for students at widths of 128
    and 256 (docs/recipes.md). Random weights take larger steps (docs/pretraining.md): 0.5 / width with AdamW follows
    GPT-3's rates (Brown et al. 2020, arXiv:2005.14165, table 2.1: 6e-4 at 768, 2e-4 at 2,048), up to 1.5e-3, the best
    of three rates at a width of 128. With Muon, 2.5 / width is 1e-2 at the width of 256, and 1e-2 was the best of three
    rates there and at 128. At 768 it is 3.3e-3, where Jordan et al. (2024, kellerjordan.github.io/posts/muon) use 0.02,
    which is 3.6e-3 in the units of our Muon.
    """
    if options.learning_rate:
        return options.learning_rate
    random = isinstance(options, PretrainConfig) and options.shape is not None
    constant, largest = (FROM_RANDOM if random else FROM_WEIGHTS)[options.optimizer]
    return min(max(constant / width, SMALLEST_RATE), largest)


def passes_over_data(options: TrainOptions, parameters: int, tokens: int) -> float:
    """Return the number of passes over `tokens` of training data: the one that is given, or a default.

    The default is 1. `distill` makes as many passes as give 20 tokens for each parameter, but at least 1 and at most
    4. About 20 tokens for each parameter are optimal (Hoffmann et al. 2022, arXiv:2203.15556, table 3), and up to 4
    passes are nearly as good as new text (Muennighoff et al. 2023, arXiv:2305.16264, section 6).
    """
    if options.num_epochs:
        return options.num_epochs
    return min(max(20 * parameters / tokens, 1), MAX_PASSES) if isinstance(options, DistillConfig) else 1


def total_steps(options: TrainOptions, sequences: int, global_batch: int, length: int, parameters: int) -> int:
    """Return the number of optimizer steps.

    Args:
        options: without --max-minutes, for which the steps are timed.
        sequences: blocks in the training split, each of `length` tokens.
        global_batch: blocks in one optimizer step.
        parameters: of the model.
    """
    if options.max_steps is not None:
        return options.max_steps
    if options.max_tokens is not None:
        return max(1, math.ceil(options.max_tokens / (global_batch * length)))
    passes = passes_over_data(options, parameters, sequences * length)
    return max(1, math.ceil(passes * sequences / global_batch))


def warmup_steps(total: int, options: TrainOptions) -> int:
    """Return the number of steps in which the learning rate rises."""
    return math.ceil(options.warmup_ratio * total)


@dataclass(frozen=True)
class Plan:
    """The steps of a run, and which place in the learning rate's schedule each has.

    The number of steps may change while the run goes on (`--max-minutes`). What is left of the schedule is then spread
    evenly over the steps that are left. So the place never jumps or goes back, and the last step ends the schedule.

    Attributes:
        steps: of the whole run.
        length: of the schedule, in steps: their number as it was planned at first.
        start: the step from which this plan holds.
        place: the place of that step in the schedule, from 0 to `length`.
    """

    steps: int
    length: int
    start: int = 0
    place: float = 0.0

    @classmethod
    def of(cls, steps: int) -> Plan:
        """Return the plan of a run with a fixed number of steps: each step's place is its number."""
        return cls(steps, steps)

    def at(self, step: int) -> float:
        """Return the place of a step in the schedule."""
        return self.place + (step - self.start) * (self.length - self.place) / (self.steps - self.start)

    def share(self, step: int) -> float:
        """Return the share of the schedule that is over after `step` steps, from 0 to 1."""
        return self.at(step) / self.length

    def changed(self, step: int, steps: int) -> Plan:
        """Return the plan with another number of steps, from `step` on."""
        return self if steps == self.steps else Plan(steps, self.length, step, self.at(step))


def learning_rate(step: float, total: int, options: TrainOptions, peak: float, warmup: int | None = None) -> float:
    """Return the learning rate at place `step` (counted from 0) of a schedule of `total` steps; see `Plan.at`.

    It rises linearly over the first `warmup_ratio` of the steps, or over `warmup` steps if they are given: a run that
    is made longer keeps its warm-up. After that it is the peak times a factor of t, the
    share of the remaining steps that are done:

        constant 1, linear 1 - t, cosine (1 + cos(pi t)) / 2, exponential exp(-0.693 t);
        plateau: 1 for `plateau_ratio` of all steps, then linear to 0;
        wsd (warmup-stable-decay): 1, then linear to 0 in the last `decay_ratio` of the remaining steps.

    Source: plateau and exponential: TinyGPT2; wsd: MiniCPM, arXiv:2404.06395, section 4.
    """
    warmup = warmup_steps(total, options) if warmup is None else warmup
    if step < warmup:
        return peak * min(step + 1, warmup) / warmup
    past, rest = step - warmup, max(total - warmup, 1)
    t = past / rest
    if options.lr_schedule == "constant":
        factor = 1.0
    elif options.lr_schedule == "linear":
        factor = 1 - t
    elif options.lr_schedule == "cosine":
        factor = (1 + math.cos(math.pi * t)) / 2
    elif options.lr_schedule == "exponential":
        factor = math.exp(-0.693 * t)
    elif options.lr_schedule == "plateau":
        plateau = min(options.plateau_ratio * total, rest - 1)
        factor = min(1.0, (rest - past) / (rest - plateau))
    else:
        factor = min(1.0, (1 - t) / options.decay_ratio)
    return peak * factor


def set_rates(optimizer: Any, rate: Callable[[float], float], peak: float) -> float:
    """Set the learning rate of every parameter group; return that of the groups without a peak of their own.

    Args:
        rate: returns the learning rate now, given its peak.
        peak: of the groups without one of their own.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate(group.get("peak", peak))
    return rate(peak)


def batch_of(config: T, length: int, processes: int) -> T:
    """Return the options with the micro-batch and the accumulation that make the tokens of `--batch-tokens`.

    A micro-batch that is given and not the default stays. Otherwise it is the largest that fits, if --auto-batch-size
    looks for it, or else the largest one up to its default. A file with every option (--print-config) has the defaults.

    Args:
        length: tokens in a block.

    Raises:
        ConfigError: no whole number of micro-batches has so many tokens.
    """
    tokens, fields = config.batch_tokens, type(config).model_fields
    if tokens is None:
        return config
    given = {name for name in config.model_fields_set if getattr(config, name) != fields[name].default}
    blocks, rest = divmod(tokens, length * processes)
    if rest or not blocks:
        unit = length * processes
        near = sorted({max(unit, tokens // unit * unit), (tokens // unit + 1) * unit})
        raise ConfigError(
            f"--batch-tokens {tokens}: must be a multiple of {unit} ({processes} x a block of {length})",
            f"give {' or '.join(map(str, near))}",
        )
    usual = fields["micro_batch_size"].default
    size = next(size for size in range(min(usual, blocks), 0, -1) if blocks % size == 0)
    size = config.micro_batch_size if "micro_batch_size" in given else blocks if config.auto_batch_size else size
    if blocks % size:
        sizes = [one for one in range(1, blocks + 1) if blocks % one == 0]
        near = sorted(sorted(sizes, key=lambda one: abs(one - size))[:2])
        raise ConfigError(
            f"--batch-tokens {tokens} are {blocks} blocks in each process, which micro-batches of {size} do not divide",
            f"give --micro-batch-size {' or '.join(map(str, near))}, or leave it out",
        )
    turns = blocks // size
    if "gradient_accumulation_steps" in given and config.gradient_accumulation_steps != turns:
        raise ConfigError(
            f"--batch-tokens {tokens} with micro-batches of {size} needs --gradient-accumulation-steps {turns}, not "
            f"{config.gradient_accumulation_steps}",
            "leave --gradient-accumulation-steps out: it follows",
        )
    return config.model_copy(update={"micro_batch_size": size, "gradient_accumulation_steps": turns})


def proposed_batch_tokens(parameters: int, tokens: int) -> float:
    """Return a tenth of the critical batch size, in tokens, at the loss that a run of so many tokens can reach.

    At the critical batch size (McCandlish et al. 2018, arXiv:1812.06162), a run needs twice as many tokens as with the
    smallest batches. With a tenth of it, it needs a tenth more. Critical size and loss are those that Kaplan et al.
    fitted to language models of web texts (2020, arXiv:2001.08361, equations 1.4, 1.5 with table 2, and 5.1). So this
    is a guess, above all where data, tokenizer or objective are others.

    Args:
        parameters: without embeddings.
        tokens: of the whole run.
    """
    loss = ((6.4e13 / parameters) ** (0.076 / 0.103) + 1.8e13 / tokens) ** 0.103
    return float(0.1 * 2e8 / loss ** (1 / 0.21))
