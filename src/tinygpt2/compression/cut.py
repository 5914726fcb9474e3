"""Choose which parts of a teacher a student keeps, and make its weights from theirs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel

from tinygpt2.compression.heads import HeadMap, whole_heads
from tinygpt2.compression.rotation import Rotation, rotated_weights
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
        dimensions: indices of the residual stream's dimensions, the same for the whole model; or a rotation.
        heads, inner: for each kept block, the indices of its heads and of its inner units.
        positions: number of positions, and how their embeddings are chosen.
        narrowed: for each kept block, how its heads change their width; None if they keep it.
        untied: whether the output matrix is no longer the embedding.
    """

    layers: list[int]
    dimensions: Int[Tensor, " Ds"] | Rotation
    heads: list[Int[Tensor, " Hs"]]
    inner: list[Int[Tensor, " Fs"]]
    positions: tuple[int, Position]
    narrowed: list[HeadMap] | None = None
    untied: bool = False

    @property
    def width(self) -> int:
        """The student's hidden size."""
        return len(self.dimensions.basis if isinstance(self.dimensions, Rotation) else self.dimensions)

    def encode(self, width: int) -> Float[Tensor, "D Ds"]:
        """Return the matrix that turns the stream of a teacher of this width (rows) into the student's."""
        if isinstance(self.dimensions, Rotation):
            return self.dimensions.encode
        return torch.eye(width, dtype=torch.float64)[:, self.dimensions]

    def head_maps(self, teacher: GPT2LMHeadModel) -> list[HeadMap]:
        """Return how the attention of each kept block follows from the teacher's."""
        total, width = teacher.config.n_head, teacher.config.n_embd // teacher.config.n_head
        return self.narrowed or [whole_heads(heads, total, width) for heads in self.heads]


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


@torch.no_grad()
def cut_model(teacher: GPT2LMHeadModel, kept: KeptParts) -> GPT2LMHeadModel:
    """Return a new model made of the kept parts of a teacher, in evaluation mode."""
    config, width = teacher.config, kept.width
    inner = len(kept.inner[0])
    same_ratio = config.n_inner is None and inner == 4 * width
    sizes = {
        "n_layer": len(kept.layers), "n_embd": width, "n_head": len(kept.heads[0]), "n_positions": kept.positions[0],
        "n_inner": None if same_ratio else inner,
        "tie_word_embeddings": config.tie_word_embeddings and not kept.untied,
    }  # fmt: skip
    student = GPT2LMHeadModel(config.__class__.from_dict({**config.to_dict(), **sizes}))
    if isinstance(kept.dimensions, Rotation):
        old, dims = rotated_weights(teacher, kept.dimensions), torch.arange(width)
    else:
        old, dims = teacher.state_dict(), kept.dimensions
    weights = {name: tensor[..., dims] for name, tensor in old.items() if ".h." not in name}
    weights["transformer.wpe.weight"] = _positions(weights["transformer.wpe.weight"], *kept.positions)
    for new, (layer, heads, units) in enumerate(zip(kept.layers, kept.head_maps(teacher), kept.inner, strict=True)):
        # Heads of another width, or a block with another number, may divide the scores by another number.
        scale = teacher.transformer.h[layer].attn.scaling / student.transformer.h[new].attn.scaling
        block = f"transformer.h.{layer}."
        part = {name.removeprefix(block): tensor for name, tensor in old.items() if name.startswith(block)}
        for name, tensor in _block(part, dims, heads, scale, units).items():
            weights[f"transformer.h.{new}.{name}"] = tensor
    student.load_state_dict(weights)
    return student.eval()


def _block(
    part: dict[str, Tensor], dims: Int[Tensor, " Ds"], heads: HeadMap, scale: float, units: Int[Tensor, " Fs"]
) -> dict[str, Tensor]:
    """Return the weights of a block of the student. Conv1D's matrices have shape (in, out)."""
    output = part["attn.c_proj.weight"][:, dims]
    inputs, outputs, rest = (one.to(output) for one in (heads.fused(scale), heads.outputs, heads.rest))
    return {
        **{f"{norm}.{kind}": part[f"{norm}.{kind}"][dims] for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")},
        "attn.c_attn.weight": part["attn.c_attn.weight"][dims] @ inputs,
        "attn.c_attn.bias": part["attn.c_attn.bias"] @ inputs,
        "attn.c_proj.weight": outputs @ output,
        "attn.c_proj.bias": part["attn.c_proj.bias"][dims] + rest @ output,
        "mlp.c_fc.weight": part["mlp.c_fc.weight"][dims][:, units],
        "mlp.c_fc.bias": part["mlp.c_fc.bias"][units],
        "mlp.c_proj.weight": part["mlp.c_proj.weight"][units][:, dims],
        "mlp.c_proj.bias": part["mlp.c_proj.bias"][dims],
    }


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
