"""The objectives and their weighted sum.

To add one: write its function in a module here with its source, give it an option in `DistillConfig`, a
term in `Objectives.forward`, and a float64 reference in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config

from tinygpt2.capture import Captured
from tinygpt2.config import DistillConfig, HiddenScale, PredictionLoss
from tinygpt2.errors import ConfigError
from tinygpt2.objectives.attention import attention_loss
from tinygpt2.objectives.hidden import cosine_loss, hidden_loss
from tinygpt2.objectives.prediction import IGNORED, PredictionObjective, prediction_loss


@dataclass(frozen=True)
class Weights:
    """Weights and choices of the objectives; the defaults are plain language modelling."""

    attention: float = 0.0
    hidden: float = 0.0
    prediction: float = 0.0
    ce: float = 1.0
    cosine: float = 0.0
    hidden_scale: HiddenScale = "none"
    loss: PredictionLoss = "forward_kl"
    temperature: float = 1.0
    layer_map: str = "uniform"

    @classmethod
    def of(cls, config: DistillConfig) -> Weights:
        """Take them from the options of `distill`."""
        return cls(
            attention=config.attention_weight,
            hidden=config.hidden_weight,
            prediction=config.prediction_weight,
            ce=config.ce_weight,
            cosine=config.cosine_weight,
            hidden_scale=config.hidden_scale,
            loss=config.prediction_loss,
            temperature=config.temperature,
            layer_map=config.layer_map,
        )


def teacher_layers(rule: str, student: int, teacher: int) -> list[int]:
    """Return the teacher layer, counted from 1, for each student layer 1..`student`.

    Args:
        rule: `uniform` round(i*N/M), `last` N-M+i, `first` i, or the numbers themselves, as `3,6,9,12`.

    Raises:
        ConfigError: the rule does not fit the two depths.
    """
    layers = range(1, student + 1)
    if rule == "uniform":
        chosen = [max(1, round(i * teacher / student)) for i in layers]
    elif rule == "last":
        chosen = [teacher - student + i for i in layers]
    elif rule == "first":
        chosen = list(layers)
    else:
        chosen = [int(number) for number in rule.split(",")]
    if len(chosen) != student:
        raise ConfigError(f"--layer-map {rule} names {len(chosen)} layers, the student has {student}")
    if bad := [number for number in chosen if not 1 <= number <= teacher]:
        raise ConfigError(f"--layer-map {rule}: layer {bad[0]} is not one of the teacher's 1 to {teacher}")
    return chosen


class Objectives(nn.Module):
    """The weighted sum of the active objectives; holds the learned map of hidden states.

    Args:
        weights: the active objectives.
        student: the student's configuration.
        teacher: the teacher's; None where no active objective looks at one.

    Raises:
        ConfigError: the two shapes do not fit an active objective.
    """

    def __init__(self, weights: Weights, student: GPT2Config, teacher: GPT2Config | None) -> None:
        super().__init__()
        self.weights = weights
        self.projection: nn.Module = nn.Identity()
        self.layer_map: list[int] = []
        if teacher is None:
            return
        if weights.attention or weights.hidden:
            self.layer_map = teacher_layers(weights.layer_map, student.n_layer, teacher.n_layer)
        if weights.attention and student.n_head != teacher.n_head:
            raise ConfigError(
                f"--attention-weight compares head by head: "
                f"the student has {student.n_head} heads, the teacher {teacher.n_head}",
                f"take a student with {teacher.n_head} heads, or --attention-weight 0",
            )
        if weights.cosine and student.n_embd != teacher.n_embd:
            raise ConfigError(
                f"--cosine-weight needs equal widths: the student has {student.n_embd}, the teacher {teacher.n_embd}",
                "use --cosine-weight 0",
            )
        if weights.hidden and student.n_embd != teacher.n_embd:
            self.projection = nn.Linear(student.n_embd, teacher.n_embd)

    @property
    def student_states(self) -> list[int]:
        """Numbers of the student's hidden states to capture: 0 is the embeddings."""
        return list(range(len(self.layer_map) + 1)) if self.weights.hidden else []

    @property
    def teacher_states(self) -> list[int]:
        """Numbers of the teacher's hidden states to capture, in the order of the student's."""
        return [0, *self.layer_map] if self.weights.hidden else []

    @property
    def student_scores(self) -> list[int]:
        """Numbers of the student's layers whose scores to capture, from 1."""
        return list(range(1, len(self.layer_map) + 1)) if self.weights.attention else []

    @property
    def teacher_scores(self) -> list[int]:
        """Numbers of the teacher's layers whose scores to capture, in the order of the student's."""
        return self.layer_map if self.weights.attention else []

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        student: Captured,
        student_head: Float[Tensor, "V D"],
        teacher: Captured | None = None,
        teacher_head: Float[Tensor, "V Dt"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return the weighted sum, and each active term unweighted and detached, by its name."""
        weights = self.weights
        loss = student.last.new_zeros(())
        terms: dict[str, Tensor] = {}
        if teacher is not None and weights.attention:
            terms["attention"] = sum(
                (
                    attention_loss(student.scores[i], teacher.scores[j], student.scale[i], teacher.scale[j])
                    for i, j in zip(self.student_scores, self.teacher_scores, strict=True)
                ),
                loss.new_zeros(()),
            )
            loss = loss + weights.attention * terms["attention"]
        if teacher is not None and weights.hidden:
            terms["hidden"] = sum(
                (
                    hidden_loss(student.states[i], teacher.states[j], self.projection, weights.hidden_scale)
                    for i, j in zip(self.student_states, self.teacher_states, strict=True)
                ),
                loss.new_zeros(()),
            )
            loss = loss + weights.hidden * terms["hidden"]
        if teacher is not None and weights.cosine:
            terms["cosine"] = cosine_loss(student.last, teacher.last)
            loss = loss + weights.cosine * terms["cosine"]
        if weights.prediction or weights.ce:
            targets = F.pad(input_ids[:, 1:], (0, 1), value=IGNORED).flatten()
            labels = None
            if teacher is not None and teacher_head is not None and weights.prediction:
                labels = (teacher.last.flatten(0, 1), teacher_head)
            objective = PredictionObjective(weights.prediction, weights.ce, weights.loss, weights.temperature)
            total, found = prediction_loss(student.last.flatten(0, 1), student_head, targets, labels, objective)
            loss = loss + total
            terms |= found
        return loss, {name: term.detach() for name, term in terms.items()}
