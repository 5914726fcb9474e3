"""Sampled texts that are used again, and the share of the sequences that are sampled.

Sources: DistiLLM, arXiv:2402.03898, section 3.2, and its code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinygpt2.config.decoding import ReplaySchedule

_RISE = 0.1  # nats above the mark at which the held-out loss counts as risen


class Text(NamedTuple):
    """A prompt, what was sampled after it, and whether the last token ends the text."""

    prompt: list[int]
    added: list[int]
    ended: bool


class Replay:
    """The last texts that were sampled, of all processes: each process keeps the same ones.

    Args:
        capacity: number of texts.
        width: most tokens of a text.
        schedule: how the share of sampled text that is sampled anew changes over the run.
        seed: with a text's number it decides whether an old one stands for it, and which.

    Attributes:
        tensors: the texts, which checkpoints keep.
    """

    def __init__(self, capacity: int, width: int, schedule: ReplaySchedule, seed: int) -> None:
        self._capacity, self._schedule, self._seed = capacity, schedule, seed
        self.tensors: dict[str, Tensor] = {
            "ids": torch.zeros(capacity, width, dtype=torch.int32),
            "borders": torch.zeros(capacity, 3, dtype=torch.int32),
            "added": torch.zeros(1, dtype=torch.int64),
        }

    def chosen(self, number: int, done: float) -> Text | None:
        """Return the old text that stands for text number `number`; None if that is to be sampled anew.

        Until there are as many texts as are kept, all are sampled.

        Args:
            done: the share of the run that is done.
        """
        if not self._capacity or int(self.tensors["added"]) < self._capacity:
            return None
        random = np.random.default_rng((self._seed, number, 2))
        anew = {"constant": 0.5, "rising": done, "falling": 1 - done}[self._schedule]
        if random.random() < anew:
            return None
        at = int(random.integers(self._capacity))
        begin, end, ended = self.tensors["borders"][at].tolist()
        ids = self.tensors["ids"][at, :end].tolist()
        return Text(ids[:begin], ids[begin:], bool(ended))

    def forget(self) -> None:
        """Keep no text."""
        self.tensors["added"].zero_()

    def add(self, texts: Iterable[Text]) -> None:
        """Keep texts in the place of the oldest ones."""
        for text in texts:
            at = int(self.tensors["added"]) % self._capacity
            ids = [*text.prompt, *text.added]
            self.tensors["ids"][at, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            self.tensors["borders"][at] = torch.tensor([len(text.prompt), len(ids), text.ended], dtype=torch.int32)
            self.tensors["added"] += 1


def grown(share: float, mark: float | None, loss: float, growth: float) -> tuple[float, float]:
    """Return the share of sampled text after an evaluation, and the loss with which to compare the next one.

    The share grows whenever the held-out loss has risen above the mark, which is the loss at the last growth.

    Args:
        mark: None before the first evaluation.
    """
    if mark is None:
        return share, loss
    return (min(1.0, share + growth), loss) if loss > mark + _RISE else (share, mark)
