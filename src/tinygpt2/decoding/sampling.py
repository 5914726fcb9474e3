"""How the next token is chosen from a model's logits: the likeliest one, or one that is sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CANDIDATES = 512  # likeliest tokens that usually hold the probability that top-p keeps


_COLD = 1e-3


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling, as `transformers` defines them. They apply in the order of the attributes.

    Attributes:
        temperature: the logits are divided by it.
        top_k: only the K most likely tokens remain (and those as likely as the last of them); 0 keeps all.
        top_p: of the remaining tokens, only the fewest most likely ones whose probabilities reach this sum remain.
            Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
        vocabulary: only the first tokens, so many, are ever drawn: a model may have rows for which there is no token.
            None takes all.

    Raises:
        ValueError: a setting is out of its bounds.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(f"{self}: temperature must be positive, top_k 0 or more, top_p above 0 and at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution to sample from, for each row of logits.

        Args:
            logits: (B, V).

        Returns:
            (B, V), or as many columns as there are tokens to draw, float32.
        """
        scores = logits[:, : self.vocabulary].float()
        if self.temperature < _COLD:  # else all quotients could be infinite
            scores = scores - scores.amax(-1, keepdim=True)
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], -math.inf)
        if self.top_p < 1:
            scores = _nucleus(scores, self.top_p)
        return scores.softmax(-1)


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Rule out all but the fewest most likely tokens whose probabilities reach `top_p` together."""
    probabilities = scores.softmax(-1)
    likely, tokens = probabilities.topk(min(_CANDIDATES, scores.shape[-1]))  # sorting all takes several times as long
    if bool((likely.sum(-1) < top_p).any()):
        likely, tokens = probabilities.sort(descending=True)
    kept = likely.cumsum(-1) - likely < top_p  # what stands before a token does not reach top_p yet
    found = scores.gather(-1, tokens).masked_fill(~kept, -math.inf)
    return torch.full_like(scores, -math.inf).scatter(-1, tokens, found)


Randomness = torch.Generator | Tensor | None
"""What decides when tokens are drawn: a generator, torch's own (None), or a number from 0 to below 1 for each text."""


def drawn(probabilities: Tensor, randomness: Randomness) -> Tensor:
    """Draw one token from each row.

    Args:
        probabilities: (B, V).
        randomness: a generator for all rows, or numbers (B,), with which a row's token depends on its own number alone.

    Returns:
        (B,), int64.
    """
    if not isinstance(randomness, Tensor):
        return torch.multinomial(probabilities, 1, generator=randomness)[:, 0]
    ends = probabilities.cumsum(-1)  # a token has the numbers from its predecessor's end to its own
    total = ends[:, -1]
    wanted = torch.minimum(randomness * total, total.nextafter(torch.zeros_like(total)))  # rounding may reach the total
    return torch.searchsorted(ends, wanted[:, None], right=True)[:, 0]
