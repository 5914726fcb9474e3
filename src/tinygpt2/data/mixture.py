"""Several datasets as one: all of their blocks, or a mixture in given shares."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from tinygpt2.config.training import dataset_shares
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.dataset import Blocks, PackedDataset, content_of, load_packed_dataset
from tinygpt2.errors import ConfigError, DataError

_MOST_TURNS = 100_000  # blocks after which the order of the datasets repeats


class MixedOrder:
    """The endless order of the training blocks of a mixture.

    After any number of blocks, each dataset has given its share of them, to within one block. Each dataset's own blocks
    come in its own seeded shuffle. The block at any position can be computed directly, as with `Shuffle`.

    With the shares 3/5 and 2/5 the datasets A and B take turns like this, again and again: A B A A B.

    Args:
        counts: the number of blocks in each dataset.
        shares: the share of each dataset. They need not add up to 1.
        seed: of the shuffles.
    """

    def __init__(self, counts: list[int], shares: list[Fraction], seed: int) -> None:
        self._turns = _whole_numbers(shares)
        self._pattern = list(_in_turn(self._turns))
        self._shuffles = [Shuffle(count, seed) for count in counts]
        self._starts = np.cumsum([0, *counts[:-1]]).tolist()

    def __getitem__(self, span: slice) -> list[int]:
        return [self._at(position) for position in range(span.start, span.stop)]

    def counts(self, blocks: int) -> list[int]:
        """Return how many of the first blocks are of each dataset."""
        cycles, rest = divmod(blocks, len(self._pattern))
        begun = [number for number, _ in self._pattern[:rest]]
        return [cycles * turns + begun.count(number) for number, turns in enumerate(self._turns)]

    def _at(self, position: int) -> int:
        cycle, slot = divmod(position, len(self._pattern))
        number, turn = self._pattern[slot]
        taken = cycle * self._turns[number] + turn  # blocks that this dataset has given before
        return int(self._starts[number] + self._shuffles[number][taken : taken + 1][0])


def _in_turn(turns: list[int]) -> Iterator[tuple[int, int]]:
    """Yield whose turn it is, and which of its turns, such that nobody is ever a whole turn before or behind its share.

    Of those that may have their next turn already, the one comes that must have it first (Tijdeman 1980, The chairman
    assignment problem).
    """
    given, total = [0] * len(turns), sum(turns)
    for place in range(1, total + 1):
        may = (number for number, count in enumerate(turns) if given[number] * total < place * count)
        number = min(may, key=lambda one: (given[one] + 1) / turns[one])
        yield number, given[number]
        given[number] += 1


def _whole_numbers(shares: list[Fraction]) -> list[int]:
    """Return the smallest whole numbers in the same proportion as the shares.

    Raises:
        ConfigError: they are too large: the shares have too many digits.
    """
    scale = math.lcm(*(share.denominator for share in shares))
    numbers = [int(share * scale) for share in shares]
    turns = [number // math.gcd(*numbers) for number in numbers]
    if sum(turns) > _MOST_TURNS:
        raise ConfigError("--data: the shares have too many digits", "round them, for example to 0.67 and 0.33")
    return turns


def training_order(data: PackedDataset, seed: int) -> Shuffle | MixedOrder:
    """Return the order in which a run trains on the blocks of a dataset."""
    if not data.shares:
        return Shuffle(len(data.train), seed)
    return MixedOrder([len(member.train) for member in data.members], list(data.shares), seed)


def load_datasets(names: str | list[str]) -> PackedDataset:
    """Open one pregenerated dataset, or several as one.

    Args:
        names: directories. With a share after each (`DIR:0.7`), training takes blocks in these proportions; without,
            every block once in each pass.

    Raises:
        DataError: a dataset cannot be opened, has no training blocks, or the datasets have different tokenizers or
            block lengths.
    """
    shares = dataset_shares(names)
    members = [load_packed_dataset(name) for name in shares]
    if len(members) == 1:
        return members[0]
    first, length = members[0], members[0].sequence_length
    for member in members:
        if member.manifest["tokenizer_fingerprint"] != first.manifest["tokenizer_fingerprint"]:
            raise DataError(
                f"{first.name} and {member.name} were made with different tokenizers", "pregenerate both with one"
            )
        if member.sequence_length != length:
            raise DataError(
                f"the blocks of {first.name} have {length} tokens, those of {member.name} {member.sequence_length}",
                f"pregenerate both with --sequence-length {length}",
            )
        if not len(member.train):
            raise DataError(f"the training split of {member.name} is empty")
    train, test = (
        Blocks([part for member in members for part in getattr(member, split).parts], length)
        for split in ("train", "test")
    )
    given = tuple(share for share in shares.values() if share is not None)
    manifest = {
        **first.manifest,
        "sources": [source for member in members for source in member.manifest["sources"]],
        "hub_datasets": [name for member in members for name in member.manifest.get("hub_datasets", [])],
        "content": _content([member.content for member in members], list(shares.values())),
    }
    name = " and ".join(names if isinstance(names, list) else [names])
    return PackedDataset(name, train, test, manifest, first.made_with, tuple(members), given)


def content_of_datasets(names: str | list[str]) -> str:
    """Return the fingerprint of what `load_datasets` would open, from the manifests alone."""
    shares = dataset_shares(names)
    contents = [content_of(Path(name)) for name in shares]
    return contents[0] if len(contents) == 1 else _content(contents, list(shares.values()))


def _content(contents: list[str], shares: list[Fraction | None]) -> str:
    return hashlib.sha256(json.dumps([contents, [str(share) for share in shares]]).encode()).hexdigest()
