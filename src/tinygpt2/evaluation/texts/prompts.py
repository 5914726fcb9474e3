"""Held-out prompts, each with what follows it in the data."""

from __future__ import annotations

from typing import NamedTuple

from tinygpt2.data.dataset import Blocks, PackedDataset
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.utils.progress import say


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        tokens: its tokens.
        following: the true continuation: of a pair the response with its end, of a text the next tokens to its end.
    """

    tokens: list[int]
    following: list[int]


def held_out_prompts(data: PackedDataset, count: int, length: int, new: int, positions: int) -> list[Prompt]:
    """Return up to `count` prompts of the test split, evenly spaced.

    Args:
        length: tokens of a prompt, if the data are texts; those of pairs have their own lengths.
        new: most tokens of a continuation.
        positions: the most tokens of prompt and continuation; long prompts of pairs are cut at their beginnings.

    Raises:
        ConfigError: prompts of that length leave no token to continue with.
        DataError: the test split is empty, or none of its blocks goes on after a prompt.
    """
    if not len(data.test):
        raise DataError(f"the test split of {data.name} is empty", "hold out some texts (--test-fraction)")
    if data.test.divided:
        every = [pair for index in range(len(data.test)) for pair in _pairs(data.test, index)]
        chosen = [every[index * len(every) // count] for index in range(count)] if len(every) > count else every
        return [Prompt(prompt[-(positions - new) :], response[:new]) for prompt, response in chosen]
    if length + new > positions:
        raise ConfigError(f"prompts of {length} tokens and {new} new ones do not fit into {positions} positions")
    if length >= data.sequence_length:
        raise ConfigError(
            f"prompts of {length} tokens leave nothing to compare with: blocks have {data.sequence_length}",
            "give a smaller --prompt-tokens",
        )
    end, found, blocks = data.manifest.get("eos_token_id"), [], data.test.spaced(count)
    for index in range(len(blocks)):
        row = [int(token) for token in blocks.row(index)]
        following = row[length : length + new]
        if end in following:
            following = following[: following.index(end) + 1]
        if following:
            found.append(Prompt(row[:length], following))
    if not found:
        raise DataError(f"no held-out block of {data.name} goes on after {length} tokens", "lower --prompt-tokens")
    return found


def _pairs(blocks: Blocks, index: int) -> list[tuple[list[int], list[int]]]:
    """Return prompt and first response of every pair in a block."""
    batch = blocks.batch([index])
    ids, found = batch.input_ids[0].tolist(), dict[int, tuple[list[int], list[int]]]()
    for begins, first, stop in batch.answers(0):
        if begins < first:
            found.setdefault(begins, (ids[begins:first], ids[first:stop]))
    return list(found.values())


def room_for(new: int, positions: int) -> int:
    """Return how many new tokens there are: half of the positions at most. Fewer than asked for is said."""
    if new <= positions // 2:
        return new
    say(f"{positions} positions: texts have at most {max(1, positions // 2)} new tokens instead of {new}")
    return max(1, positions // 2)
