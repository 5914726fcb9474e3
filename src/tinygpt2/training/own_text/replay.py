"""Sampled texts that are used again, and the share of the sequences that are sampled.

Sources: DistiLLM, arXiv:2402.03898, section 3.2, and its code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinygpt2.config.decoding import ReplaySchedule

_RISE = 0.1  # nats above the mark at which the held-out loss counts as risen


class Text(NamedTuple):
    """A prompt, what was sampled after it, and whether the last token ends the text.

    Attributes:
        drawn: the log-probability with which each of the sampled tokens was drawn, if the loss needs it.
    """

    prompt: list[int]
    added: list[int]
    ended: bool
    drawn: Sequence[float] = ()


class Table:
    """Texts by number, in tensors that checkpoints keep.

    Args:
        tensors: gets the table's tensors, if it does not hold them already.
        name: what their names begin with.
        rows: number of texts.
        width: most tokens of a text.
        drawn: keep the log-probabilities of the tokens, too.
    """

    def __init__(self, tensors: dict[str, Tensor], name: str, rows: int, width: int, *, drawn: bool) -> None:
        self._tensors, self._name = tensors, name
        tensors.setdefault(f"{name}ids", torch.zeros(rows, width, dtype=torch.int32))
        tensors.setdefault(f"{name}borders", torch.zeros(rows, 3, dtype=torch.int32))
        if drawn:
            tensors.setdefault(f"{name}drawn", torch.zeros(rows, width, dtype=torch.float32))

    def __getitem__(self, number: int) -> Text | None:
        """Return a text; None if there is none with this number."""
        begin, end, ended = self._part("borders")[number].tolist()
        if not end:
            return None
        ids, drawn = self._part("ids")[number, :end].tolist(), self._tensors.get(f"{self._name}drawn")
        known = () if drawn is None else drawn[number, begin:end].tolist()
        return Text(ids[:begin], ids[begin:], bool(ended), known)

    def __setitem__(self, number: int, text: Text) -> None:
        """Keep a text, in the place of what was there."""
        ids, begin = [*text.prompt, *text.added], len(text.prompt)
        self._part("ids")[number, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        self._part("borders")[number] = torch.tensor([begin, len(ids), text.ended], dtype=torch.int32)
        if text.drawn:
            self._part("drawn")[number, begin : len(ids)] = torch.tensor(text.drawn)

    def clear(self) -> None:
        """Remove all texts."""
        self._part("borders").zero_()

    def __len__(self) -> int:
        """Return the number of rows, with and without texts."""
        return len(self._part("borders"))

    def _part(self, name: str) -> Tensor:
        return self._tensors[f"{self._name}{name}"]


class Replay:
    """The last texts that were sampled, of all processes: each process keeps the same ones.

    Args:
        capacity: number of texts.
        width: most tokens of a text.
        schedule: how the share of sampled text that is sampled anew changes over the run.
        seed: with a text's number it decides whether an old one stands for it, and which.
        drawn: see `Table`.

    Attributes:
        tensors: the texts, which checkpoints keep.
    """

    def __init__(self, capacity: int, width: int, schedule: ReplaySchedule, seed: int, *, drawn: bool = False) -> None:
        self._capacity, self._width, self._schedule, self._seed = capacity, width, schedule, seed
        self._drawn = drawn
        self.tensors: dict[str, Tensor] = {}
        if capacity:
            self.tensors["added"] = torch.zeros(1, dtype=torch.int64)
            self._table = Table(self.tensors, "", capacity, width, drawn=drawn)

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
        return None if random.random() < anew else self._table[int(random.integers(self._capacity))]

    def add(self, texts: Iterable[Text]) -> None:
        """Keep texts in the place of the oldest ones."""
        for text in texts if self._capacity else ():
            self._table[int(self.tensors["added"]) % self._capacity] = text
            self.tensors["added"] += 1

    def hold(self, texts: dict[int, Text], sequences: int) -> None:
        """Keep the texts of a step for the next ones.

        Args:
            texts: by their places in the global batch.
            sequences: in a global batch.
        """
        table = self._of_step(sequences)
        table.clear()
        for place, text in texts.items():
            table[place] = text

    def held(self, sequences: int) -> dict[int, Text]:
        """Return the texts that were kept for this step."""
        table = self._of_step(sequences)
        return {place: text for place in range(len(table)) if (text := table[place]) is not None}

    def _of_step(self, sequences: int) -> Table:
        """Return the table of a step's texts, which a checkpoint may have filled already."""
        return Table(self.tensors, "step/", sequences, self._width, drawn=self._drawn)

    def forget(self) -> None:
        """Keep no text."""
        for name in self.tensors.keys() & {"added", "borders", "step/borders"}:
            self.tensors[name].zero_()


def grown(share: float, mark: float | None, loss: float, growth: float) -> tuple[float, float]:
    """Return the share of sampled text after an evaluation, and the loss with which to compare the next one.

    The share grows whenever the held-out loss has risen above the mark, which is the loss at the last growth.

    Args:
        mark: None before the first evaluation.
    """
    if mark is None:
        return share, loss
    return (min(1.0, share + growth), loss) if loss > mark + _RISE else (share, mark)
