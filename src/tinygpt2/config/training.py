"""Options of the commands that train: `pretrain`, `distill` and `finetune`; recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tinygpt2.config.base import extra, flag_name, option, read_yaml
from tinygpt2.config.common import LENGTH, MAX_SEED, OBJECTIVES, OPTIMISATION, RUN, TEXT, ModelOptions, Precision
from tinygpt2.config.data import PackOptions
from tinygpt2.errors import ConfigError

Schedule = Literal["constant", "linear", "cosine", "exponential", "plateau", "wsd"]
PredictionLoss = Literal["soft_ce", "forward_kl", "reverse_kl", "jsd"]
HiddenScale = Literal["none", "variance"]
HeadMap = Literal["equal", "average"]
TeacherDtype = Literal["fp32", "bf16"]
OnSaveError = Literal["stop", "continue"]
Optimizer = Literal["adamw", "muon"]
TRACKERS = ("tensorboard", "wandb")
DEFAULT_RATE = 5e-4
RATE_TIMES_WIDTH: dict[Optimizer, float] = {"adamw": 0.2, "muon": 0.3}
MOST_PASSES = 4


class TrainOptions(ModelOptions):
    """Options that pretrain, distill and finetune share."""

    out: str = option(..., "Directory for the trained model.")
    eval_data: str | None = option(
        None, "Held-out text or pregenerated dataset to evaluate on.", shown="the dataset's own test split"
    )
    max_steps: int | None = option(None, "Optimizer steps.", panel=LENGTH, ge=1)
    num_epochs: float | None = option(
        None, "Passes over the training blocks.", panel=LENGTH, gt=0, shown="1; distill: 1 to 4"
    )
    max_tokens: int | None = option(None, "Tokens to train on.", panel=LENGTH, ge=1)
    micro_batch_size: int = option(8, "Sequences per device and forward pass.", panel=OPTIMISATION, ge=1)
    gradient_accumulation_steps: int = option(1, "Micro-batches per optimizer step.", panel=OPTIMISATION, ge=1)
    optimizer: Optimizer = option(
        "adamw", "AdamW for all weights, or Muon for the layers' matrices and AdamW for the rest.", panel=OPTIMISATION
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate.",
        panel=OPTIMISATION,
        gt=0,
        shown=f"{DEFAULT_RATE}; distill: recipe or width say",
    )
    lr_schedule: Schedule = option("cosine", "Shape after the warm-up.", panel=OPTIMISATION)
    warmup_ratio: float = option(
        0.01, "Share of the steps in which the rate rises from 0.", panel=OPTIMISATION, ge=0, le=1
    )
    plateau_ratio: float = option(
        0.04, "Share of the steps at the peak, for --lr-schedule plateau.", panel=OPTIMISATION, ge=0, le=1
    )
    weight_decay: float = option(0.01, "Weight decay; never on biases and layer norms.", panel=OPTIMISATION, ge=0)
    grad_clip: float = option(1.0, "Largest norm of the gradient; 0 leaves it as it is.", panel=OPTIMISATION, ge=0)
    dropout: float = option(
        0.0, "Dropout while training, for all three of GPT-2's rates.", panel=OPTIMISATION, ge=0, lt=1
    )
    freeze: list[str] = option(
        [], "Parameters to leave as they are: a name pattern such as 'transformer.wte.*'.", panel=OPTIMISATION
    )
    precision: Precision = option(
        "fp32", "Arithmetic of the matrix products; weights stay float32.", panel=OPTIMISATION
    )
    compile: bool = option(False, "Compile the forward passes with torch.compile; needs a C++ compiler.", panel=RUN)
    gradient_checkpointing: bool = option(
        False, "Keep each layer's input only and run layers again for the gradients: less memory, more time.", panel=RUN
    )
    logit_chunk: int | None = option(
        None, "Tokens whose logits are held at a time.", panel=RUN, ge=1, shown="2**25 logits, 2**28 on a GPU"
    )
    seed: int = option(42, "Seed of initial weights, data order and dropout.", panel=OPTIMISATION, ge=0, le=MAX_SEED)
    eval_every: int | None = option(None, "Steps between evaluations.", panel=RUN, ge=1, shown="only at the end")
    save_every: int = option(1000, "Steps between checkpoints; one is always saved at the end.", panel=RUN, ge=1)
    keep: int = option(1, "Checkpoints to keep, the newest; the best by evaluation too.", panel=RUN, ge=1)
    resume: bool = option(False, "Continue from the newest checkpoint in --out, if there is one.", panel=RUN)
    log_every: int = option(10, "Steps between lines of metrics.jsonl.", panel=RUN, ge=1)
    report_to: list[str] = option([], "Also log to: tensorboard, wandb.", panel=RUN)
    eval_task: list[str] = option(
        [], "Measure the finished model on this too, repeatable: what ppl takes as --task.", panel=RUN
    )
    task_data: str | None = option(None, "File or folder with the named tasks' texts, as for ppl.", panel=RUN)
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a lower loss, and keep the best weights.", panel=RUN, ge=1
    )
    skip_non_finite: int = option(
        0, "Steps to pass over, in all, whose loss or gradient is not finite; one more ends the run.", panel=RUN, ge=0
    )
    on_save_error: OnSaveError = option(
        "stop", "When a checkpoint cannot be written: end the run, or go on with the earlier ones.", panel=RUN
    )
    auto_batch_size: bool = option(
        False, "Find the largest micro-batch that fits; the global batch stays what it is.", panel=RUN
    )
    num_processes: int | None = option(
        None, "Processes on this machine, one per GPU.", panel=RUN, ge=1, shown="1, or as another launcher says"
    )
    validate_only: bool = option(
        False, "Check everything, say how long and how large the run will be, and stop.", panel=RUN
    )
    compile_only: bool = option(False, "Compile one step, say how long that took, and stop.", panel=RUN)

    @property
    def passing(self) -> bool:
        """Whether a run leaves nothing in its directory."""
        return self.validate_only or self.compile_only

    def peak_rate(self, width: int) -> float:
        """Return the peak learning rate: the one given, or what suits a model of this width."""
        return self.learning_rate or DEFAULT_RATE

    def passes(self, parameters: int, tokens: int) -> float:
        """Return the passes over so many tokens: those given, or what suits a model of so many parameters."""
        return self.num_epochs or 1

    def conflicts(self) -> Iterator[str]:
        """Check that one length is given and that the trackers are known."""
        yield from super().conflicts()
        lengths = [name for name in ("max_steps", "num_epochs", "max_tokens") if getattr(self, name) is not None]
        if len(lengths) > 1:
            yield f"{' and '.join(map(flag_name, lengths))} contradict each other: give one"
        for tracker in self.report_to:
            if tracker not in TRACKERS:
                yield f"--report-to {tracker!r}: expected {' or '.join(TRACKERS)}"
            elif find_spec(tracker) is None:
                yield f"--report-to {tracker}: not installed; pip install {tracker}"
        if self.task_data is not None and not self.eval_task:
            yield "--task-data does nothing without --eval-task"
        if self.early_stopping_patience and not self.eval_every:
            yield "--early-stopping-patience needs --eval-every"
        if self.validate_only and self.compile_only:
            yield "--validate-only and --compile-only contradict each other: give one"
        if self.lr_schedule == "plateau" and self.warmup_ratio + self.plateau_ratio > 1:
            yield "--warmup-ratio and --plateau-ratio together are beyond 1"


class PretrainConfig(TrainOptions):
    """Options of `pretrain`."""

    data: str = option(..., "Pregenerated dataset.")
    shape: str | None = option(None, "Random weights of this shape: a preset or a config file.", alias="model_config")
    model: str | None = option(None, "Start from these weights: a local directory or a Hub id.")

    def conflicts(self) -> Iterator[str]:
        """Exactly one start."""
        yield from super().conflicts()
        if (self.model is None) == (self.shape is None):
            yield "give one of --model-config (random weights) and --model (given weights)"


class FinetuneConfig(TrainOptions, PackOptions):
    """Options of `finetune`."""

    model: str = option(..., "Model to fine-tune: a local directory or a Hub id.")
    data: str = option(..., "Pregenerated dataset, or a text source that is packed with the model's tokenizer.")
    sequence_length: int | None = option(
        None, "Tokens in a block.", panel=TEXT, ge=2, shown="1024, or the model's positions where those are fewer"
    )


class DistillConfig(TrainOptions):
    """Options of `distill`. The recipe gives objectives and optimisation; whatever is named beside it wins.

    Sources: TinyGPT2 (attention, hidden, soft labels), DistilGPT2 (cosine, temperature).
    """

    teacher: str | None = option(None, "Teacher: a local directory or a Hub id.")
    student: str | None = option(
        None, "Student: a directory with weights, or a preset or config file for random weights."
    )
    data: str = option(..., "Pregenerated dataset.")
    teacher_dtype: TeacherDtype = option("fp32", "Type of the teacher's weights.", panel=OPTIMISATION)
    teacher_cache: str | None = option(
        None,
        "Directory in which the teacher's last hidden states are kept, for other epochs and students.",
        panel=RUN,
    )
    recipe: str = option(
        "default", "Objectives and optimisation: default, tinygpt2, distilgpt2, truncation or a YAML file."
    )
    attention_weight: float = option(0.0, "Weight of the attention scores' squared error.", panel=OBJECTIVES, ge=0)
    head_map: HeadMap = option(
        "equal",
        "Attention's heads: as many in both models, or the average of a group of teacher heads for each student head.",
        panel=OBJECTIVES,
    )
    relation_weight: float = option(
        0.0, "Weight of MiniLM's relations (q-q, k-k, v-v) of the last student layer.", panel=OBJECTIVES, ge=0
    )
    hidden_weight: float = option(0.0, "Weight of the hidden states' squared error.", panel=OBJECTIVES, ge=0)
    hidden_map: str = option(
        "all",
        "Student states compared: all, inner (not the last) or numbers such as 0,3 or 0,3=10 (teacher's state 10).",
        panel=OBJECTIVES,
        commas=True,
    )
    hidden_scale: HiddenScale = option(
        "none",
        "Divide the hidden error by the teacher state's variance, or not.",
        panel=OBJECTIVES,
    )
    prediction_weight: float = option(0.0, "Weight of the soft labels' loss.", panel=OBJECTIVES, ge=0)
    prediction_loss: PredictionLoss = option("forward_kl", "What compares the two predictions.", panel=OBJECTIVES)
    temperature: float = option(
        1.0,
        "Softens both predictions; the loss is multiplied by its square.",
        panel=OBJECTIVES,
        gt=0,
    )
    ce_weight: float = option(0.0, "Weight of next-token cross-entropy on the data.", panel=OBJECTIVES, ge=0)
    cosine_weight: float = option(0.0, "Weight of 1 - cos of the last hidden states.", panel=OBJECTIVES, ge=0)
    layer_map: str = option(
        "uniform",
        "Teacher layer for each student layer: uniform, last, first or 3,6,9,12.",
        panel=OBJECTIVES,
        commas=True,
    )

    plan: bool = option(
        False, "Time a few steps of --student, or of several cuts, say what fits into --budget-minutes, and stop.",
        panel=RUN,
    )  # fmt: skip
    budget_minutes: float | None = option(None, "Minutes that --plan plans for.", panel=RUN, gt=0, shown="60")

    @property
    def passing(self) -> bool:
        """Whether a run leaves nothing in its directory."""
        return super().passing or self.plan

    def peak_rate(self, width: int) -> float:
        """Return the peak learning rate: the one given, or one over the student's width, within bounds.

        It lies between what was best for both optimizers at widths of 128 and 256 (docs/recipes.md); one over the width
        is how the best rate falls with it (Yang et al. 2022, arXiv:2203.03466, table 3).
        """
        return self.learning_rate or min(max(RATE_TIMES_WIDTH[self.optimizer] / width, 1e-4), 4e-3)

    def passes(self, parameters: int, tokens: int) -> float:
        """Return the passes over the data: those given, or as many as make 20 tokens for each parameter, 1 to 4.

        20 are what a model of its size would want (Hoffmann et al. 2022, arXiv:2203.15556, table 3); up to 4 passes are
        nearly as good as new text (Muennighoff et al. 2023, arXiv:2305.16264, section 6).
        """
        return self.num_epochs or min(max(20 * parameters / tokens, 1), MOST_PASSES)

    @classmethod
    def layered(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Put the recipe under the given values."""
        return {**read_recipe(str(values.get("recipe", cls.model_fields["recipe"].default))), **values}

    @property
    def needs_teacher(self) -> bool:
        """Whether any active objective looks at the teacher."""
        weights = (self.attention_weight, self.relation_weight, self.hidden_weight)
        return any((*weights, self.prediction_weight, self.cosine_weight))

    def conflicts(self) -> Iterator[str]:
        """Check that there is something to learn, and someone to learn it from."""
        yield from super().conflicts()
        if self.student is None and not self.plan:
            yield f"missing --student: {type(self).model_fields['student'].description}"
        if self.plan and self.teacher is None and self.student is None:
            yield "missing --teacher: whose cuts --plan is to time"
        others = ["validate_only", "compile_only", "auto_batch_size", "max_steps", "num_epochs", "max_tokens"]
        if self.plan and (found := [flag_name(name) for name in others if getattr(self, name)]):
            yield f"--plan contradicts {' and '.join(found)}: it finds the length, by timing steps as they are"
        if self.plan and (self.num_processes or 1) > 1:
            yield "--plan times one process: leave --num-processes out"
        if self.budget_minutes is not None and not self.plan:
            yield "--budget-minutes does nothing without --plan"
        if self.needs_teacher and self.teacher is None:
            yield "missing --teacher: an objective with a weight above 0 compares the student with it"
        if not self.needs_teacher and not self.ce_weight:
            yield "every objective's weight is 0: there is nothing to learn"
        inside = [
            flag_name(name) for name in ("attention_weight", "relation_weight", "hidden_weight") if getattr(self, name)
        ]
        if self.layer_map not in ("uniform", "last", "first") and not re.fullmatch(r"\d+(,\d+)*", str(self.layer_map)):
            yield f"--layer-map {self.layer_map!r}: expected uniform, last, first or numbers such as 3,6,9,12"
        states = r"\d+(=\d+)?"
        if self.hidden_map not in ("all", "inner") and not re.fullmatch(f"{states}(,{states})*", str(self.hidden_map)):
            yield f"--hidden-map {self.hidden_map!r}: expected all, inner or numbers such as 0,3 or 0,3=10"
        if self.head_map != "equal" and not self.attention_weight:
            yield "--head-map average does nothing while --attention-weight is 0"
        if self.hidden_map != "all" and not self.hidden_weight:
            yield f"--hidden-map {self.hidden_map} does nothing while --hidden-weight is 0"
        if self.teacher_dtype != "fp32" and not self.needs_teacher:
            yield f"--teacher-dtype {self.teacher_dtype} does nothing: no objective looks at the teacher"
        if self.teacher_cache is not None and (inside or not self.needs_teacher):
            what = f"{inside[0]} looks at more of it" if inside else "no objective looks at it"
            yield f"--teacher-cache holds the teacher's last hidden states: {what}"


def changed_mathematics(config: TrainOptions, earlier: dict[str, Any]) -> list[str]:
    """Return the options that differ from an earlier run's and alter what a resumed run computes."""
    now = config.model_dump(mode="json", by_alias=True)
    free = {"out", "micro_batch_size", "gradient_accumulation_steps"}  # their product is checked where it is known
    keys = [key for key, field in config.options().items() if extra(field, "panel") != RUN and key not in free]
    changed = [flag_name(key) for key in keys if key in earlier and earlier[key] != now[key]]
    # wherever it is, states that were kept are rounded
    cached = [bool(options.get("teacher_cache")) for options in (earlier, now)]
    return changed + ["--teacher-cache"] * (cached[0] != cached[1])


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe: a shipped one by its name, or a YAML file.

    Raises:
        ConfigError: no such recipe, or it sets something that is neither objective nor optimisation.
    """
    shipped = {
        Path(item.name).stem: Path(str(item))
        for item in files("tinygpt2.config").joinpath("recipes").iterdir()
        if item.name.endswith(".yaml")
    }
    path = shipped.get(name, Path(name))
    if name not in shipped and not path.is_file():
        raise ConfigError(f"no recipe {name!r}: no such file", f"shipped recipes: {', '.join(sorted(shipped))}")
    values = read_yaml(path)
    allowed = {
        key for key, field in DistillConfig.options().items() if extra(field, "panel") in (OBJECTIVES, OPTIMISATION)
    }
    if stray := sorted(set(values) - allowed):
        raise ConfigError(f"recipe {name}: {', '.join(stray)}: a recipe holds objectives and optimisation only")
    return values
