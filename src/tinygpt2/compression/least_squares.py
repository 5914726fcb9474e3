"""Output projections of a cut model, fitted again so that its residual stream follows its teacher's.

Closed form, one pass: student and teacher go through the calibration texts block by block. What is missing to the
teacher's stream, in the dimensions that the student has kept, is regressed on what the student's heads hold, and then
on its inner units. After its MLP a student's block aims at what the next kept block got in the teacher, so that it
makes up for the blocks between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from tinygpt2.compression.calibration import Batches
from tinygpt2.models.activations import mixed_heads
from tinygpt2.utils.progress import track

RIDGE = 1e-2  # of the activations' mean square: how much the weights are held where they were


@torch.no_grad()
def refit(
    student: GPT2LMHeadModel,
    teacher: GPT2LMHeadModel,
    layers: Sequence[int],
    dimensions: Int[Tensor, " Ds"],
    batches: Batches,
) -> None:
    """Fit the student's attention and MLP output projections, in place.

    Args:
        student: cut from the teacher.
        layers: the teacher's blocks that it keeps, rising.
        dimensions: the teacher's dimensions that it keeps.
        batches: calibration texts, no longer than the student's positions; both models' states of all are held.
    """
    ours, theirs = ([_embedded(model, ids) for ids in batches] for model in (student, teacher))
    reached = 0  # the teacher's block that `theirs` go into
    ends = [*layers[1:], teacher.config.n_layer]
    with track("refit output projections", len(layers)) as progress:
        for block, layer, end in zip(student.transformer.h, layers, ends, strict=True):
            for other in teacher.transformer.h[reached:layer]:
                theirs = [_mlp(other, _attention(other, x)) for x in theirs]
            template = teacher.transformer.h[layer]
            theirs = [_attention(template, x) for x in theirs]
            ours = _fitted(block.attn.c_proj, partial(_mixed, block), ours, theirs, dimensions)
            theirs = [_mlp(template, x) for x in theirs]
            for other in teacher.transformer.h[layer + 1 : end]:
                theirs = [_mlp(other, _attention(other, x)) for x in theirs]
            reached = end
            ours = _fitted(block.mlp.c_proj, partial(_inner, block), ours, theirs, dimensions)
            progress.advance()


def _fitted(
    projection: Any,
    inputs: Callable[[Tensor], Tensor],
    states: list[Float[Tensor, "B T Ds"]],
    targets: list[Float[Tensor, "B T D"]],
    dimensions: Int[Tensor, " Ds"],
) -> list[Float[Tensor, "B T Ds"]]:
    """Fit one projection by ridge regression on what is missing, add what it gives to the states, and return them."""
    weight, bias = projection.weight, projection.bias  # of a Conv1D: (in, out)
    size = len(weight) + 1  # and a column of ones, for the bias
    square = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(size, len(bias), dtype=torch.float64, device=weight.device)
    for state, target in zip(states, targets, strict=True):
        x = inputs(state)
        missing = target[..., dimensions] - state - (x @ weight + bias)
        ones = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1).flatten(0, 1).double()
        square += ones.T @ ones
        cross += ones.T @ missing.flatten(0, 1).double()
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    change = torch.linalg.solve(square, cross).to(weight.dtype)
    weight += change[:-1]
    bias += change[-1]
    return [state + inputs(state) @ weight + bias for state in states]


def _embedded(model: GPT2LMHeadModel, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    embeddings: Tensor = model.transformer.wte(ids) + model.transformer.wpe.weight[: ids.shape[1]]
    return embeddings


def _mixed(block: GPT2Block, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """Return what the heads hold, before their output projection."""
    return mixed_heads(block, x)[0]


def _inner(block: GPT2Block, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T F"]:
    """Return the activations of the inner units."""
    activations: Tensor = block.mlp.act(block.mlp.c_fc(block.ln_2(x)))
    return activations


def _attention(block: GPT2Block, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    return x + block.attn.c_proj(_mixed(block, x))  # type: ignore[no-any-return]


def _mlp(block: GPT2Block, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    return x + block.mlp.c_proj(_inner(block, x))  # type: ignore[no-any-return]
