"""One forward pass that keeps what the objectives compare: hidden states, queries and keys.

Attention runs as the model runs it (SDPA); queries and keys are read off the fused projection, so that no
L x L matrix exists here. States and scores that nobody asked for are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel


@dataclass
class Captured:
    """What one forward pass left behind.

    Attributes:
        last: the last hidden state, after the final layer norm.
        states: hidden states by number: 0 the embeddings, i the output of layer i, N the last one (after
            the final layer norm), as `transformers` returns them.
        scores: by layer, counted from 1, the queries and keys whose products, times `scale`, are the scores.
        scale: the model's own scaling of each captured layer.
    """

    last: Float[Tensor, "B T D"]
    states: dict[int, Float[Tensor, "B T D"]] = field(default_factory=dict)
    scores: dict[int, tuple[Float[Tensor, "B H T K"], Float[Tensor, "B H T K"]]] = field(default_factory=dict)
    scale: dict[int, float] = field(default_factory=dict)


def capture(
    model: GPT2LMHeadModel,
    input_ids: Int[Tensor, "B T"],
    states: Iterable[int] = (),
    scores: Iterable[int] = (),
) -> Captured:
    """Run the transformer once and keep the states and scores asked for.

    Args:
        input_ids: token ids.
        states: numbers of hidden states, 0 to N.
        scores: numbers of layers, 1 to N.
    """
    transformer = model.transformer
    layers = len(transformer.h)
    kept_states: dict[int, Tensor] = {}
    kept_scores: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []
    wanted = set(states)
    for number in wanted - {layers}:
        module = transformer.drop if number == 0 else transformer.h[number - 1]
        handles.append(module.register_forward_hook(_keep_state(kept_states, number)))
    for number in set(scores):
        attention = transformer.h[number - 1].attn
        handles.append(attention.c_attn.register_forward_hook(_keep_scores(kept_scores, number, attention.num_heads)))
    try:
        last = transformer(input_ids=input_ids, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    if layers in wanted:
        kept_states[layers] = last
    scale = {number: float(transformer.h[number - 1].attn.scaling) for number in kept_scores}
    return Captured(last, kept_states, kept_scores, scale)


_Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], None]


def _keep_state(kept: dict[int, Tensor], number: int) -> _Hook:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        kept[number] = output

    return hook


def _keep_scores(kept: dict[int, tuple[Tensor, Tensor]], number: int, heads: int) -> _Hook:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, key, _ = output.chunk(3, dim=-1)  # each (B, T, D)
        kept[number] = (_by_head(query, heads), _by_head(key, heads))

    return hook


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)  # (B, H, T, K)
