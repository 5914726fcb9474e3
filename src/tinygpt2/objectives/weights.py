"""What each objective weighs, and the counts and parts of a batch that their means are taken over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tinygpt2.config.distillation import DistillConfig, HeadMap, HiddenScale, OwnTextLoss, PredictionLoss
from tinygpt2.objectives.positions import Positions, Predicting, RealTokens
from tinygpt2.utils.types import Array


@dataclass(frozen=True)
class LossWeights:
    """The weight of each term, under the term's name, and the settings. The defaults are plain language modelling."""

    attention: float = 0.0
    hidden: float = 0.0
    prediction: float = 0.0
    ce: float = 1.0
    cosine: float = 0.0
    relation: float = 0.0
    hidden_scale: HiddenScale = "none"
    loss: PredictionLoss = "forward_kl"
    own_text: float = 0.0
    own_text_loss: OwnTextLoss = "forward_kl"
    mixture: float = 0.0  # the teacher's share in the distribution that sampled text comes from
    normalise_returns: bool = True
    clip_ratio: float = 0.2
    skew: float = 0.1
    jsd_beta: float = 0.5
    temperature: float = 1.0
    layer_map: str = "uniform"
    head_map: HeadMap = "equal"
    hidden_map: str = "all"

    @property
    def compares(self) -> bool:
        """Whether predictions of student and teacher are compared."""
        return bool(self.prediction or (self.own_text and self.own_text_loss != "ce"))

    @property
    def predicts(self) -> bool:
        """Whether the student's predictions have a loss."""
        return bool(self.prediction or self.own_text or self.ce)

    @classmethod
    def of(cls, config: DistillConfig) -> LossWeights:
        """Return the weights and settings that the options of `distill` hold."""
        return cls(
            attention=config.attention_weight,
            hidden=config.hidden_weight,
            prediction=config.prediction_weight,
            ce=config.ce_weight,
            cosine=config.cosine_weight,
            relation=config.relation_weight,
            hidden_scale=config.hidden_scale,
            loss=config.prediction_loss,
            own_text=config.own_text_weight,
            own_text_loss=config.on_policy_loss or config.prediction_loss,
            mixture=config.teacher_share if config.sampler == "mixture" else 0.0,
            normalise_returns=config.normalise_returns,
            clip_ratio=config.clip_ratio,
            skew=config.skew,
            jsd_beta=config.jsd_beta,
            temperature=config.temperature,
            layer_map=config.layer_map,
            head_map=config.head_map,
            hidden_map=config.hidden_map,
        )


class Counts(NamedTuple):
    """The counts that means divide by.

    Attributes:
        positions: number of positions.
        targets: number of next tokens to predict.
        pairs: number of pairs of a position with itself or an earlier position.
        predictions: number of positions whose predictions are compared: all, or those before targets that count.
        own_text: number of the targets that count in sampled text.
    """

    positions: float
    targets: float
    pairs: float
    predictions: float
    own_text: float = 0.0

    @classmethod
    def of(cls, lengths: Sequence[int], covered: int | None = None, targets: Sequence[int] | None = None) -> Counts:
        """Count them in blocks that have the given numbers of real tokens.

        Args:
            covered: for how many positions of each block there is a teacher, if not for all.
            targets: how many targets of each block count, if not all do.
        """
        seen = lengths if covered is None else [min(length, covered) for length in lengths]
        pairs = sum(n * (n + 1) // 2 for n in seen)
        if targets is None:
            return cls(sum(seen), sum(max(0, length - 1) for length in lengths), pairs, sum(seen))
        return cls(sum(seen), sum(targets), pairs, sum(targets))

    def over(self, count: int) -> Counts:
        """Divide all counts by a number. A count of 0 is replaced by 1, so that nothing is divided by 0."""
        positions, targets, pairs, predictions = (max(value, 1) / count for value in self[:4])
        return Counts(positions, targets, pairs, predictions, self.own_text / count)


class Part(NamedTuple):
    """A part of a batch whose predictions have a loss of their own: the data's blocks, or sampled text.

    Attributes:
        prediction, ce: weights of the two losses.
        shares: of the positions and of the targets that means divide by, those of this part.
        means: the same of the counts by which the reported terms are divided.
        name: of the reported term.
        lengths: the number of positions in each row that has some.
    """

    positions: Positions | None
    prediction: float
    ce: float
    loss: PredictionLoss
    shares: tuple[float, float]
    means: tuple[float, float]
    name: str
    lengths: list[int]

    def key(self, term: str) -> str:
        """Return the name under which a term of this part is reported."""
        if self.name == "prediction" or "/" in term:
            return term
        # beside the loss between predictions, the cross-entropy of sampled tokens says how sure the student is
        return "sample/student_loss" if term == "ce" and self.prediction else self.name

    def factor(self, term: str) -> float:
        """Return by what a term of this part is multiplied, so that the mean over micro-batches is the batch's."""
        return self.means[1] if term == "ce" else self.shares[0] if "/" in term else self.means[0]


def parts_of(
    weights: LossWeights,
    counted: Array | None,
    own_text: Array | None,
    real: RealTokens | None,
    counts: Counts,
    share: Counts,
    covered: int,
    device: torch.device,
) -> list[Part]:
    """Return the parts of a batch: all of it, or with sampled text that and the data's blocks.

    Every position that counts weighs the same, whichever part it is in. A part that no process has is left out.

    Args:
        counted, own_text: see `Batch`.
        real: the positions of real tokens, if blocks are padded.
        counts: of this batch.
        share: the counts that means divide by.
        covered: for how many positions of a block there are predictions to compare.
    """
    if counted is None or own_text is None:
        positions = real if counted is None else Predicting(counted, covered, device)
        shares = counts.predictions / share.predictions, counts.targets / share.targets
        return [Part(positions, weights.prediction, weights.ce, weights.loss, shares, shares, "prediction", [])]
    parts = []
    for sampled, whole in ((False, share.predictions - share.own_text), (True, share.own_text)):
        chosen = counted & (own_text == sampled)[:, None]
        count, loss, both = int(chosen[:, 1:].sum()), weights.loss, (weights.prediction, weights.ce)
        if sampled:
            loss, both = _own_text_losses(weights)
        if whole:
            shares = count / share.predictions, count / share.targets
            positions, name = Predicting(chosen, covered, device), "own_text" if sampled else "prediction"
            lengths = [int(length) for length in chosen[:, 1:].sum(1) if length]
            parts.append(Part(positions, *both, loss, shares, (count / whole, count / whole), name, lengths))
    return parts


def _own_text_losses(weights: LossWeights) -> tuple[PredictionLoss, tuple[float, float]]:
    """Return the loss between predictions on sampled text, its weight, and that of the cross-entropy.

    The policy gradient consists of both: see `policy_gradient`.
    """
    if weights.own_text_loss == "ce":
        return weights.loss, (0.0, weights.own_text)
    if weights.own_text_loss == "policy_gradient":
        return "reverse_kl", (weights.own_text, weights.own_text)
    return weights.own_text_loss, (weights.own_text, 0.0)
