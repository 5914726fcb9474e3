"""The weighted sum of all objectives.

To add an objective, write its function with its source in a module of this package, add an option to `DistillConfig`
and a term to `Objectives.forward`, and compare it with a float64 reference in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config

from tinygpt2.alignment.redistribution import AlignedHead
from tinygpt2.alignment.spans import SpanHead
from tinygpt2.data.batches.batch import to_device
from tinygpt2.errors import ConfigError
from tinygpt2.models.activations import Activations, by_head
from tinygpt2.models.lm_head import Head
from tinygpt2.models.teachers.teacher import Shape
from tinygpt2.objectives.attention import attention_loss, relation_loss
from tinygpt2.objectives.divergences import IGNORED
from tinygpt2.objectives.hidden import cosine_loss, hidden_loss
from tinygpt2.objectives.layer_maps import layer_pairs, state_pairs
from tinygpt2.objectives.logits import PredictionObjective, prediction_loss
from tinygpt2.objectives.policy_gradient import factors_of, importance, later_returns, token_log_probs
from tinygpt2.objectives.positions import RealTokens, kept
from tinygpt2.objectives.span_losses import span_loss
from tinygpt2.objectives.sparse import SparseForm
from tinygpt2.objectives.weights import Counts, LossWeights, Part, parts_of
from tinygpt2.utils.types import Array


class Objectives(nn.Module):
    """Computes the weighted sum of the active objectives, and holds the learned map of hidden states.

    Args:
        weights: weights and settings of the objectives.
        student: the student's configuration.
        teacher: the teacher's sizes, or its configuration if it is a GPT-2; None if no active objective uses a teacher.
        chunk: for how many tokens logits are held at a time; None chooses a number that suits the device.

    Attributes:
        student_states, teacher_states: numbers of the hidden states to capture.
        student_attention, teacher_attention: numbers of the layers whose attention to capture.

    Raises:
        ConfigError: the shapes of student and teacher do not fit an active objective.
    """

    def __init__(
        self, weights: LossWeights, student: GPT2Config, teacher: Shape | GPT2Config | None, chunk: int | None = None
    ) -> None:
        super().__init__()
        teacher = Shape.of_gpt2(teacher) if isinstance(teacher, GPT2Config) else teacher
        self.weights, self.chunk, self.heads = weights, chunk, student.n_head
        self.projection: nn.Module = nn.Identity()
        self.last_projection: nn.Module | None = None  # for a teacher whose last state has another width than the rest
        self._last = (student.n_layer, 0 if teacher is None else teacher.layers)
        self._group = 1  # number of teacher heads whose mean score one student head learns
        # Pairs to compare: (number in the student, number in the teacher).
        self._scores: list[tuple[int, int]] = []
        self._relations: list[tuple[int, int]] = []
        self._states: list[tuple[int, int]] = []
        ends: list[tuple[int, int]] = []
        if teacher is not None:
            _check_shapes(weights, student, teacher)
            ends = [self._last] if weights.compares or weights.cosine else []
        if teacher is not None and (weights.attention or weights.relation or weights.hidden):
            layers = layer_pairs(weights.layer_map, student.n_layer, teacher.layers)
            self._group = (teacher.heads or student.n_head) // student.n_head
            self._scores = layers if weights.attention else []
            self._relations = layers[-1:] if weights.relation else []
            self._states = state_pairs(weights.hidden_map, layers, teacher.layers) if weights.hidden else []
            self._make_projections(student.n_embd, teacher)
        own = {student.n_layer} if weights.predicts else set()
        self.student_states = sorted(own | {i for i, _ in self._states + ends})
        self.teacher_states = sorted({j for _, j in self._states + ends})
        self.student_attention = sorted({i for i, _ in self._scores + self._relations})
        self.teacher_attention = sorted({j for _, j in self._scores + self._relations})

    def _make_projections(self, width: int, teacher: Shape) -> None:
        """Make the learned maps from the student's width to the teacher's, where they differ."""
        inner = any(j < teacher.layers for _, j in self._states)
        if self._states and width != teacher.width and (inner or teacher.width == teacher.last_width):
            self.projection = nn.Linear(width, teacher.width)
        if teacher.width != teacher.last_width and any(j == teacher.layers for _, j in self._states):
            same = width == teacher.last_width
            self.last_projection = nn.Identity() if same else nn.Linear(width, teacher.last_width)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        student: Activations,
        student_head: Float[Tensor, "V D"],
        teacher: Activations | None = None,
        teacher_head: Float[Tensor, "W Dt"] | Head | SparseForm | AlignedHead | None = None,
        *,
        lengths: Sequence[int] | None = None,
        share: Counts | None = None,
        counted: Array | None = None,
        own_text: Array | None = None,
        drawn: Array | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return the weighted sum, and each active term by its name, unweighted and detached.

        Args:
            student_head: the student's output matrix.
            teacher: its activations. If it has none of the last position of a block, no term compares that position.
            teacher_head: the teacher's head, or its output matrix as `head_operand` returns it. If it is the form of
                records, or makes logits of them, these are in the place of the teacher's last state.
            lengths: number of real tokens in each row, known to the host; the rest is padding, which no term counts.
                None if there is no padding.
            share: the counts that means divide by; None uses the counts of this batch. With the counts of a global
                batch divided by its number of micro-batches, the mean of the micro-batches' terms is the global
                batch's term.
            counted: which tokens count as targets: see `Batch`. Cross-entropy and the loss between predictions read
                the positions before them; the terms that compare hidden states and attention read all real tokens.
            own_text, drawn: which rows are sampled text: see `Batch`. The loss and its weight are others there.
        """
        weights = self.weights
        size, length = input_ids.shape
        covered = (teacher and teacher.length) or length
        chosen = None if counted is None else [int(counted[:, 1:].sum())]
        own = Counts.of([length] * size if lengths is None else lengths, covered, chosen)
        if counted is not None and own_text is not None:
            own = own._replace(own_text=int(counted[own_text, 1:].sum()))
        share = own.over(1) if share is None else share
        real = None if lengths is None else RealTokens(lengths, length, input_ids.device)
        targets = self._targets(input_ids, real)
        if covered < length:
            student, targets = student.cut(covered), targets[:, :covered]
            if lengths is not None:
                real = RealTokens([min(count, covered) for count in lengths], covered, input_ids.device)
        terms: dict[str, Tensor] = {}
        if teacher is not None:
            terms = self._compare(student, teacher, real, own, share)
        loss = sum((getattr(weights, name) * term for name, term in terms.items()), student_head.new_zeros(()))
        if weights.predicts:
            likely = _before(drawn, covered, input_ids.device)
            for part in parts_of(weights, counted, own_text, real, own, share, covered, input_ids.device):
                labels = None
                if teacher is not None and teacher_head is not None and part.prediction:
                    labels = (kept(teacher.states[self._last[1]], part.positions), teacher_head)
                hidden, wanted = kept(student.states[self._last[0]], part.positions), kept(targets, part.positions)
                total, found = self._predicted(part, hidden, student_head, wanted, labels, likely)
                loss = loss + total
                for name, term in found.items():
                    terms[part.key(name)] = terms.get(part.key(name), 0) + term * part.factor(name)
        return loss, {name: term.detach() for name, term in terms.items()}

    def _predicted(
        self,
        part: Part,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        labels: tuple[Tensor, Tensor | Head | SparseForm | AlignedHead] | None,
        drawn: Float[Tensor, "B T"] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted losses on the predictions of a part, and the terms: see `prediction_loss`.

        Args:
            drawn: with which log-probability the token after each position was drawn.
        """
        objective = self._objective(part)
        if labels is not None and isinstance(labels[1], SpanHead):
            return span_loss(hidden, head, targets, (labels[0], labels[1]), objective)
        likely = None if drawn is None else kept(drawn, part.positions)
        factors = self._row_factors(part, hidden, head, targets, labels, likely)
        return prediction_loss(hidden, head, targets, labels, objective, factors)

    def _objective(self, part: Part) -> PredictionObjective:
        """Return the losses on the predictions of a part, whose means count with its shares.

        Their terms are reported, as 0, even if the part has no positions here: other micro-batches and processes may.
        """
        weights, (predictions, targets) = self.weights, (share or 1.0 for share in part.shares)
        return PredictionObjective(
            part.prediction * predictions,
            part.ce * targets,
            part.loss,
            weights.temperature,
            self.chunk,
            weights.skew,
            weights.jsd_beta,
        )

    def _row_factors(
        self,
        part: Part,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        labels: tuple[Tensor, Tensor | Head | SparseForm | AlignedHead] | None,
        drawn: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return by what the gradients at each position of sampled text are multiplied: see `policy_gradient`."""
        weights = self.weights
        gradient = weights.own_text_loss == "policy_gradient"
        if part.name != "own_text" or labels is None or not (weights.mixture or gradient):
            return None, None
        states, other = labels
        other = Head(other, len(head)) if isinstance(other, Tensor) else other
        assert isinstance(other, Head)  # a cache of predictions has none of sampled text
        log_s, log_t = token_log_probs(hidden.detach(), head.detach(), targets, (states, other))
        ratio = importance(log_s, log_t, weights.mixture) if drawn is None else (log_s - drawn).exp()
        if not gradient:
            return ratio, None
        returns = later_returns(log_t - log_s, part.lengths, normalised=weights.normalise_returns)
        return factors_of(ratio, returns, weights.clip_ratio)

    @staticmethod
    def _targets(input_ids: Int[Tensor, "B T"], real: RealTokens | None) -> Int[Tensor, "B T"]:
        """Return the next token of each position, or `IGNORED` where there is none."""
        targets = F.pad(input_ids[:, 1:], (0, 1), value=IGNORED)
        return targets if real is None else targets.masked_fill(~F.pad(real.mask[:, 1:], (0, 1)), IGNORED)

    def _compare(
        self, student: Activations, teacher: Activations, real: RealTokens | None, own: Counts, share: Counts
    ) -> dict[str, Tensor]:
        """Return the active terms that compare the activations of the two models, unweighted.

        On padding, queries, keys and values are set to 0, so that padding adds nothing to the sums of their losses.
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
            project = (self.last_projection if j == self._last[1] else None) or self.projection
            mapped = project(student.states[i])
            pair = kept(mapped, real), kept(teacher.states[j], real)
            terms.setdefault("hidden", []).append(hidden_loss(*pair, self.weights.hidden_scale))
        if self.weights.cosine:
            pair = kept(student.states[self._last[0]], real), kept(teacher.states[self._last[1]], real)
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

    def _by_head(self, fused: Float[Tensor, "B T D"], real: RealTokens | None) -> tuple[Tensor, Tensor, Tensor]:
        """Split queries, keys and values into the student's number of heads.

        If the teacher has more heads, each of the resulting long heads contains a group of teacher heads. The product
        of two long heads is then the sum of the group's scores.
        """
        fused = fused if real is None else fused * real.mask.unsqueeze(-1)
        query, key, value = (by_head(part, self.heads) for part in fused.chunk(3, dim=-1))
        return query, key, value


def _before(drawn: Array | None, covered: int, device: torch.device) -> Float[Tensor, "B T"] | None:
    """Return the log-probability with which the token after each of the covered positions was drawn, on a device."""
    if drawn is None:
        return None
    return F.pad(to_device(torch.from_numpy(drawn[:, 1:]), device), (0, 1))[:, :covered]


def _check_shapes(weights: LossWeights, student: GPT2Config, teacher: Shape) -> None:
    if (weights.attention or weights.relation) and teacher.heads is None:
        option = "--attention-weight" if weights.attention else "--relation-weight"
        raise ConfigError(
            f"{option} compares attention, which needs a GPT-2 as the teacher, and this one is a {teacher.kind}",
            f"use {option} 0: predictions and hidden states can be learned from any teacher",
        )
    if weights.attention and student.n_head != teacher.heads:
        counts = f"the student has {student.n_head} heads, the teacher {teacher.heads}"
        if weights.head_map == "equal":
            raise ConfigError(
                f"--attention-weight compares head by head, which needs equal numbers of heads: {counts}",
                f"use a student with {teacher.heads} heads, --head-map average, or --attention-weight 0",
            )
        if (teacher.heads or 0) % student.n_head:
            raise ConfigError(
                f"--head-map average divides the teacher's heads into groups of equal size: {counts}",
                f"use a student whose number of heads divides {teacher.heads}, or --attention-weight 0",
            )
    if weights.relation and teacher.width % student.n_head:
        raise ConfigError(
            f"--relation-weight splits both hidden sizes into the student's {student.n_head} heads, "
            f"which do not divide the teacher's {teacher.width}",
            "use --relation-weight 0",
        )
    if weights.cosine and student.n_embd != teacher.last_width:
        raise ConfigError(
            f"--cosine-weight needs equal hidden sizes: the student has {student.n_embd}, "
            f"the teacher {teacher.last_width}",
            "use --cosine-weight 0",
        )
