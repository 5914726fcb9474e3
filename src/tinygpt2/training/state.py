"""What a run knows of itself beyond weights and optimizer: what a checkpoint keeps, and what the loop goes by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BestEvaluation:
    """The evaluation with the lowest loss so far."""

    step: int
    loss: float
    perplexity: float


@dataclass
class RunState:
    """What a run knows of itself beyond weights and optimizer.

    Attributes:
        step, tokens, seconds: done so far.
        loss: of the last step, the mean over the global batch; None where it was not finite.
        eval: the last evaluation's loss and perplexity.
        best: the best evaluation.
        worse: evaluations since then.
        skipped: steps whose loss or gradient was not finite.
        global_batch: sequences in a step.
        data: fingerprint of the data set.
        scaler: fp16's loss scaling.
    """

    global_batch: int
    data: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    eval: dict[str, float] | None = None
    best: BestEvaluation | None = None
    worse: int = 0
    skipped: int = 0
    scaler: dict[str, float] | None = None

    @classmethod
    def of(cls, values: dict[str, Any]) -> RunState:
        """Take what a checkpoint's file holds."""
        return cls(**{**values, "best": values["best"] and BestEvaluation(**values["best"])})

    def evaluated(self, loss: float, perplexity: float) -> bool:
        """Take note of an evaluation; say whether it is the best so far."""
        self.eval = {"loss": loss, "perplexity": perplexity}
        improved = math.isfinite(loss) and (self.best is None or loss < self.best.loss)
        if improved:
            self.best = BestEvaluation(self.step, loss, perplexity)
        self.worse = 0 if improved else self.worse + 1
        return improved
