"""One forward pass that returns what the objectives compare: hidden states, queries, keys and values.

It runs GPT-2's own modules one after the other and returns what was asked for, as a function without side
effects: so it can be compiled, checkpointed, and stopped after the last layer that anybody needs. No T x T
matrix exists here (with dropout, torch makes one on a CPU).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

ROWS = 128  # query rows in a block: large enough for fast products, small against T x T


@dataclass
class Activations:
    """What one forward pass returned.

    Attributes:
        states: hidden states by number: 0 the embeddings, i the output of layer i, N the last one (after
            the final layer norm), as `transformers` returns them.
        attention: by layer, counted from 1, its queries, keys and values, side by side.
        scale: by layer, what the products of queries and keys are multiplied by.
    """

    states: dict[int, Float[Tensor, "B T D"]] = field(default_factory=dict)
    attention: dict[int, Float[Tensor, "B T 3*D"]] = field(default_factory=dict)
    scale: dict[int, float] = field(default_factory=dict)


def collect_activations(
    model: GPT2LMHeadModel,
    input_ids: Int[Tensor, "B T"],
    states: Iterable[int] = (),
    attention: Iterable[int] = (),
    *,
    checkpointing: bool = False,
) -> Activations:
    """Run the transformer once, as deep as the deepest number asked for.

    Args:
        input_ids: token ids.
        states: numbers of hidden states, 0 to N.
        attention: numbers of layers, 1 to N.
        checkpointing: keep each layer's input only, and run the layer again in the backward pass.
    """
    transformer = model.transformer
    layers = len(transformer.h)
    wanted_states, wanted_attention = set(states), set(attention)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    hidden = transformer.drop(transformer.wte(input_ids) + transformer.wpe(positions))
    found = Activations()
    if 0 in wanted_states:
        found.states[0] = hidden
    for number in range(1, max(wanted_states | wanted_attention, default=0) + 1):
        block = transformer.h[number - 1]
        if checkpointing and torch.is_grad_enabled():
            hidden, fused = checkpoint(_layer, block, hidden, use_reentrant=False)
        else:
            hidden, fused = _layer(block, hidden)
        if number in wanted_attention:
            found.attention[number] = fused
            found.scale[number] = float(block.attn.scaling)
        if number in wanted_states:
            found.states[number] = transformer.ln_f(hidden) if number == layers else hidden
    return found


def _layer(block: GPT2Block, hidden: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T E"]]:
    """Return a block's output, and its queries, keys and values side by side: E is 3 D unless the stream was cut."""
    mixed, fused = mixed_heads(block, hidden)
    hidden = hidden + block.attn.resid_dropout(block.attn.c_proj(mixed))
    return hidden + block.mlp(block.ln_2(hidden)), fused


def mixed_heads(
    block: GPT2Block, hidden: Float[Tensor, "B T D"]
) -> tuple[Float[Tensor, "B T W"], Float[Tensor, "B T E"]]:
    """Return what a block's heads hold before their output projection, and queries, keys and values (E is 3 W)."""
    attention = block.attn
    fused = attention.c_attn(block.ln_1(hidden))
    query, key, value = (by_head(part, attention.num_heads) for part in fused.chunk(3, dim=-1))
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        mixed = _attend_by_rows(query, key, value, attention.scaling)
    else:
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=attention.attn_dropout.p if attention.training else 0.0,
            is_causal=True,
            scale=attention.scaling,
        )
    return mixed.transpose(1, 2).flatten(2), fused


def _attend_by_rows(
    query: Float[Tensor, "B H T K"], key: Float[Tensor, "B H T K"], value: Float[Tensor, "B H T K"], scale: float
) -> Float[Tensor, "B H T K"]:
    """Causal attention without dropout, a block of query rows at a time.

    For bfloat16 on a CPU this takes about two thirds of the time of torch's own kernel.
    """
    shape, length = query.shape, query.shape[2]
    query, key, value = (x.flatten(0, 1) for x in (query * scale, key, value))  # (B H, T, K)
    mixed = torch.empty_like(query)
    future = query.new_full((ROWS, ROWS), -math.inf).triu(1)
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        # contiguous, and only then transposed: oneDNN would copy a transposed slice element by element
        scores = torch.bmm(query[:, start:stop], key[:, :stop].contiguous().mT)  # (B H, rows, keys)
        scores[:, :, start:] += future[: stop - start, : stop - start]
        mixed[:, start:stop] = torch.bmm(scores.softmax(-1), value[:, :stop])
    return mixed.view(shape)


def by_head(x: Float[Tensor, "B T D"], heads: int) -> Float[Tensor, "B H T K"]:
    """Split the last axis by heads, without a copy."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)
