"""Texts that a model writes itself: where they begin, and which random numbers decide about them.

A text depends on the model, the seed and its own number alone: not on the texts that are decoded beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinygpt2.data.dataset import Blocks
from tinygpt2.decoding.library import Decoder
from tinygpt2.decoding.loop import Decoded, decode
from tinygpt2.decoding.sampling import Sampling
from tinygpt2.utils.progress import say


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
    def fitting(cls, prompt: tuple[int, int] | None, new: int | None, room: int, *, pairs: bool) -> Lengths:
        """Return the lengths of texts of at most `room` tokens, at least 2. What has to be shortened is said.

        Args:
            prompt: fewest and most tokens of a prompt. None takes beginnings of up to an eighth of the room, and of 64
                tokens, because the fewer tokens are left to sample, the less is learned from a text; or the prompts of
                pairs, which may take half of the room.
            new: most tokens after it; None takes what a prompt leaves.
            pairs: whether the prompts are those of pairs.
        """
        if prompt is None:
            longest = max(1, room // 2 if pairs else min(64, room // 8))
            prompt = max(1, longest // 4), longest
        least, most = prompt
        fits = most + (new or 1) <= room
        longest = most if fits else max(1, min(most, max(room - (new or room), room // 2)))
        found = cls(min(least, longest), longest, room - longest if new is None else min(new, room - longest))
        if not fits:
            say(
                f"texts have room for {room} tokens: prompts of {found.least} to {found.most} tokens and {found.new} "
                f"new ones, instead of {least} to {most}" + ("" if new is None else f" and {new}")
            )
        return found

    def prompt(self, blocks: Blocks, index: int, seed: int, number: int) -> list[int]:
        """Return what a text begins with: the beginning of a block, or the prompt of one of its pairs.

        Args:
            blocks: if they are labelled, a prompt is what stands before the first target of a document: its last `most`
                tokens.
            index: the number of the block.
            number: of the prompt. With the seed it decides how long a beginning is, or which pair is taken. At least
                one token remains after a beginning.
        """
        row, random = blocks.row(index), np.random.default_rng((seed, number))
        if blocks.labelled and (spans := _before_targets(blocks, index)):
            begin, end = spans[int(random.integers(len(spans)))]
            return [int(token) for token in row[max(begin, end - self.most) : end]]
        length = int(random.integers(self.least, self.most + 1))
        return [int(token) for token in row[: max(1, min(length, len(row) - 1))]]


def _before_targets(blocks: Blocks, index: int) -> list[tuple[int, int]]:
    """Return where the prompts stand: the tokens before the first target of each document in a block.

    The first token of a document is never a target, so that one alone is no prompt.
    """
    batch = blocks.batch([index])
    assert batch.counted is not None
    lengths = batch.documents[0] if batch.documents else [blocks.sequence_length]
    spans, start = list[tuple[int, int]](), 0
    for length in lengths:
        places = np.flatnonzero(batch.counted[0, start : start + length])
        if len(places) and places[0] > 1:
            spans.append((start, start + int(places[0])))
        start += length
    return spans


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
    log_probs: bool = False,
) -> Decoded:
    """Continue B prompts side by side with sampled tokens.

    Args:
        prompts: token ids, at least one each.
        numbers: of the texts; with the seed they decide what is sampled.
        new: most tokens to add; with the longest prompt no more than the model's positions.
        ends: the tokens that end a text.
        name: what error messages call the model.
        log_probs: return the log-probabilities of the sampled tokens, too.

    Raises:
        ModelError: the model's logits are NaN or infinite.
    """
    width = max(map(len, prompts))
    filled = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    randomness = random_numbers(seed, numbers, new).to(decoder.device)
    return decode(
        decoder, filled, lengths, max_new_tokens=new, ends=ends, sampling=sampling, generator=randomness, name=name,
        log_probs=log_probs,
    )  # fmt: skip


def random_numbers(seed: int, numbers: Sequence[int], count: int) -> Tensor:
    """Return `count` numbers from 0 to below 1 for each text: (B, count), float32."""
    rows = [np.random.default_rng((seed, number, 1)).random(count, np.float32) for number in numbers]
    return torch.from_numpy(np.stack(rows))
