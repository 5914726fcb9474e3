"""A teacher's predictions in at most 200 bytes a position, and forward KL from them.

`samples`: K tokens stand for the teacher's distribution p. Likely tokens are kept with their probabilities. The others
are drawn: with a threshold c, each with probability p / c, and a drawn token gets the weight c. So the expected weight
of every token is its probability, and the gradient of forward KL is estimated without bias. A token is kept for certain
if p > c, and c makes K tokens in all. Sampled targets for distillation: Anshumann et al. 2025, arXiv:2503.16870. The
threshold, with which no other such choice of K tokens has a smaller squared error: Fearnhead and Clifford 2003,
"On-line inference for hidden Markov models via particle filters".

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

from tinygpt2.config.distillation import CacheKind, SparseKind
from tinygpt2.models.lm_head import Head, default_chunk, rows_at_once

BYTES = 200  # for each position, with the part of a block's checksum (4 bytes) that falls on it
_STEPS = 2048  # a stored logarithm is a multiple of 1 / 2048, so a weight is off by at most 0.025 %
_NONE = 2**16 - 1  # stands for the weight 0
_SHIFT = 2**15  # int16 holds numbers from 0 to 65535 minus this


class SparseTargets(NamedTuple):
    """A teacher's predictions at N positions.

    Attributes:
        tokens: the K tokens that were kept; a token may be there twice.
        weights: their probabilities, or what stands for them. Those of `samples` add up to 1.
        extra: of `samples`, the entropy of the teacher's whole distribution in nats; of `top`, the rest's probability.
        kind: which of the two this is.
    """

    tokens: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]
    extra: Float[Tensor, " N"]
    kind: SparseKind

    def part(self, rows: slice) -> SparseTargets:
        """Return those of some positions."""
        return SparseTargets(self.tokens[rows], self.weights[rows], self.extra[rows], self.kind)


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
    """

    kind: SparseKind
    vocabulary: int
    temperature: float = 1.0

    @classmethod
    def of(cls, kind: CacheKind | None, vocabulary: int, temperature: float) -> SparseForm | None:
        """Return the form of the predictions that a cache of some kind holds; None if it holds hidden states."""
        return None if kind is None or kind == "states" else cls(kind, vocabulary, temperature)

    @property
    def kept(self) -> int:
        """K: a number takes 2 bytes in a vocabulary of up to 65536 tokens, else 4; a weight takes 2, and `extra` 4."""
        return min((BYTES - 8) // (4 if self._short else 6), self.vocabulary - (self.kind == "top"))

    @property
    def width(self) -> int:
        """The size of a position's record in numbers of 2 bytes."""
        return self.kept * (2 if self._short else 3) + 2

    @property
    def _short(self) -> bool:
        return self.vocabulary <= 2**16

    def targets(self, logits: Float[Tensor, "N V"], start: Float[Tensor, " N"]) -> SparseTargets:
        """Make the targets of some positions.

        Args:
            start: uniform random numbers from 0 to 1, which `samples` draws with.
        """
        logs = (logits / self.temperature).log_softmax(-1)
        p = logs.exp()
        top, tokens = p.topk(self.kept, sorted=True)
        if self.kind == "top":
            return SparseTargets(tokens, top, p.scatter(-1, tokens, 0.0).sum(-1), "top")
        entropy = -(p * logs).sum(-1)
        places = torch.arange(self.kept, device=p.device)
        after = 1 - top.cumsum(-1) + top  # the mass of each token and all after it
        sure = (top * (self.kept - places) > after).int().cumprod(-1).sum(-1, keepdim=True)
        sure = sure.clamp(max=self.kept - 1) if self.kept < self.vocabulary else torch.full_like(sure, self.kept)
        precise = torch.float32 if p.device.type == "mps" else torch.float64
        sums = p.scatter(-1, tokens, top.where(places >= sure, 0.0)).cumsum(-1, dtype=precise)
        step = sums[:, -1:] / (self.kept - sure).clamp(min=1)
        points = (places - sure + start[:, None].to(precise)).clamp(min=0) * step
        drawn = torch.searchsorted(sums, points, right=True).clamp(max=self.vocabulary - 1)
        first = places < sure
        return SparseTargets(tokens.where(first, drawn), top.where(first, step.to(top.dtype)), entropy, "samples")

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
        """Return targets as records of 16-bit numbers: tokens, logarithms of weights, `extra` as float32."""
        tokens = targets.tokens
        ids = (tokens - _SHIFT).to(torch.int16) if self._short else tokens.to(torch.int32).view(torch.int16)
        logs = (targets.weights.log() * -_STEPS).round().clamp(0, _NONE)
        extra = targets.extra.float().contiguous()[:, None].view(torch.int16)
        return torch.cat([ids, (logs - _SHIFT).to(torch.int16), extra], -1)

    def unpack(self, records: Int[Tensor, "N R"]) -> SparseTargets:
        """Return the targets that records hold. The rounded weights are scaled to their right sum."""
        size = self.width - 2 - self.kept
        ids, logs, extra = records[:, :size], records[:, size:-2], records[:, -2:]
        tokens = ids.long() + _SHIFT if self._short else ids.contiguous().view(torch.int32).long()
        steps = logs.to(torch.int32) + _SHIFT
        weights = (steps.float() / -_STEPS).exp().masked_fill(steps == _NONE, 0.0)
        last = extra.contiguous().view(torch.float32)[:, 0]
        mass = 1 - last if self.kind == "top" else torch.ones_like(last)
        weights = weights * (mass / weights.sum(-1).clamp(min=math.exp(-32)))[:, None]
        return SparseTargets(tokens, weights, last, self.kind)


def _random(ids: Int[Tensor, "B S"], length: int) -> Float[Tensor, "B T"]:
    """Return a uniform random number for each position, which the tokens of its block determine."""
    seeds = [zlib.crc32(row.tobytes()) for row in ids.cpu().numpy()]
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
