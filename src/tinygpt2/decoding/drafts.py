"""Speculative decoding: a small model drafts some tokens, and the large one checks them all in one pass.

The text is the large model's own: greedily the same tokens, and sampled from the same distribution. It is faster where
the draft is right often enough, because checking several tokens reads the large model's weights only once.
Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinygpt2.decoding.library import Decoder, Kept
from tinygpt2.decoding.loop import Decoded, next_tokens
from tinygpt2.decoding.sampling import Sampling, drawn


@dataclass(frozen=True)
class Drafting:
    """What drafting one text took.

    Attributes:
        proposed: the tokens that the draft model proposed.
        accepted: those of them that became part of the text.
        seconds: time for the text.
        alone_seconds: the time that the teacher alone would have taken: that of reading the prompt, and for each token
            the median time of some single steps at the end of the text.
    """

    proposed: int
    accepted: int
    seconds: float
    alone_seconds: float


@torch.inference_mode()
def decode_with_draft(
    teacher: Decoder,
    draft: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    ahead: int,
    ends: Sequence[int] = (),
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    on_tokens: Callable[[list[int]], None] | None = None,
    name: str = "the model",
    timed_steps: int = 8,
) -> tuple[Decoded, Drafting]:
    """Continue a prompt as the teacher alone would, with tokens that another model drafts.

    Args:
        teacher: the text is its own; see `make_decoder`.
        draft: a faster model with the same tokens; see `make_decoder`. Beyond its positions, the teacher goes on alone.
        prompt: token ids, at least one; with the new tokens no more than the teacher has positions.
        max_new_tokens: at most this many tokens are added.
        ahead: how many tokens are drafted before the teacher checks them.
        ends: the tokens that end a text.
        sampling: how the teacher's tokens are sampled, and the draft's; None takes the likeliest ones.
        generator: its random numbers decide, on the device of the decoders; None takes torch's own.
        on_tokens: called with each token.
        name: what error messages call the teacher.
        timed_steps: how many single steps of the teacher are timed at the end; with 0, `alone_seconds` is 0.

    Raises:
        ModelError: the teacher's logits are NaN or infinite.
    """
    started = time.perf_counter()
    text, most = list(prompt), len(prompt) + max_new_tokens
    ours, theirs = teacher.cache(1, most), draft.cache(1, most)
    if len(prompt) > 1:
        teacher.read(ours, _row(text[:-1], teacher))
    read_prompt = time.perf_counter() - started
    proposed, accepted, ended = 0, 0, False
    while len(text) < most and not ended:
        count = max(0, min(ahead, most - len(text) - 1, draft.positions - len(text) + 1))
        guesses, sources = _drafted(draft, theirs, text, count, sampling, generator)
        logits = teacher.read(ours, _row(text[ours.length :] + guesses, teacher), every=True)[0]
        added = _checked(logits, guesses, sources, sampling, generator, name)
        proposed += count
        for place, token in enumerate(added):
            text.append(token)
            accepted += place < len(added) - 1  # the last one is the teacher's
            if on_tokens is not None:
                on_tokens([token])
            ended = token in ends
            if ended:
                break
        ours.length, theirs.length = min(ours.length, len(text) - 1), min(theirs.length, len(text) - 1)
    seconds = time.perf_counter() - started
    new, device = text[len(prompt) :], teacher.device
    steps = [_single_step(teacher, ours, text, sampling) for _ in range(timed_steps)]
    alone = read_prompt + len(new) * statistics.median(steps) if steps else 0.0
    decoded = Decoded(*(torch.tensor([value], device=device) for value in (new, len(new), ended)))
    return decoded, Drafting(proposed, accepted, seconds, alone)


def _row(tokens: list[int], decoder: Decoder) -> Tensor:
    return torch.tensor([tokens], device=decoder.device)


def _drafted(
    draft: Decoder,
    cache: Kept,
    text: list[int],
    count: int,
    sampling: Sampling | None,
    generator: torch.Generator | None,
) -> tuple[list[int], list[Tensor]]:
    """Draft `count` tokens after a text. Return them, and the distributions (1, V) that they were sampled from."""
    guesses: list[int] = []
    sources: list[Tensor] = []
    for _ in range(count):
        logits = draft.read(cache, _row((text + guesses)[cache.length :], draft))
        if sampling is None:
            guesses.append(int(logits.argmax()))
        else:
            sources.append(sampling.probabilities(logits))
            guesses.append(int(drawn(sources[-1], generator)))
    return guesses, sources


def _checked(
    logits: Tensor,
    guesses: list[int],
    sources: list[Tensor],
    sampling: Sampling | None,
    generator: torch.Generator | None,
    name: str,
) -> list[int]:
    """Return the first guesses that the teacher accepts, and one token of its own after them.

    Args:
        logits: (G + 1, V), the teacher's: before each guess, and after the last one.
    """
    best = next_tokens(logits, None, None, name).tolist()
    if sampling is None:
        right = next((at for at, (guess, token) in enumerate(zip(guesses, best, strict=False)) if guess != token), None)
        return [*guesses[:right], best[len(guesses) if right is None else right]]
    wanted = sampling.probabilities(logits)
    chances = torch.rand(len(guesses), generator=generator, device=logits.device).tolist()
    for at, (guess, source, chance) in enumerate(zip(guesses, sources, chances, strict=True)):
        if chance * float(source[0, guess]) >= float(wanted[at, guess]):
            rest = (wanted[at : at + 1] - source).clamp_min(0)
            return [*guesses[:at], int(drawn(rest if float(rest.sum()) > 0 else wanted[at : at + 1], generator))]
    return [*guesses, int(drawn(wanted[-1:], generator))]


def _single_step(teacher: Decoder, cache: Kept, text: list[int], sampling: Sampling | None) -> float:
    """Return the seconds of a single step of the teacher at the end of a text."""
    cache.length = len(text) - 2
    started = time.perf_counter()
    logits = teacher.read(cache, _row(text[-2:-1], teacher))
    next_tokens(logits, sampling, torch.Generator(teacher.device), "").tolist()  # the caller's stays as it is
    return time.perf_counter() - started
