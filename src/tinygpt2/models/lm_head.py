"""The output matrix: how logits are made in chunks, and losses of given next tokens."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.models.activations import collect_activations


def wide(x: Tensor) -> torch.dtype:
    """Return the type for sums and softmaxes: float32, or float64 where the numbers are."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def default_chunk(vocabulary: int, device: str) -> int:
    """Return how many tokens' logits to hold at a time: 2**25 of them on a CPU, 2**28 on a GPU."""
    return max(64, (2**25 if device == "cpu" else 2**28) // vocabulary)


def rows_at_once(vocabulary: int, device: str) -> int:
    """Return how many rows of logits to work on element-wise at a time: 2 MiB of float32 on a CPU, 256 on a GPU."""
    return max(1, (2**19 if device == "cpu" else 2**26) // vocabulary)


def head_operand(head: Float[Tensor, "V D"]) -> Float[Tensor, "V D"]:
    """Return the output matrix as its products take it: in autocast's type, and centred if that is a short one.

    GPT-2's logits share a large offset, about -100, which a softmax ignores and bfloat16 would round to
    halves. Without the matrix' mean row it is gone; neither the losses nor their gradients change by it.
    """
    device = head.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
    if dtype.itemsize >= 4:
        return head.to(dtype)
    return (head - head.mean(0, dtype=torch.float32)).to(dtype)


@torch.no_grad()
def target_losses(
    model: GPT2LMHeadModel,
    head: Float[Tensor, "V D"],
    input_ids: Int[Tensor, "B T"],
    wanted: Bool[Tensor, "B P"],
    ruled_out: Bool[Tensor, " V"] | None = None,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, "N 2"] | None]:
    """Return the loss in nats of the wanted next tokens, in float32, row by row.

    Args:
        head: the output matrix, as `head_operand` returns it.
        input_ids: token ids; the last one of a row is only predicted.
        wanted: which of the P = T - 1 positions predict a target, N in all.
        ruled_out: tokens that do not count as predictions in the second column of the hits.

    Returns:
        The losses; and if `ruled_out` is given, whether each target is the likeliest token.
    """
    last = len(model.transformer.h)
    states = collect_activations(model, input_ids[:, :-1], states=[last]).states[last][wanted]
    targets = input_ids[:, 1:][wanted]
    vocabulary, device = len(head), head.device.type
    # a quarter of what training takes: as fast without a backward pass
    chunk, rows = max(1, default_chunk(vocabulary, device) // 4), rows_at_once(vocabulary, device)
    losses = torch.empty(len(targets), dtype=wide(head), device=head.device)
    hits = None if ruled_out is None else torch.empty(len(targets), 2, dtype=torch.bool, device=head.device)
    for start in range(0, len(targets), chunk):
        logits = states[start : start + chunk] @ head.mT
        for inner in range(0, len(logits), rows):
            part = slice(start + inner, min(start + inner + rows, start + len(logits)))
            scores = logits[inner : inner + rows].to(losses.dtype)
            right = targets[part]
            losses[part] = scores.logsumexp(-1) - scores.gather(-1, right[:, None])[:, 0]
            if hits is not None and ruled_out is not None:
                hits[part, 0] = scores.argmax(-1) == right
                hits[part, 1] = scores.masked_fill(ruled_out, -math.inf).argmax(-1) == right
    return losses, hits
