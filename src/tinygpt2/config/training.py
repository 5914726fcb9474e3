"""Options of the commands that train: what they share, `pretrain` and `finetune`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from tinygpt2.config.base import extra, flag_name, option
from tinygpt2.config.common import LENGTH, RUN, TEXT
from tinygpt2.config.data import PackOptions
from tinygpt2.config.models import CardOptions, DeviceOptions, ModelOptions
from tinygpt2.config.optimisation import OptimisationOptions

OnSaveError = Literal["stop", "continue"]
EvalBlocks = int | Literal["all"]
TRACKERS = ("tensorboard", "wandb")
SAVE_EVERY = 1000  # steps, if the option is not given
EVAL_TOKENS = 262_144  # tokens in the held-out blocks of an evaluation, if the option is not given


def dataset_shares(names: str | list[str]) -> dict[str, Fraction | None]:
    """Return the datasets of `--data`, each with the share that stands after it (`DIR:0.7`); None without one.

    Raises:
        ValueError: only some have a share, a share is 0, or a dataset is named twice.
    """
    found: dict[str, Fraction | None] = {}
    for text in [names] if isinstance(names, str) else names:
        name, _, number = text.rpartition(":")
        has_share = bool(name) and re.fullmatch(r"\d+(\.\d*)?|\.\d+", number) is not None and not Path(text).exists()
        name, share = (name, Fraction(number)) if has_share else (text, None)
        if name in found:
            raise ValueError(f"--data {name} is given twice")
        if share == 0:
            raise ValueError(f"--data {text}: a share must be larger than 0")
        found[name] = share
    with_share = [name for name, share in found.items() if share is not None]
    if 0 < len(with_share) < len(found):
        raise ValueError(f"--data: only {', '.join(with_share)} has a share: give one to every dataset, or to none")
    return found


class TrainOptions(ModelOptions, DeviceOptions, CardOptions, OptimisationOptions):
    """Options that pretrain, distill and finetune share."""

    out: str = option("Directory for the trained model.", path=True)
    document_mask: bool = option(
        "No token sees the documents before its own in its block. Documents end with the end-of-text token.",
        default=False,
    )
    eval_data: str | None = option(
        "Held-out text or pregenerated dataset to evaluate on.",
        default=None,
        shown="the test split of --data",
        path=True,
    )
    max_steps: int | None = option("Number of optimizer steps.", default=None, panel=LENGTH, ge=1)
    num_epochs: float | None = option(
        "Passes over the training blocks.",
        default=None,
        panel=LENGTH,
        gt=0,
        shown="1",
    )
    max_tokens: int | None = option("Number of tokens to train on.", default=None, panel=LENGTH, ge=1)
    max_minutes: float | None = option(
        "Minutes for the whole command, with its start and its last evaluation, but without --eval-task. The number of "
        "steps follows from their measured time.",
        default=None,
        panel=LENGTH,
        gt=0,
    )
    compile: bool = option(
        "Compile the forward passes with torch.compile. Needs a C++ compiler.", default=False, panel=RUN
    )
    gradient_checkpointing: bool = option(
        "Recompute activations during the backward pass: uses less memory, runs slower.", default=False, panel=RUN
    )
    logit_chunk: int | None = option(
        "Tokens whose logits are in memory at a time.",
        default=None,
        panel=RUN,
        ge=1,
        shown="2**25 logits; 2**26 on a GPU, which is 256 MiB in float32 and 128 MiB in 16 bits",
    )
    eval_every: int | None = option(
        "Evaluate every N steps.", default=None, panel=RUN, ge=1, shown="only after the last step"
    )
    eval_blocks: EvalBlocks | None = option(
        "Evaluate on N held-out blocks, evenly spaced and always the same, or on all.",
        default=None,
        panel=RUN,
        shown="as many as hold 262,144 tokens",
        metavar="N|all",
    )
    save_every: int | None = option(
        "Save a checkpoint every N steps. One is always saved at the end.",
        default=None,
        panel=RUN,
        ge=1,
        shown="1000, and at least every 10 minutes",
    )
    keep: int = option(
        "Keep this many of the newest checkpoints. The best by evaluation is kept too.", default=1, panel=RUN, ge=1
    )
    resume: bool = option(
        "Continue from the newest checkpoint in --out. Without one, start from the beginning.",
        default=False,
        panel=RUN,
    )
    log_every: int = option("Write a line to metrics.jsonl every N steps.", default=10, panel=RUN, ge=1)
    profile: int | None = option(
        "Trace N steps after the third with torch's profiler, into OUT/profile, and report the kernels that take the "
        "longest.",
        default=None,
        panel=RUN,
        ge=1,
    )
    report_to: list[str] = option(
        "Also log to this service. Repeat it for both.", default=[], panel=RUN, metavar="tensorboard|wandb"
    )
    eval_task: list[str] = option(
        "Measure the finished model on this task, as `ppl --task` does. Repeat it for several.",
        default=[],
        panel=RUN,
        path=True,
        metavar="TASK|PATH",
    )
    task_data: str | None = option(
        "File or folder with the texts of the named tasks.", default=None, panel=RUN, shown="the Hub", path=True
    )
    early_stopping_patience: int | None = option(
        "Stop after N evaluations without a lower loss, and keep the best weights.", default=None, panel=RUN, ge=1
    )
    skip_non_finite: int = option(
        "Skip up to N steps whose loss or gradient is NaN or infinite. The next one stops the run.",
        default=0,
        panel=RUN,
        ge=0,
    )
    on_save_error: OnSaveError = option(
        "If a checkpoint cannot be written: stop the run, or continue with the earlier checkpoints.",
        default="stop",
        panel=RUN,
    )
    auto_batch_size: bool = option(
        "Find the largest micro-batch that fits into memory. The batch of an optimizer step stays the same.",
        default=False,
        panel=RUN,
    )
    num_processes: int | None = option(
        "Processes to start on this machine, one per GPU.",
        default=None,
        panel=RUN,
        ge=1,
        shown="1, or what the launcher started",
    )
    shard_optimizer: bool = option(
        "Divide the optimizer's state among the processes. Takes less memory on each; the results are the same.",
        default=False,
        panel=RUN,
    )
    validate_only: bool = option(
        "Check all options and files, estimate time, memory and disk space, and exit.", default=False, panel=RUN
    )
    compile_only: bool = option(
        "Compile one training step, report how long that took, and exit.", default=False, panel=RUN
    )
    plan: bool = option(
        "Time a few steps, report how many fit into --budget-minutes, and exit.", default=False, panel=RUN
    )
    budget_minutes: float | None = option("Minutes of training for --plan.", default=None, panel=RUN, gt=0, shown="60")
    pilot: bool = option(
        "With --plan: also train three short runs, and predict the held-out loss of the planned one from theirs. They "
        "take about a seventh of its time.",
        default=False,
        panel=RUN,
    )
    target_perplexity: float | None = option(
        "With --pilot: predict the time to this held-out perplexity, too.", default=None, panel=RUN, gt=1
    )

    @field_validator("eval_blocks", mode="before")
    @classmethod
    def _accept_blocks_or_all(cls, value: object) -> object:
        if value is None or value == "all":
            return value
        if not re.fullmatch(r"[1-9]\d*(\.0*)?|[1-9]e\d", str(value)):
            raise ValueError("expected a number of blocks, or all")
        return int(float(str(value)))

    @property
    def dry_run(self) -> bool:
        """Whether nothing is trained, and nothing is left in the output directory."""
        return self.validate_only or self.compile_only or self.plan

    def evaluated_blocks(self, blocks: int, length: int) -> int:
        """Return on how many of the held-out blocks, each of `length` tokens, an evaluation runs."""
        if self.eval_blocks == "all":
            return blocks
        return min(blocks, self.eval_blocks or max(1, EVAL_TOKENS // length))

    @field_validator("report_to")
    @classmethod
    def _split(cls, value: list[str]) -> list[str]:
        """Accept several names between commas."""
        return [name.strip() for names in value for name in names.split(",")]

    def conflicts(self) -> Iterator[str]:
        """Require one length and known trackers."""
        yield from super().conflicts()
        try:
            dataset_shares(getattr(self, "data", ""))
        except ValueError as error:
            yield str(error)
        lengths = [name for name in length_options() if getattr(self, name) is not None]
        if len(lengths) > 1:
            yield f"{' and '.join(map(flag_name, lengths))} cannot be combined: give one of them"
        yield from self._plan_conflicts()
        for tracker in self.report_to:
            if tracker not in TRACKERS:
                yield f"--report-to: expected {' or '.join(TRACKERS)}, got {tracker!r}"
            elif find_spec(tracker) is None:
                yield f"--report-to {tracker}: it is not installed; run pip install 'tinygpt2[{tracker}]'"
        if self.task_data is not None and not self.eval_task:
            yield "--task-data has no effect without --eval-task"
        if self.early_stopping_patience and not self.eval_every:
            yield "--early-stopping-patience needs --eval-every"
        if self.early_stopping_patience and self.average_tail:
            yield "--early-stopping-patience and --average-tail cannot be combined: the run would stop before its tail"
        if self.early_stopping_patience and self.quantize and self.quantize_from:
            yield "--early-stopping-patience with --quantize needs --quantize-from 0: it could stop before the rounding"
        if self.validate_only and self.compile_only:
            yield "--validate-only and --compile-only cannot be combined: give one of them"

    def _plan_conflicts(self) -> Iterator[str]:
        if self.budget_minutes is not None and not self.plan:
            yield "--budget-minutes has no effect without --plan"
        if self.pilot and not self.plan:
            yield "--pilot has no effect without --plan"
        if self.target_perplexity is not None and not self.pilot:
            yield "--target-perplexity has no effect without --pilot"
        if not self.plan:
            return
        others = ["validate_only", "compile_only", "auto_batch_size", *length_options()]
        if found := [flag_name(name) for name in others if getattr(self, name)]:
            yield f"--plan cannot be combined with {' and '.join(found)}: it finds the number of steps by timing"
        if (self.num_processes or 1) > 1:
            yield "--plan uses one process: leave --num-processes out"


def length_options() -> list[str]:
    """Return the names of the options that set the length of a run; at most one of them is given."""
    return [key for key, field in TrainOptions.options().items() if extra(field, "panel") == LENGTH]


class PretrainConfig(TrainOptions):
    """Options of `pretrain`."""

    data: str | list[str] = option(
        "Pregenerated dataset. Repeat it to train on several; DIR:0.7 gives each a share of the tokens.",
        repeated=True,
        path=True,
    )
    shape: str | None = option(
        "Train from random weights: a preset's name or a configuration file.",
        default=None,
        alias="model_config",
        path=True,
        metavar="PRESET|PATH",
        required="without --model",
    )
    model: str | None = option(
        "Train these weights further: a local directory or a Hub id.",
        default=None,
        path=True,
        metavar="PATH|ID",
        required="without --model-config",
    )

    def conflicts(self) -> Iterator[str]:
        """Require exactly one start."""
        yield from super().conflicts()
        if (self.model is None) == (self.shape is None):
            yield "give either --model-config (random weights) or --model (existing weights)"


class FinetuneConfig(TrainOptions, PackOptions):
    """Options of `finetune`."""

    model: str = option("Model to fine-tune: a local directory or a Hub id.", path=True, metavar="PATH|ID")
    data: str | list[str] = option(
        "Pregenerated dataset, or a text source, which is tokenized with the model's tokenizer. Repeat it to train on "
        "several datasets; DIR:0.7 gives each a share of the tokens.",
        repeated=True,
        path=True,
    )
    sequence_length: int | None = option(
        "Tokens in a block.", default=None, panel=TEXT, ge=2, shown="1024, or fewer if the model has fewer positions"
    )
