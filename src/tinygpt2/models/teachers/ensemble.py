"""Several teachers as one, which predicts with the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tinygpt2.models.activations import Activations
from tinygpt2.models.documents import Documents
from tinygpt2.models.lm_head import Head, wide
from tinygpt2.models.teachers.teacher import Shape, Teacher
from tinygpt2.models.teachers.vocabularies import Reading
from tinygpt2.utils.hub import at_commit, hub_revision


@dataclass(frozen=True)
class MeanHead(Head):
    """Makes the logarithm of the mean of several heads' probabilities, for a chunk of tokens at a time.

    Each head's tokens that are left out are so before the mean.

    Attributes:
        matrix, size: those of the first head.
        heads: each with the width of its part of the states.
    """

    heads: tuple[tuple[Head, int], ...] = ()

    def logits(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N W"]:
        """Return log((p_1 + ... + p_K) / K) of some states, in which the heads' own lie side by side."""
        mean: Tensor | None = None
        parts = torch.split_with_sizes(states, [width for _, width in self.heads], -1)
        for (head, _), part in zip(self.heads, parts, strict=True):
            logits = head.logits(part)[:, : self.size]
            own = logits.to(wide(logits)).log_softmax(-1)
            mean = own if mean is None else torch.logaddexp(mean, own)
        assert mean is not None
        return F.pad(mean - math.log(len(self.heads)), (0, len(self.matrix) - self.size))


class Ensemble(Teacher):
    """Several teachers as one. Its predictions are the mean of their probabilities: no student learns their states.

    It has one hidden state, the last: the members' last states side by side. A temperature softens the mean.

    Args:
        members: each reads and predicts the student's tokens.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 3, whose ensembles are the arithmetic mean, too.
    """

    def __init__(self, members: Sequence[Teacher]) -> None:
        nn.Module.__init__(self)
        self.members = nn.ModuleList(members)
        self.reading = next((one.reading for one in members if one.reading != Reading()), Reading())
        self.vocabulary = members[0].vocabulary
        shapes = [one.shape for one in members]
        layers = sum(shape.layers for shape in shapes)
        limits = [shape.positions for shape in shapes if shape.positions is not None]
        self.shape = Shape(
            kind=" and ".join(dict.fromkeys(shape.kind for shape in shapes)),
            layers=layers,
            width=round(sum(shape.width * shape.layers for shape in shapes) / layers),
            last_width=sum(shape.last_width for shape in shapes),
            heads=None,
            vocabulary=shapes[0].vocabulary,
            positions=min(limits, default=None),
            weights=sum(shape.weights for shape in shapes),
        )

    def _each(self) -> Iterator[Teacher]:
        for one in self.members:
            assert isinstance(one, Teacher)
            yield one

    def covered(self, length: int) -> int:
        """See `Teacher`."""
        return min(one.covered(length) for one in self._each())

    def collect(
        self,
        input_ids: Int[Tensor, "B T"],
        states: Iterable[int],
        attention: Iterable[int] = (),
        documents: Documents | None = None,
    ) -> Activations:
        """See `Teacher`. There is only the last state.

        Raises:
            ValueError: another one is asked for.
        """
        if set(states) != {self.shape.layers} or set(attention):
            raise ValueError("several teachers have only the last hidden state")
        covered = self.covered(input_ids.shape[1])
        last = [
            one.collect(input_ids, [one.shape.layers], documents=documents).states[one.shape.layers]
            for one in self._each()
        ]
        return Activations({self.shape.layers: torch.cat([state[:, :covered] for state in last], -1)})

    def compile_passes(self) -> None:
        """See `Teacher`."""
        for one in self._each():
            one.compile_passes()

    def head(self) -> Head:
        """See `Teacher`."""
        heads = tuple((one.head(), one.shape.last_width) for one in self._each())
        return MeanHead(heads[0][0].matrix, heads[0][0].size, heads=heads)

    def place_head(self, device: torch.device) -> None:
        """See `Teacher`."""
        for one in self._each():
            one.place_head(device)

    def cast(self, dtype: torch.dtype) -> None:
        """See `Teacher`."""
        for one in self._each():
            one.cast(dtype)

    def cast_weights(self) -> int:
        """See `Teacher`."""
        return sum(one.cast_weights() for one in self._each())

    def identity(self) -> Iterator[tuple[str, Tensor | None]]:
        """See `Teacher`."""
        for one in self._each():
            yield from one.identity()


def members_of(teacher: Teacher) -> list[Teacher]:
    """Return the teachers that one consists of: itself, if it is no ensemble."""
    return [*teacher._each()] if isinstance(teacher, Ensemble) else [teacher]


def as_one(members: Sequence[Teacher]) -> Teacher | None:
    """Return one teacher for any number of them; None for none."""
    return Ensemble(members) if len(members) > 1 else next(iter(members), None)


def pinned(names: Sequence[str], directories: Sequence[Path]) -> list[str]:
    """Return the names of models, with the commits of those that came from the Hub."""
    commits = map(hub_revision, names, directories)
    return [at_commit(name, commit) if commit else name for name, commit in zip(names, commits, strict=True)]
