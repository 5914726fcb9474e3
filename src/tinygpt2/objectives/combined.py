"""The objectives and their weighted sum.

To add one: write its function in a module here with its source, give it an option in `DistillConfig`, a
term in `Objectives.forward`, and a float64 reference in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config

from tinygpt2.config.distillation import DistillConfig, HeadMap, HiddenScale, PredictionLoss
from tinygpt2.errors import ConfigError
from tinygpt2.models.activations import Activations, by_head
from tinygpt2.objectives.attention import attention_loss, relation_loss
from tinygpt2.objectives.hidden import cosine_loss, hidden_loss
from tinygpt2.objectives.layer_maps import layer_pairs, state_pairs
from tinygpt2.objectives.logits import IGNORED, PredictionObjective, prediction_loss


@dataclass(frozen=True)
class LossWeights:
    """Weights, by the names of the terms, and choices; the defaults are plain language modelling."""

    attention: float = 0.0
    hidden: float = 0.0
    prediction: float = 0.0
    ce: float = 1.0
    cosine: float = 0.0
    relation: float = 0.0
    hidden_scale: HiddenScale = "none"
    loss: PredictionLoss = "forward_kl"
    temperature: float = 1.0
    layer_map: str = "uniform"
    head_map: HeadMap = "equal"
    hidden_map: str = "all"

    @classmethod
    def of(cls, config: DistillConfig) -> LossWeights:
        """Take them from the options of `distill`."""
        return cls(
            attention=config.attention_weight,
            hidden=config.hidden_weight,
            prediction=config.prediction_weight,
            ce=config.ce_weight,
            cosine=config.cosine_weight,
            relation=config.relation_weight,
            hidden_scale=config.hidden_scale,
            loss=config.prediction_loss,
            temperature=config.temperature,
            layer_map=config.layer_map,
            head_map=config.head_map,
            hidden_map=config.hidden_map,
        )


class Counts(NamedTuple):
    """What means are taken over: positions, targets (next tokens), and pairs of a position and one not after it."""

    positions: float
    targets: float
    pairs: float

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Counts:
        """Count in blocks with so many real tokens each."""
        return cls(sum(lengths), sum(max(0, length - 1) for length in lengths), sum(n * (n + 1) // 2 for n in lengths))

    def over(self, count: int) -> Counts:
        """Divide all by a number; none is left at 0, where there is nothing to take a mean of."""
        return Counts(*(max(value, 1) / count for value in self))


class Objectives(nn.Module):
    """The weighted sum of the active objectives; holds the learned map of hidden states.

    Args:
        weights: the active objectives.
        student: the student's configuration.
        teacher: the teacher's; None where no active objective looks at one.
        chunk: tokens whose logits are held at a time; None takes what suits the device.

    Attributes:
        student_states, teacher_states: numbers of the hidden states to capture.
        student_attention, teacher_attention: numbers of the layers whose attention to capture.

    Raises:
        ConfigError: the two shapes do not fit an active objective.
    """

    def __init__(
        self, weights: LossWeights, student: GPT2Config, teacher: GPT2Config | None, chunk: int | None = None
    ) -> None:
        super().__init__()
        self.weights, self.chunk, self.heads = weights, chunk, student.n_head
        self.projection: nn.Module = nn.Identity()
        self._last = (student.n_layer, 0 if teacher is None else teacher.n_layer)
        self._group = 1  # teacher heads whose mean score one student head learns
        # what is compared, each as (student's number, teacher's number)
        self._scores: list[tuple[int, int]] = []
        self._relations: list[tuple[int, int]] = []
        self._states: list[tuple[int, int]] = []
        ends: list[tuple[int, int]] = []
        if teacher is not None:
            _check_shapes(weights, student, teacher)
            ends = [self._last] if weights.prediction or weights.cosine else []
        if teacher is not None and (weights.attention or weights.relation or weights.hidden):
            layers = layer_pairs(weights.layer_map, student.n_layer, teacher.n_layer)
            self._group = teacher.n_head // student.n_head
            self._scores = layers if weights.attention else []
            self._relations = layers[-1:] if weights.relation else []
            self._states = state_pairs(weights.hidden_map, layers, teacher.n_layer) if weights.hidden else []
            if self._states and student.n_embd != teacher.n_embd:
                self.projection = nn.Linear(student.n_embd, teacher.n_embd)
        own = {student.n_layer} if weights.ce else set()
        self.student_states = sorted(own | {i for i, _ in self._states + ends})
        self.teacher_states = sorted({j for _, j in self._states + ends})
        self.student_attention = sorted({i for i, _ in self._scores + self._relations})
        self.teacher_attention = sorted({j for _, j in self._scores + self._relations})

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        student: Activations,
        student_head: Float[Tensor, "V D"],
        teacher: Activations | None = None,
        teacher_head: Float[Tensor, "V Dt"] | None = None,
        *,
        lengths: Int[Tensor, " B"] | None = None,
        share: Counts | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return the weighted sum, and each active term unweighted and detached, by its name.

        Args:
            student_head: the student's output matrix.
            teacher_head: the teacher's, as `head_operand` returns it.
            lengths: real tokens of each row, padding after them; None: all are. Padding counts in no term.
            share: what the means are taken over, if not what is here: a global batch's counts, divided by the
                number of micro-batches, make the mean of the micro-batches' terms the global batch's.
        """
        weights = self.weights
        size, length = input_ids.shape
        own = Counts.of([length] * size if lengths is None else lengths.tolist())
        share = own.over(1) if share is None else share
        real = None if lengths is None else torch.arange(length, device=input_ids.device) < lengths[:, None]  # (B, T)
        terms: dict[str, Tensor] = {}
        if teacher is not None:
            terms = self._compare(student, teacher, real, own, share)
        loss = sum((getattr(weights, name) * term for name, term in terms.items()), student_head.new_zeros(()))
        if weights.prediction or weights.ce:
            targets = F.pad(input_ids[:, 1:], (0, 1), value=IGNORED)
            if real is not None:
                targets = targets.masked_fill(~F.pad(real[:, 1:], (0, 1)), IGNORED)
            labels = None
            if teacher is not None and teacher_head is not None and weights.prediction:
                labels = (_kept(teacher.states[self._last[1]], real), teacher_head)
            parts = {"prediction": own.positions / share.positions, "ce": own.targets / share.targets}
            objective = PredictionObjective(
                weights.prediction * parts["prediction"],
                weights.ce * parts["ce"],
                weights.loss,
                weights.temperature,
                self.chunk,
            )
            hidden = _kept(student.states[self._last[0]], real)
            total, found = prediction_loss(hidden, student_head, _kept(targets, real), labels, objective)
            loss = loss + total
            terms |= {name: term * parts[name] for name, term in found.items()}
        return loss, {name: term.detach() for name, term in terms.items()}

    def _compare(
        self, student: Activations, teacher: Activations, real: Tensor | None, own: Counts, share: Counts
    ) -> dict[str, Tensor]:
        """Return the active terms that compare what the two models captured, unweighted.

        Attention's queries, keys and values are 0 on padding, which adds nothing to their losses' sums.
        """
        terms: dict[str, list[Tensor]] = {}
        for i, j in self._scores:
            q, k, _ = self._by_head(student.attention[i], real)
            teacher_q, teacher_k, _ = self._by_head(teacher.attention[j], real)
            scales = student.scale[i], teacher.scale[j] / self._group
            terms.setdefault("attention", []).append(attention_loss((q, k), (teacher_q, teacher_k), *scales))
        for i, j in self._relations:
            both = self._by_head(student.attention[i], real), self._by_head(teacher.attention[j], real)
            terms.setdefault("relation", []).extend(relation_loss(*pair) for pair in zip(*both, strict=True))
        for i, j in self._states:
            pair = _kept(self.projection(student.states[i]), real), _kept(teacher.states[j], real)
            terms.setdefault("hidden", []).append(hidden_loss(*pair, self.weights.hidden_scale))
        if self.weights.cosine:
            pair = _kept(student.states[self._last[0]], real), _kept(teacher.states[self._last[1]], real)
            terms["cosine"] = [cosine_loss(*pair)]
        whole = next(iter(student.attention.values())).shape[:2] if student.attention else (0, 0)
        full = Counts.of([whole[1]] * whole[0])
        factors = {
            "attention": full.pairs / share.pairs,
            "relation": full.positions / share.positions,
            "hidden": own.positions / share.positions,
            "cosine": own.positions / share.positions,
        }
        return {name: torch.stack(parts).sum() * factors[name] for name, parts in terms.items()}

    def _by_head(self, fused: Float[Tensor, "B T D"], real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Split queries, keys and values by the student's heads; teacher heads of a group lie side by side.

        The product of two such long heads is the sum of the group's scores.
        """
        fused = fused if real is None else fused * real.unsqueeze(-1)
        query, key, value = (by_head(part, self.heads) for part in fused.chunk(3, dim=-1))
        return query, key, value


def _kept(x: Shaped[Tensor, "B T ..."], real: Bool[Tensor, "B T"] | None) -> Shaped[Tensor, "N ..."]:
    """Return the real positions, one after another."""
    return x.flatten(0, 1) if real is None else x[real]


def _check_shapes(weights: LossWeights, student: GPT2Config, teacher: GPT2Config) -> None:
    if weights.attention and student.n_head != teacher.n_head:
        what = f"the student has {student.n_head} heads, the teacher {teacher.n_head}"
        if weights.head_map == "equal":
            raise ConfigError(
                f"--attention-weight compares head by head: {what}",
                f"take a student with {teacher.n_head} heads, --head-map average, or --attention-weight 0",
            )
        if teacher.n_head % student.n_head:
            raise ConfigError(
                f"--head-map average needs groups of equal size: {what}",
                f"take a student whose number of heads divides {teacher.n_head}, or --attention-weight 0",
            )
    if weights.relation and teacher.n_embd % student.n_head:
        raise ConfigError(
            f"--relation-weight splits both widths by the student's {student.n_head} heads, "
            f"which do not divide the teacher's {teacher.n_embd}",
            "use --relation-weight 0",
        )
    if weights.cosine and student.n_embd != teacher.n_embd:
        raise ConfigError(
            f"--cosine-weight needs equal widths: the student has {student.n_embd}, the teacher {teacher.n_embd}",
            "use --cosine-weight 0",
        )
