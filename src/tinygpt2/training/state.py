"""What a run knows of itself: its progress, which checkpoints keep, and the names of the files that it writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

RUN_FILE, RECORD_FILE, CHECKPOINTS = "config.yaml", "run.json", "checkpoints"


@dataclass(frozen=True)
class BestEvaluation:
    """The evaluation with the lowest loss so far."""

    step: int
    loss: float
    perplexity: float
    stderr: float | None = None


@dataclass
class RunState:
    """The progress of a run: everything that it needs to continue, except weights and optimizer state.

    Attributes:
        step, tokens: done so far.
        seconds: since the first step; eval_seconds are those of the evaluations.
        used_seconds: since the command began, with those of interrupted attempts.
        loss: of the last step, the mean over the global batch; None if it was NaN or infinite.
        eval: the last evaluation's loss, perplexity and standard error.
        before: the same for the model before training, if it did not begin with random weights.
        teacher: the same for the teacher, if there is one.
        eval_by_data: the same for each dataset, if the run trains on several.
        best: the evaluation with the lowest loss so far.
        worse: the number of evaluations since then.
        skipped: the number of steps that were skipped because the loss or gradient was NaN or infinite.
        global_batch: sequences in a step.
        data: fingerprint of the dataset's content.
        warmup: steps in which the learning rate rises, as the run began; None if an older version began it.
        plan: with --max-minutes, the values of a `Plan`.
        scaler: state of fp16's loss scaler.
        own_text: with sampled text, its share now, and the held-out loss at which that share last grew.
    """

    global_batch: int
    data: str
    warmup: int | None = None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    eval_seconds: float = 0.0
    used_seconds: float = 0.0
    loss: float | None = None
    eval: dict[str, float | None] | None = None
    eval_by_data: dict[str, dict[str, float | None]] | None = None
    before: dict[str, float | None] | None = None
    teacher: dict[str, float | None] | None = None
    best: BestEvaluation | None = None
    worse: int = 0
    skipped: int = 0
    plan: dict[str, Any] | None = None
    scaler: dict[str, float] | None = None
    own_text: tuple[float, float | None] | None = None

    @classmethod
    def of(cls, values: dict[str, Any]) -> RunState:
        """Make a state from the values in a checkpoint's state.json."""
        return cls(**{**values, "best": values["best"] and BestEvaluation(**values["best"])})

    def evaluated(self, loss: float, perplexity: float, stderr: float | None = None) -> bool:
        """Record an evaluation; return whether its loss is the lowest so far."""
        self.eval = {"loss": loss, "perplexity": perplexity, "stderr": stderr}
        improved = math.isfinite(loss) and (self.best is None or loss < self.best.loss)
        if improved:
            self.best = BestEvaluation(self.step, loss, perplexity, stderr)
        self.worse = 0 if improved else self.worse + 1
        return improved
