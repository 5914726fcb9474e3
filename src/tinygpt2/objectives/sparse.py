"""A teacher's predictions in at most 200 bytes a position, and forward KL from them.

`samples`: K tokens stand for the teacher's distribution p. Likely tokens are kept with their probabilities. The others
are drawn: with a threshold c, each with probability p / c, and a drawn token gets the weight c. So the expected weight
of every token is its probability, and the gradient of forward KL is estimated without bias. Sampled targets for
distillation: Anshumann et al. 2025, arXiv:2503.16870. A token is kept for certain if p > c, and with K tokens, no
other such choice has a smaller squared error: Fearnhead and Clifford 2003, "On-line inference for hidden Markov models
via particle filters". All drawn tokens share one weight. So a drawn token takes half of the room of one that is kept
with its probability, and K differs from position to position: as many tokens as the room holds.

`top`: the K likeliest tokens with their probabilities, and the mass of the rest. The rest counts as one more token,
whose probability under the student is what its K tokens leave. The loss is the KL between these K + 1 events, which is
at most the KL between the distributions. Its gradient is biased: it says nothing about tokens within the rest.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tinygpt2.config.distillation import CacheKind, SparseKind
from tinygpt2.models.lm_head import Head, default_chunk, rows_at_once

BYTES = 200  # for each position, with the part of a block's checksum (4 bytes) that falls on it
LAYOUT = 2  # of the records; a cache with another one is not read
_STEPS = 2048  # a stored logarithm is a multiple of 1 / 2048, so a weight is off by at most 0.025 %
_NONE = 2**16 - 1  # stands for the weight 0
_SHIFT = 2**15  # int16 holds numbers from 0 to 65535 minus this


class SparseTargets(NamedTuple):
    """A teacher's predictions at N positions.

    Attributes:
        tokens: the tokens that stand for the distribution; a token may be there twice.
        weights: their probabilities, or what stands for them, and 0 in places that are not used. Those of `samples` add
            up to 1.
        certain: how many of them, from the first on, have their own probability; the others were drawn.
        extra: of `samples`, the entropy of the teacher's whole distribution in nats; of `top`, the rest's probability.
        kind: which of the two this is.
    """

    tokens: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]
    certain: Int[Tensor, " N"]
    extra: Float[Tensor, " N"]
    kind: SparseKind

    def part(self, rows: slice) -> SparseTargets:
        """Return those of some positions."""
        return SparseTargets(self.tokens[rows], self.weights[rows], self.certain[rows], self.extra[rows], self.kind)


def sparse_kl(student: Float[Tensor, "N V"], teacher: SparseTargets) -> tuple[Float[Tensor, ""], Tensor]:
    """Return forward KL from sparse targets, summed over tokens, in nats, and its gradient for the student's logits.

    With `samples`, both are unbiased estimates of the ones that the teacher's whole distribution gives.

    Args:
        student: logits, divided by the temperature at which the targets were made.
    """
    tokens, weights, extra = teacher.tokens, teacher.weights.to(student.dtype), teacher.extra.to(student.dtype)
    chosen = student.gather(-1, tokens) - student.logsumexp(-1, keepdim=True)
    gradient = student.softmax(-1)
    value = -(weights * chosen).sum()
    if teacher.kind == "samples":
        return value - extra.sum(), gradient.scatter_add_(-1, tokens, -weights)
    known = gradient.gather(-1, tokens)
    # a sum, because 1 minus the others would be inexact for a student that is nearly certain
    rest = gradient.scatter_(-1, tokens, 0.0).sum(-1).clamp(min=torch.finfo(student.dtype).tiny)
    value = value + torch.xlogy(weights, weights).sum() + (torch.xlogy(extra, extra) - extra * rest.log()).sum()
    gradient = gradient.mul_((1 - extra / rest)[:, None])
    return value, gradient.scatter_(-1, tokens, known - weights)


@dataclass(frozen=True)
class SparseForm:
    """How sparse targets are made of logits, and stored.

    Attributes:
        kind: which tokens are kept.
        vocabulary: V, the number of tokens.
        temperature: divides the logits.
        layout: of the records.
    """

    kind: SparseKind
    vocabulary: int
    temperature: float = 1.0
    layout: int = LAYOUT

    @classmethod
    def of(cls, kind: CacheKind | None, vocabulary: int, temperature: float) -> SparseForm | None:
        """Return the form of the predictions that a cache of some kind holds; None if it holds hidden states."""
        return None if kind is None or kind == "states" else cls(kind, vocabulary, temperature)

    @property
    def width(self) -> int:
        """The size of a position's record in numbers of 16 bits: tokens with weights, and 4 that stand alone."""
        return self._room + 4

    @property
    def kept(self) -> int:
        """K at most: the places of tokens in `SparseTargets`."""
        return self._room // (self._whole if self._room == self._full or self.kind == "top" else self._size)

    @property
    def _most(self) -> int:
        """How many tokens can be kept with their probabilities. There is room to draw at least one beside them."""
        spare = 0 if self._room == self._full or self.kind == "top" else self._size
        return (self._room - spare) // self._whole

    @property
    def _room(self) -> int:
        return min(BYTES // 2 - 6, self._full)

    @property
    def _full(self) -> int:
        """The room that all tokens with their probabilities would take."""
        return (self.vocabulary - (self.kind == "top")) * self._whole

    @property
    def _size(self) -> int:
        """How many numbers of 16 bits a token takes."""
        return 1 if self.vocabulary <= 2**16 else 2

    @property
    def _whole(self) -> int:
        """How many a token takes with its own probability."""
        return self._size + 1

    def _drawn(self, certain: Tensor) -> Tensor:
        """Return how many tokens there is room to draw beside those that are kept for certain."""
        return (self._room - certain * self._whole) // self._size

    def targets(self, logits: Float[Tensor, "N V"], start: Float[Tensor, " N"]) -> SparseTargets:
        """Make the targets of some positions.

        Args:
            start: uniform random numbers from 0 to 1, which `samples` draws with.
        """
        logs = (logits / self.temperature).log_softmax(-1)
        p = logs.exp()
        top, tokens = p.topk(self._most, sorted=True)
        if self.kind == "top":
            rest = p.scatter(-1, tokens, 0.0).sum(-1)
            return SparseTargets(tokens, top, torch.full_like(rest, self._most, dtype=torch.long), rest, "top")
        entropy = -(p * logs).sum(-1)
        after = 1 - top.cumsum(-1) + top  # the mass of each token and all after it
        certain = torch.full_like(tokens[:, 0], self._most)
        if self._room < self._full:
            draws = self._drawn(torch.arange(self._most, device=p.device))
            certain = (top * draws > after).int().cumprod(-1).sum(-1)
        places = torch.arange(self.kept, device=p.device)
        kept = torch.arange(self._most, device=p.device) < certain[:, None]
        precise = torch.float32 if p.device.type == "mps" else torch.float64
        sums = p.scatter(-1, tokens, top.masked_fill(kept, 0.0)).cumsum(-1, dtype=precise)
        step = sums[:, -1:] / self._drawn(certain).clamp(min=1)[:, None]
        points = (places - certain[:, None] + start[:, None].to(precise)).clamp(min=0) * step
        drawn = torch.searchsorted(sums, points, right=True).clamp(max=self.vocabulary - 1)
        return self._joined(tokens, top, certain, drawn, step.to(top.dtype), entropy)

    def _joined(
        self, tokens: Tensor, weights: Tensor, certain: Tensor, drawn: Tensor, weight: Tensor, extra: Tensor
    ) -> SparseTargets:
        """Put certain tokens and drawn ones, which share a weight, into the same rows; leave unused places empty."""
        places = torch.arange(self.kept, device=tokens.device)
        first, unused = places < certain[:, None], places >= (certain + self._drawn(certain))[:, None]
        spare = (0, self.kept - self._most)
        return SparseTargets(
            pad(tokens[:, : self._most], spare).where(first, drawn).masked_fill(unused, 0),
            pad(weights, spare).where(first, weight).masked_fill(unused, 0.0),
            certain,
            extra,
            self.kind,
        )

    def records(self, head: Head, states: Float[Tensor, "B T D"], ids: Int[Tensor, "B S"]) -> Int[Tensor, "B T R"]:
        """Make the records of blocks from a teacher's last hidden states, chunk by chunk.

        Args:
            ids: the blocks' tokens. The random numbers of a block depend on nothing else.
        """
        flat, start = states.flatten(0, 1), _random(ids, states.shape[1]).flatten().to(states.device)
        device = states.device.type
        rows = min(default_chunk(self.vocabulary, device), 4 * rows_at_once(self.vocabulary, device))
        parts = (slice(first, first + rows) for first in range(0, len(flat), rows))
        found = [
            self.pack(self.targets(head.logits(flat[part])[:, : self.vocabulary].float(), start[part]))
            for part in parts
        ]
        return torch.cat(found).view(*states.shape[:2], self.width)

    def pack(self, targets: SparseTargets) -> Int[Tensor, "N R"]:
        """Return targets as records of 16-bit numbers.

        The tokens come first. The weights of the certain ones fill the same room from its end. After it come the number
        of certain tokens, the weight of each drawn one, and `extra` as float32. Of weights, the logarithms are stored.
        """
        tokens, weights, certain = targets.tokens, targets.weights, targets.certain[:, None]
        ids = (tokens - _SHIFT).to(torch.int16) if self._size == 1 else tokens.to(torch.int32).view(torch.int16)
        logs = ((weights.log() * -_STEPS).round().clamp(0, _NONE) - _SHIFT).to(torch.int16)
        own = pad(logs[:, : self._most], (0, self._room - self._most)).flip(-1)
        from_end = self._room - 1 - torch.arange(self._room, device=tokens.device)
        room = own.where(from_end < certain, pad(ids, (0, self._room - ids.shape[1])))
        drawn = logs.gather(-1, certain.clamp(max=self.kept - 1))
        extra = targets.extra.float().contiguous()[:, None].view(torch.int16)
        return torch.cat([room, certain.to(torch.int16), drawn, extra], -1)

    def unpack(self, records: Int[Tensor, "N R"]) -> SparseTargets:
        """Return the targets that records hold. The rounded weights are scaled to their right sum."""
        room, certain, drawn, extra = records[:, :-4], records[:, -4:-3], records[:, -3:-2], records[:, -2:]
        ids = room[:, : self.kept * self._size]
        tokens = ids.long() + _SHIFT if self._size == 1 else ids.contiguous().view(torch.int32).long()
        last = extra.contiguous().view(torch.float32)[:, 0]
        found = self._joined(
            tokens, _weights(room.flip(-1)[:, : self._most]), certain[:, 0].long(), tokens, _weights(drawn), last
        )
        mass = 1 - last if self.kind == "top" else torch.ones_like(last)
        scale = mass / found.weights.sum(-1).clamp(min=math.exp(-32))
        return found._replace(weights=found.weights * scale[:, None])


def _weights(logs: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    steps = logs.to(torch.int32) + _SHIFT
    return (steps.float() / -_STEPS).exp().masked_fill(steps == _NONE, 0.0)


def _random(ids: Int[Tensor, "B S"], length: int) -> Float[Tensor, "B T"]:
    """Return a uniform random number for each position, which the tokens of its block determine."""
    seeds = [zlib.crc32(row.tobytes()) for row in ids.cpu().numpy()]
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
