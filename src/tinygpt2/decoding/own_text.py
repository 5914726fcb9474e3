"""Texts that a model writes itself: where they begin, and which random numbers decide about them.

A text depends on the model, the seed and its own number alone: not on the texts that are decoded beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinygpt2.decoding.library import Decoder
from tinygpt2.decoding.loop import Decoded, decode
from tinygpt2.decoding.sampling import Sampling
from tinygpt2.utils.progress import say
from tinygpt2.utils.types import Tokens


class Lengths(NamedTuple):
    """How long prompts are, and how many tokens follow them.

    Attributes:
        least, most: tokens of a prompt.
        new: most tokens after it.
    """

    least: int
    most: int
    new: int

    @classmethod
    def fitting(cls, prompt: tuple[int, int], new: int | None, room: int) -> Lengths:
        """Return the lengths of texts of at most `room` tokens, at least 2. What has to be shortened is said.

        Args:
            prompt: fewest and most tokens of a prompt.
            new: most tokens after it; None takes what a prompt leaves.
        """
        least, most = prompt
        fits = most + (new or 1) <= room
        longest = most if fits else max(1, min(most, max(room - (new or room), room // 2)))
        found = cls(min(least, longest), longest, room - longest if new is None else min(new, room - longest))
        if not fits:
            say(
                f"{room} tokens are a text's most: prompts of {found.least} to {found.most} tokens, and {found.new} "
                f"after them, instead of {least} to {most}" + ("" if new is None else f" and {new}")
            )
        return found

    def beginning(self, row: Tokens, seed: int, number: int) -> list[int]:
        """Return the beginning of a block as prompt number `number`. One token always remains after it, if it can."""
        length = int(np.random.default_rng((seed, number)).integers(self.least, self.most + 1))
        return [int(token) for token in row[: max(1, min(length, len(row) - 1))]]


def continued(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    seed: int,
    new: int,
    ends: Sequence[int],
    sampling: Sampling,
    name: str = "the model",
) -> Decoded:
    """Continue B prompts side by side with sampled tokens.

    Args:
        prompts: token ids, at least one each.
        numbers: of the texts; with the seed they decide what is sampled.
        new: most tokens to add; with the longest prompt no more than the model's positions.
        ends: the tokens that end a text.
        name: what error messages call the model.

    Raises:
        ModelError: the model's logits are NaN or infinite.
    """
    width = max(map(len, prompts))
    filled = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    randomness = random_numbers(seed, numbers, new).to(decoder.device)
    return decode(
        decoder, filled, lengths, max_new_tokens=new, ends=ends, sampling=sampling, generator=randomness, name=name
    )


def random_numbers(seed: int, numbers: Sequence[int], count: int) -> Tensor:
    """Return `count` numbers from 0 to below 1 for each text: (B, count), float32."""
    rows = [np.random.default_rng((seed, number, 1)).random(count, np.float32) for number in numbers]
    return torch.from_numpy(np.stack(rows))
