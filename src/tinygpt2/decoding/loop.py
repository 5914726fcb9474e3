"""The loop that decodes: a batch of prompts of any lengths in, the tokens that follow them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinygpt2.decoding.library import Decoder, require_finite
from tinygpt2.decoding.sampling import Randomness, Sampling, drawn
from tinygpt2.errors import ConfigError


@dataclass(frozen=True)
class Decoded:
    """The tokens that follow B prompts.

    Attributes:
        tokens: (B, N), int64; what follows a text's end is 0.
        lengths: (B,), the number of tokens that were added to each prompt, with its end-of-text token.
        ended: (B,), whether each text ended with an end-of-text token.
        log_probs: (B, N), float32, the model's log-probability of each token at temperature 1, if it was asked for.
    """

    tokens: Tensor
    lengths: Tensor
    ended: Tensor
    log_probs: Tensor | None = None


def decode(
    decoder: Decoder,
    prompts: Tensor,
    lengths: Tensor | None = None,
    *,
    max_new_tokens: int,
    ends: Sequence[int] = (),
    sampling: Sampling | None = None,
    generator: Randomness = None,
    on_tokens: Callable[[list[int]], None] | None = None,
    name: str = "the model",
    log_probs: bool = False,
) -> Decoded:
    """Continue every prompt, until each text has ended or has `max_new_tokens` more tokens.

    The batch is decoded side by side, and the prompts are read in one pass. No weights are copied, and the tokens that
    are returned may be inputs of a training step.

    Args:
        decoder: see `make_decoder`.
        prompts: (B, P), int64; a shorter prompt is followed by any tokens.
        lengths: (B,), the tokens of each prompt, at least 1; by default all have P.
        ends: the tokens that end a text.
        sampling: how tokens are sampled; None takes the likeliest ones.
        generator: its random numbers decide, on the device of the decoder; None takes torch's own. On a CPU, a
            generator with a seed gives the tokens that `transformers` samples after torch.manual_seed with that seed.
            Numbers from 0 to below 1, (B, max_new_tokens), decide instead: then no text depends on those beside it.
        on_tokens: called with the next token of each text.
        name: what error messages call the model.
        log_probs: return the log-probabilities of the tokens, too.

    Raises:
        ConfigError: the longest prompt and the new tokens exceed the model's positions.
        ModelError: the model's logits are NaN or infinite.
    """
    rows, width = prompts.shape
    if width + max_new_tokens > decoder.positions:
        raise ConfigError(
            f"{name} has {decoder.positions} positions: {width} prompt tokens leave no room for {max_new_tokens} more"
        )
    steps, likely = list[list[int]](), list[Tensor]()
    open_rows, added = set(range(rows)), [max_new_tokens] * rows
    with torch.inference_mode():
        given, pads = _filled_up_before(prompts.to(decoder.device), lengths)
        cache = decoder.cache(rows, width + max_new_tokens, pads)
        while len(steps) < max_new_tokens and open_rows:
            now = generator[:, len(steps)] if isinstance(generator, Tensor) else generator
            logits = decoder.read(cache, given)
            chosen = next_tokens(logits, sampling, now, name)
            if log_probs:
                likely.append(logits.float().log_softmax(-1).gather(1, chosen[:, None])[:, 0])
            steps.append(chosen.tolist())
            if on_tokens is not None:
                on_tokens(steps[-1])
            for row in [row for row in open_rows if steps[-1][row] in ends]:
                open_rows.remove(row)
                added[row] = len(steps)
            given = chosen[:, None]
    ended = [row not in open_rows for row in range(rows)]
    return _decoded(steps, added, ended, likely, decoder.device)


def _decoded(
    steps: list[list[int]], added: list[int], ended: list[bool], likely: list[Tensor], device: torch.device
) -> Decoded:
    """Return the result from the tokens, and maybe their log-probabilities, of each step."""
    tokens = torch.tensor(steps, device=device).reshape(len(steps), len(added)).T
    counts = torch.tensor(added, device=device)
    past = torch.arange(len(steps), device=device) >= counts[:, None]
    log_probs = torch.stack(likely, 1) if likely else None
    return Decoded(tokens.masked_fill(past, 0), counts, torch.tensor(ended, device=device), log_probs)


def next_tokens(logits: Tensor, sampling: Sampling | None, randomness: Randomness, name: str) -> Tensor:
    """Choose the next token of each text: (B,) from logits (B, V).

    Raises:
        ModelError: the logits are NaN or infinite.
    """
    likeliest = logits.max(-1)
    require_finite(likeliest.values, name)
    return likeliest.indices if sampling is None else drawn(sampling.probabilities(logits), randomness)


def _filled_up_before(prompts: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Move what fills up short prompts before them, so that every text grows in the same column.

    Returns:
        The prompts, and how many tokens before each only fill it up; None if there are none.
    """
    width = prompts.shape[1]
    if lengths is None or bool((lengths == width).all()):
        return prompts, None
    pads = width - lengths.to(prompts.device)
    columns = torch.arange(width, device=prompts.device)
    return prompts.gather(1, (columns - pads[:, None]) % width), pads
