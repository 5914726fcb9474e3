"""Refit the projections of a cut model, so that its residual stream follows its teacher's.

The fit has a closed form and needs one pass. Student and teacher read the calibration texts block by block, and every
projection is regressed on what the student gives it to read:

- the projections that read the stream, on the queries, keys, values and inner units of the teacher's block;
- those that write into it, on the difference between the teacher's stream and the student's, in what the student keeps
  of it. The target after a student block's MLP is the stream that enters the next kept block in the teacher. This way,
  the student's block also makes up for the teacher's blocks in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from tinygpt2.compression.calibration import Batches, add_products, tokens_of
from tinygpt2.compression.cut import KeptParts
from tinygpt2.models.activations import mixed_heads
from tinygpt2.runtime.devices import float64_device
from tinygpt2.utils.progress import ProgressStage, track

RIDGE = 1e-2  # ridge penalty in units of the activations' mean square; it keeps weights close to their old values


@torch.no_grad()
def refit(
    student: GPT2LMHeadModel, teacher: GPT2LMHeadModel, kept: KeptParts, batches: Batches, *, announce: bool = True
) -> None:
    """Fit the projections of the student's attention and MLPs, in place.

    Args:
        student: the model that `cut_model` made of the kept parts.
        batches: calibration texts, not longer than the student's positions. Both models' states for all of them are
            held in memory.
        announce: whether to leave a trace of the progress; see `track`.
    """
    device = student.lm_head.weight.device
    encode = kept.encode(teacher.config.n_embd).to(student.lm_head.weight)
    student_states, teacher_states = ([_embedded(model, ids) for ids in batches] for model in (student, teacher))
    reached = 0  # the teacher's block that `teacher_states` enter next
    ends = [*kept.layers[1:], teacher.config.n_layer]
    parts = zip(student.transformer.h, kept.layers, ends, kept.head_maps(teacher), kept.inner, strict=True)
    # every block has four projections; fitting one of them reads all texts
    with track("refit the projections", 4 * len(ends) * tokens_of(batches), "tokens", announce=announce) as stage:
        follow = partial(_followed, encode=encode, stage=stage)
        for block, layer, end, heads, units in parts:
            for other in teacher.transformer.h[reached:layer]:
                teacher_states = [_mlp(other, _attention(other, x)) for x in teacher_states]
            template = teacher.transformer.h[layer]
            scale = template.attn.scaling / block.attn.scaling
            fused, units = heads.fused(scale).to(student.lm_head.weight), units.to(device)
            attention, mlp = template.attn.c_attn, template.mlp.c_fc
            targets = _projected(template.ln_1, attention.weight @ fused, attention.bias @ fused, teacher_states)
            _fit(block.attn.c_attn, map(block.ln_1, student_states), targets, stage)
            teacher_states = [_attention(template, x) for x in teacher_states]
            student_states = follow(block.attn.c_proj, partial(_mixed, block), student_states, teacher_states)
            targets = _projected(template.ln_2, mlp.weight[:, units], mlp.bias[units], teacher_states)
            _fit(block.mlp.c_fc, map(block.ln_2, student_states), targets, stage)
            teacher_states = [_mlp(template, x) for x in teacher_states]
            for other in teacher.transformer.h[layer + 1 : end]:
                teacher_states = [_mlp(other, _attention(other, x)) for x in teacher_states]
            reached = end
            student_states = follow(block.mlp.c_proj, partial(_inner, block), student_states, teacher_states)


def _projected(
    norm: nn.Module, weight: Float[Tensor, "D M"], bias: Float[Tensor, " M"], states: list[Float[Tensor, "B T D"]]
) -> Iterator[Float[Tensor, "B T M"]]:
    """Yield what a linear map makes of the states after a norm."""
    for x in states:
        yield norm(x) @ weight + bias


def _followed(
    projection: Any,
    inputs: Callable[[Tensor], Tensor],
    states: list[Float[Tensor, "B T Ds"]],
    targets: list[Float[Tensor, "B T D"]],
    encode: Float[Tensor, "D Ds"],
    stage: ProgressStage,
) -> list[Float[Tensor, "B T Ds"]]:
    """Fit an output projection to what the targets have and the states lack, and return the states after it."""
    missing = (target @ encode - state for state, target in zip(states, targets, strict=True))
    _fit(projection, map(inputs, states), missing, stage)
    return [state + inputs(state) @ projection.weight + projection.bias for state in states]


def _fit(
    projection: Any, inputs: Iterable[Float[Tensor, "B T N"]], targets: Iterable[Float[Tensor, "B T M"]],
    stage: ProgressStage,
) -> None:  # fmt: skip
    """Fit a projection by ridge regression on what its present weights leave of the targets, in place."""
    weight, bias = projection.weight, projection.bias  # Conv1D's weight has shape (in, out)
    size = len(weight) + 1  # one more for a column of ones, which fits the bias
    exact = float64_device(weight.device)
    square = torch.zeros(size, size, dtype=torch.float64, device=exact)
    cross = torch.zeros(size, len(bias), dtype=torch.float64, device=exact)
    for x, target in zip(inputs, targets, strict=True):
        left = target - (x @ weight + bias)
        ones = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1).flatten(0, 1)
        add_products(square, ones)
        cross += (ones.T @ left.flatten(0, 1)).to(exact).double()
        stage.advance(x.shape[0] * x.shape[1])
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    change = torch.linalg.solve(square, cross).to(weight.dtype).to(weight.device)
    weight += change[:-1]
    bias += change[-1]


def _embedded(model: GPT2LMHeadModel, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    embeddings: Tensor = model.transformer.wte(ids) + model.transformer.wpe.weight[: ids.shape[1]]
    return embeddings


def _mixed(block: GPT2Block, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """Return the outputs of the heads, before their output projection."""
    return mixed_heads(block, x)[0]


def _inner(block: GPT2Block, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T F"]:
    """Return the activations of the inner units."""
    activations: Tensor = block.mlp.act(block.mlp.c_fc(block.ln_2(x)))
    return activations


def _attention(block: GPT2Block, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    return x + block.attn.c_proj(_mixed(block, x))  # type: ignore[no-any-return]


def _mlp(block: GPT2Block, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    return x + block.mlp.c_proj(_inner(block, x))  # type: ignore[no-any-return]
