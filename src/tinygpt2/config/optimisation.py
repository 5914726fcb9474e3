"""Options of the mathematics of training: the batch, the optimizer, the learning rate, the number format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from tinygpt2.config.base import Config, option
from tinygpt2.config.common import MAX_SEED, OPTIMISATION, TrainingPrecision

Schedule = Literal["constant", "linear", "cosine", "exponential", "plateau", "wsd"]
Optimizer = Literal["adamw", "muon"]
BlockType = Literal["q8_0", "q4_0"]


class OptimisationOptions(Config):
    """How the weights of a model are trained."""

    micro_batch_size: int = option("Sequences per device at a time.", default=8, panel=OPTIMISATION, ge=1)
    gradient_accumulation_steps: int = option("Forward passes per optimizer step.", default=1, panel=OPTIMISATION, ge=1)
    batch_tokens: int | None = option(
        "Tokens in an optimizer step, over all processes. --gradient-accumulation-steps follows from it, and so does "
        "--micro-batch-size if it is not given.",
        default=None,
        panel=OPTIMISATION,
        ge=1,
        shown="from --micro-batch-size and --gradient-accumulation-steps",
    )
    optimizer: Optimizer = option(
        "muon for the matrices inside the layers and adamw for the others, or adamw for all weights.",
        default="muon",
        panel=OPTIMISATION,
    )
    learning_rate: float | None = option(
        "Peak learning rate.",
        default=None,
        panel=OPTIMISATION,
        gt=0,
        shown="from optimizer and width",
    )
    embedding_learning_rate: float | None = option(
        "Peak learning rate of the embeddings and the output matrix.",
        default=None,
        panel=OPTIMISATION,
        gt=0,
        shown="that of --learning-rate",
    )
    vector_learning_rate: float | None = option(
        "Peak learning rate of biases and layer norms.",
        default=None,
        panel=OPTIMISATION,
        gt=0,
        shown="that of --learning-rate",
    )
    lr_schedule: Schedule = option(
        "Learning rate after the warm-up; wsd is warmup-stable-decay.", default="linear", panel=OPTIMISATION
    )
    decay_ratio: float = option(
        "Share of the steps after the warm-up in which --lr-schedule wsd decays.",
        default=0.2,
        panel=OPTIMISATION,
        gt=0,
        le=1,
    )
    warmup_ratio: float = option(
        "Share of the steps in which the learning rate rises from 0 to its peak.",
        default=0.01,
        panel=OPTIMISATION,
        ge=0,
        le=1,
    )
    plateau_ratio: float = option(
        "Share of the steps at the peak learning rate, for --lr-schedule plateau.",
        default=0.04,
        panel=OPTIMISATION,
        ge=0,
        le=1,
    )
    weight_decay: float = option(
        "Weight decay of matrices and embeddings. Biases and layer norms have none.",
        default=0.01,
        panel=OPTIMISATION,
        ge=0,
    )
    average_tail: float = option(
        "Share of the steps at the end whose weights are averaged. The mean is evaluated, and it is the trained model. "
        "0 keeps the last weights.",
        default=0.0,
        panel=OPTIMISATION,
        ge=0,
        le=1,
    )
    grad_clip: float = option(
        "Scale the gradient down to this norm if it is larger. 0 turns clipping off.",
        default=1.0,
        panel=OPTIMISATION,
        ge=0,
    )
    dropout: float = option(
        "Dropout during training, in place of the three rates in the model's configuration.",
        default=0.0,
        panel=OPTIMISATION,
        ge=0,
        lt=1,
    )
    freeze: list[str] = option(
        "Do not train the parameters whose names match a pattern such as 'transformer.wte.*'.",
        default=[],
        panel=OPTIMISATION,
        metavar="PATTERN",
    )
    precision: TrainingPrecision = option(
        "Number format of the matrix products. Weights stay float32. auto: bf16 on a GPU that has it, fp16 on an older "
        "one, fp32 elsewhere.",
        default="auto",
        panel=OPTIMISATION,
    )
    deterministic: bool = option(
        "On a GPU, use only algorithms that give the same bits in every run, and no TF32. It is slower. "
        "A CPU always gives the same bits.",
        default=False,
        panel=OPTIMISATION,
    )
    quantize: BlockType | None = option(
        "Round the model's matrices as export --type q8_0 or q4_0 does, so that the file has the weights that were "
        "trained and evaluated. They are learned by the straight-through estimator.",
        default=None,
        panel=OPTIMISATION,
        shown="no rounding",
    )
    quantize_from: float = option(
        "Share of the steps after which --quantize begins to round: 0 for the whole run, 1 only after its last step.",
        default=0.0,
        panel=OPTIMISATION,
        ge=0,
        le=1,
    )
    seed: int = option(
        "Seed for initial weights, order of the data and dropout.", default=42, panel=OPTIMISATION, ge=0, le=MAX_SEED
    )

    @property
    def tf32(self) -> bool:
        """Whether training may use TF32 on a GPU that has it."""
        return self.precision == "fp32" and not self.deterministic

    def conflicts(self) -> Iterator[str]:
        """Require ratios of the schedule that fit together."""
        yield from super().conflicts()
        if self.lr_schedule == "plateau" and self.warmup_ratio + self.plateau_ratio > 1:
            yield "--warmup-ratio and --plateau-ratio add up to more than 1"
        for name, schedule in (("decay_ratio", "wsd"), ("plateau_ratio", "plateau")):
            for given in self.changed(name) if self.lr_schedule != schedule else []:
                yield f"{given} has no effect on --lr-schedule {self.lr_schedule}"
        if self.average_tail and self.quantize:
            yield "--average-tail and --quantize cannot be combined: a mean of rounded weights is not rounded"
        for given in self.changed("quantize_from") if self.quantize is None else []:
            yield f"{given} has no effect without --quantize"
