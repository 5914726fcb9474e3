"""Choose which parts of a teacher a student keeps, and copy their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel

from tinygpt2.config.compression import Position, Strategy
from tinygpt2.errors import ConfigError, ModelError, listed

_PARTS = {
    f"{part}.{kind}"
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
}
"""The tensors of a block of GPT-2."""


@dataclass(frozen=True)
class KeptParts:
    """The parts of a teacher that a student keeps. All indices count from 0 and are in ascending order.

    Attributes:
        layers: indices of the blocks.
        dimensions: indices of the residual stream's dimensions, the same for the whole model.
        heads, inner: for each kept block, the indices of its heads and of its inner units.
        positions: number of positions, and how their embeddings are chosen.
    """

    layers: list[int]
    dimensions: Int[Tensor, " Ds"]
    heads: list[Int[Tensor, " Hs"]]
    inner: list[Int[Tensor, " Fs"]]
    positions: tuple[int, Position]


def choose_layers(total: int, keep: int, strategy: Strategy) -> list[int]:
    """Return which of `total` blocks to keep, counted from 0.

    `uniform` keeps evenly spaced blocks, with the first and the last. `alternate` keeps floor(i * total / keep):
    0,2,4,6,8,10 of 12, as in Li et al. 2021, arXiv:2110.08460. `distilgpt2` uses this rule for the lower half and its
    mirror image for the upper half: 0,2,4,7,9,11 of 12, as in Hugging Face's DistilGPT2. `first`, `middle` and `last`
    keep consecutive blocks.

    Raises:
        ConfigError: `keep` is larger than `total`.
        ValueError: the strategy is `importance`, which needs a measurement.
    """
    if keep > total:
        raise ConfigError(f"--num-layers {keep}: the teacher has only {total} layers")
    alternate = [i * total // keep for i in range(keep)]
    if strategy == "alternate":
        return alternate
    if strategy == "distilgpt2":
        lower = alternate[: (keep + 1) // 2]
        return lower + [total - 1 - layer for layer in reversed(alternate[: keep // 2])]
    if strategy == "uniform":
        return [round(i * (total - 1) / (keep - 1)) for i in range(keep)] if keep > 1 else [0]
    starts = {"first": 0, "middle": (total - keep) // 2, "last": total - keep}
    if strategy not in starts:
        raise ValueError(f"strategy {strategy} needs a measurement: use importance.depth_importance")
    return list(range(starts[strategy], starts[strategy] + keep))


def cut_model(teacher: GPT2LMHeadModel, kept: KeptParts) -> GPT2LMHeadModel:
    """Return a new model made of the kept parts of a teacher, with copied weights, in evaluation mode."""
    config, width = teacher.config, len(kept.dimensions)
    head_width = config.n_embd // config.n_head
    inner = len(kept.inner[0])
    same_ratio = config.n_inner is None and inner == 4 * width
    sizes = {
        "n_layer": len(kept.layers), "n_embd": width, "n_head": len(kept.heads[0]), "n_positions": kept.positions[0],
        "n_inner": None if same_ratio else inner,
    }  # fmt: skip
    student = GPT2LMHeadModel(config.__class__.from_dict({**config.to_dict(), **sizes}))
    dims, weights = kept.dimensions, {}
    for name, tensor in teacher.state_dict().items():
        if ".h." not in name:
            weights[name] = _positions(tensor, *kept.positions) if name.endswith("wpe.weight") else tensor
            weights[name] = weights[name][..., dims]
    for new, (layer, heads, units) in enumerate(zip(kept.layers, kept.heads, kept.inner, strict=True)):
        columns = (heads[:, None] * head_width + torch.arange(head_width)).flatten()
        fused = torch.cat([columns + part * config.n_embd for part in range(3)])  # queries, keys, values
        for name, tensor in teacher.transformer.h[layer].state_dict().items():
            part = _part(name, tensor, dims, columns, fused, units)
            if config.scale_attn_by_inverse_layer_idx and name.startswith("attn.c_attn."):
                # This option divides the scores by the block's number, which has changed: scale the queries to match.
                scale = torch.ones(len(fused))
                scale[: len(columns)] = (new + 1) / (layer + 1)
                part = part * scale
            weights[f"transformer.h.{new}.{name}"] = part
    student.load_state_dict(weights)
    return student.eval()


def _part(
    name: str, tensor: Tensor, dims: Int[Tensor, " Ds"], heads: Tensor, fused: Tensor, units: Int[Tensor, " Fs"]
) -> Tensor:
    """Return the kept rows and columns of one tensor of a block. Conv1D's matrices have shape (in, out)."""
    inputs = {
        "attn.c_attn.weight": dims,
        "attn.c_proj.weight": heads,
        "mlp.c_fc.weight": dims,
        "mlp.c_proj.weight": units,
    }
    outputs = {"attn.c_attn": fused, "mlp.c_fc": units}
    if name in inputs:
        tensor = tensor[inputs[name]]
    return tensor[..., outputs.get(name.rsplit(".", 1)[0], dims)]


def _positions(table: Float[Tensor, "P D"], count: int, how: Position) -> Float[Tensor, "Ps D"]:
    """Return fewer position embeddings: the first ones, or ones that are interpolated evenly from all."""
    if how == "first" or count == len(table):
        return table[:count]
    return F.interpolate(table.T[None], size=count, mode="linear", align_corners=True)[0].T


def require_cuttable(teacher: GPT2LMHeadModel, name: str) -> None:
    """Check that the blocks of a teacher consist of the parts that a cut knows.

    Args:
        name: what the error message calls the teacher.

    Raises:
        ModelError: it has others, such as cross-attention or an activation with weights.
    """
    strange = {part for part, _ in teacher.transformer.h[0].named_parameters()} - _PARTS
    if strange:
        raise ModelError(
            f"teacher {name} cannot be cut: its blocks have parts that GPT-2's do not have: {listed(sorted(strange))}",
            "only plain GPT-2s can be cut, without cross-attention and with an activation that has no weights",
        )
