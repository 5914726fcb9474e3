"""Run a forward pass that returns what the objectives compare: hidden states, queries, keys and values.

The pass runs GPT-2's own modules one after the other. It has no side effects, so it can be compiled and checkpointed,
and it stops after the deepest layer that the caller asks for. It never holds a T x T matrix, except with dropout on a
CPU, where torch makes one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from tinygpt2.models.documents import Documents

ROWS = 128  # query rows handled at a time: enough for fast matrix products, and few compared with T


@dataclass
class Activations:
    """The values that one forward pass returned.

    Attributes:
        states: hidden states by number, as `transformers` numbers them: 0 is the embeddings, i the output of layer i,
            and N (the last one) the output of the final layer norm. A cache of predictions has records in its place.
        attention: the queries, keys and values of each layer, concatenated. Layers are counted from 1.
        scale: the factor by which each layer multiplies the products of queries and keys.
    """

    states: dict[int, Shaped[Tensor, "B T D"]] = field(default_factory=dict)
    attention: dict[int, Float[Tensor, "B T 3*D"]] = field(default_factory=dict)
    scale: dict[int, float] = field(default_factory=dict)

    @property
    def length(self) -> int | None:
        """The number of positions, T; None if there are no values."""
        return next((values.shape[1] for values in (*self.states.values(), *self.attention.values())), None)

    def cut(self, length: int) -> Activations:
        """Return the values of the first positions."""
        states = {number: state[:, :length] for number, state in self.states.items()}
        return Activations(states, {n: fused[:, :length] for n, fused in self.attention.items()}, self.scale)


def collect_activations(
    model: GPT2LMHeadModel,
    input_ids: Int[Tensor, "B T"],
    states: Iterable[int] = (),
    attention: Iterable[int] = (),
    *,
    checkpointing: bool = False,
    positions: Int[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B 1 T T"] | None = None,
    documents: Documents | None = None,
) -> Activations:
    """Run the transformer once, up to the deepest layer or hidden state that is asked for.

    Args:
        input_ids: token ids.
        states: numbers of the hidden states to return, 0 to N.
        attention: numbers of the layers whose queries, keys and values to return, 1 to N.
        checkpointing: keep only each layer's input, and run the layer again in the backward pass.
        positions: the position of each token; None counts them through.
        mask: which tokens each token sees; None lets it see itself and those before it.
        documents: where documents begin, whose tokens see no other documents and count positions from 0.
    """
    transformer = model.transformer
    layers = len(transformer.h)
    wanted_states, wanted_attention = set(states), set(attention)
    if documents is not None:
        positions = documents.positions
    if positions is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    hidden = transformer.drop(transformer.wte(input_ids) + transformer.wpe(positions))
    found = Activations()
    if 0 in wanted_states:
        found.states[0] = hidden
    for number in range(1, max(wanted_states | wanted_attention, default=0) + 1):
        block = transformer.h[number - 1]
        if checkpointing and torch.is_grad_enabled():
            hidden, fused = checkpoint(_layer, block, hidden, mask, documents, use_reentrant=False)
        else:
            hidden, fused = _layer(block, hidden, mask, documents)
        if number in wanted_attention:
            found.attention[number] = fused
            found.scale[number] = float(block.attn.scaling)
        if number in wanted_states:
            found.states[number] = transformer.ln_f(hidden) if number == layers else hidden
    return found


def _layer(
    block: GPT2Block,
    hidden: Float[Tensor, "B T D"],
    mask: Bool[Tensor, "B 1 T T"] | None,
    documents: Documents | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T E"]]:
    """Return a block's output, and its queries, keys and values concatenated.

    E is 3 D, except in a model whose residual stream was narrowed.
    """
    mixed, fused = mixed_heads(block, hidden, mask, documents)
    hidden = hidden + block.attn.resid_dropout(block.attn.c_proj(mixed))
    return hidden + block.mlp(block.ln_2(hidden)), fused


def mixed_heads(
    block: GPT2Block,
    hidden: Float[Tensor, "B T D"],
    mask: Bool[Tensor, "B 1 T T"] | None = None,
    documents: Documents | None = None,
) -> tuple[Float[Tensor, "B T W"], Float[Tensor, "B T E"]]:
    """Return the outputs of a block's heads before their projection, and its queries, keys and values (E is 3 W)."""
    attention = block.attn
    fused = attention.c_attn(block.ln_1(hidden))
    query, key, value = (by_head(part, attention.num_heads) for part in fused.chunk(3, dim=-1))
    by_rows = _attends_by_rows(query.device.type, query.dtype, gradients=torch.is_grad_enabled())
    if mask is None and documents is None and by_rows:
        mixed = _attend_by_rows(query, key, value, attention.scaling)
    else:
        width, dropout = query.shape[-1], attention.attn_dropout.p if attention.training else 0.0
        padding = kernel_width(width, query.device.type) - width
        if padding:  # zeros change no product, and the scale is given
            query, key, value = (F.pad(x, (0, padding)) for x in (query, key, value))
        if documents is not None:
            mixed = documents.attend(query, key, value, attention.scaling, dropout)[..., :width]
        else:
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=attention.scaling,
            )[..., :width]
    return mixed.transpose(1, 2).flatten(2), fused


def kernel_width(width: int, device: str) -> int:
    """Return to which width heads are padded for the attention kernel.

    CUDA's kernels without T x T matrices need a multiple of 4 in float32 and of 8 in 16 bits; for another width, torch
    would choose one that makes such matrices. GPT-2's own heads have a width of 64.
    """
    return 8 * math.ceil(width / 8) if device == "cuda" else width


def _attends_by_rows(device: str, dtype: torch.dtype, *, gradients: bool) -> bool:
    return device == "cpu" and dtype == torch.bfloat16 and not gradients


def attention_kernel(device: str, dtype: torch.dtype, *, gradients: bool) -> str:
    """Return the name of the kernel that computes attention."""
    if _attends_by_rows(device, dtype, gradients=gradients):
        return f"our own, {ROWS} query rows at a time"
    return "torch's scaled_dot_product_attention"


def _attend_by_rows(
    query: Float[Tensor, "B H T K"], key: Float[Tensor, "B H T K"], value: Float[Tensor, "B H T K"], scale: float
) -> Float[Tensor, "B H T K"]:
    """Return causal attention without dropout, computed for `ROWS` query rows at a time.

    For bfloat16 on a CPU this takes about two thirds of the time of torch's own kernel.
    """
    shape, length = query.shape, query.shape[2]
    query, key, value = (x.flatten(0, 1) for x in (query * scale, key, value))  # (B H, T, K)
    mixed = torch.empty_like(query)
    future = query.new_full((ROWS, ROWS), -math.inf).triu(1)
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        # Make the slice contiguous before transposing it: oneDNN would copy a transposed slice element by element.
        scores = torch.bmm(query[:, start:stop], key[:, :stop].contiguous().mT)  # (B H, rows, keys)
        scores[:, :, start:] += future[: stop - start, : stop - start]
        mixed[:, start:stop] = torch.bmm(scores.softmax(-1), value[:, :stop])
    return mixed.view(shape)


def by_head(x: Float[Tensor, "B T D"], heads: int) -> Float[Tensor, "B H T K"]:
    """Split the last axis into heads, without a copy."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)
