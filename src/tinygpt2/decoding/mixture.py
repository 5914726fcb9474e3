"""Two models that write one text: each token comes from a mixture of their distributions.

Source: MiniLLM, arXiv:2306.08543, section 2.2 (teacher-mixed sampling).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tinygpt2.decoding.library import Decoder, Kept


class _Caches:
    """What both decoders keep of the texts that they read."""

    def __init__(self, first: Kept, second: Kept) -> None:
        self.first, self.second = first, second

    @property
    def length(self) -> int:
        """The number of tokens that were read. To forget the last ones, set a smaller number."""
        return self.first.length

    @length.setter
    def length(self, value: int) -> None:
        self.first.length = self.second.length = value


class MixedDecoder:
    """Reads tokens and returns the logs of share * P + (1 - share) * Q, which serve as logits.

    Args:
        first, second: what decodes the models that give P and Q; both read the same tokens.
        share: of the first one, between 0 and 1.

    The attributes and methods are those of `GPT2Decoder`.
    """

    def __init__(self, first: Decoder, second: Decoder, share: float) -> None:
        self._first, self._second, self._logs = first, second, (math.log(share), math.log1p(-share))
        self.positions = min(first.positions, second.positions)
        self.vocabulary = min(first.vocabulary, second.vocabulary)
        self.device = first.device
        self.bytes_per_token = first.bytes_per_token + second.bytes_per_token

    def cache(self, rows: int, columns: int, pads: Tensor | None = None) -> _Caches:
        """See `GPT2Decoder.cache`."""
        return _Caches(self._first.cache(rows, columns, pads), self._second.cache(rows, columns, pads))

    def read(self, cache: _Caches, tokens: Tensor, *, every: bool = False) -> Tensor:
        """See `GPT2Decoder.read`."""
        read = (
            self._first.read(cache.first, tokens, every=every),
            self._second.read(cache.second, tokens, every=every),
        )
        parts = [
            logits[..., : self.vocabulary].float().log_softmax(-1).add_(log)
            for logits, log in zip(read, self._logs, strict=True)
        ]
        return torch.logaddexp(*parts)
