"""Rounding weights to blocks of few bits, exactly as the GGUF formats q8_0 and q4_0 store them.

`export` writes these numbers, and training can round to the same ones. A block is 32 neighbouring weights of a row: of
all weights that one output reads. It is stored as one scale in half precision and a whole number for each weight.

Source: ggml, `quantize_row_q8_0_ref` and `quantize_row_q4_0_ref`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 32  # weights that share a scale
_FINER = {"q4_0": "q8_0", "q8_0": "f16"}  # what a matrix gets if it cannot have, or should not have, a type
_TABLES = ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight")
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def is_conv1d(name: str) -> bool:
    """Return whether a parameter of GPT-2 is a matrix of shape (in, out), whose rows are the columns of the tensor."""
    return name.endswith(_CONV1D)


def stored_type(name: str, shape: Sequence[int], wanted: str) -> str:
    """Return the type in which a parameter of GPT-2 is stored if the model is exported as `wanted`.

    Vectors (biases and layer norms) are always f32. With q4_0, embeddings and head are q8_0: their rows are read one
    by one, and 4 bits cost them most. A matrix whose rows do not divide into blocks of 32 gets the next finer type
    that has no blocks, which is f16.

    Args:
        name: the parameter's name in `GPT2LMHeadModel`.
        shape: its shape there.
        wanted: f32, f16, bf16, q8_0 or q4_0.
    """
    if len(shape) < 2:
        return "f32"
    row = shape[0] if is_conv1d(name) else shape[-1]
    kind = _FINER["q4_0"] if wanted == "q4_0" and name in _TABLES else wanted
    while kind in _FINER and row % BLOCK:
        kind = _FINER[kind]
    return kind


def finer_matrices(model: torch.nn.Module, wanted: str) -> list[str]:
    """Return the parameters of a GPT-2 that are stored without blocks, although `wanted` has blocks of 32."""
    if wanted not in _FINER:
        return []
    shapes = {name: weight.shape for name, weight in model.named_parameters() if weight.dim() > 1}
    return [name for name, shape in shapes.items() if stored_type(name, shape, wanted) not in _FINER]


def round_rows(x: Float[Tensor, "R C"], kind: str) -> Float[Tensor, "R C"]:
    """Return rows as they are after they were stored as `kind` and read back as float32.

    Args:
        x: float32 rows; for q8_0 and q4_0, C is a multiple of 32.
        kind: f32, f16, bf16, q8_0 or q4_0.

    Raises:
        ValueError: the type is unknown, or the rows do not divide into blocks.
    """
    if kind in ("f32", "f16", "bf16"):
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
        return x.to(dtype).float()
    if kind not in _FINER or x.shape[-1] % BLOCK:
        raise ValueError(f"{kind} cannot store rows of {x.shape[-1]} weights")
    blocks = x.reshape(-1, BLOCK)
    if kind == "q8_0":
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        scaled = blocks * _inverse(scale)
        size = scaled.abs()
        whole = scaled.sign() * (size.floor() + (2 * (size - size.floor())).floor())  # halves away from zero
    else:
        # the largest weight of a block becomes -8, so that the whole range of 4 bits is used
        scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
        whole = (blocks * _inverse(scale) + 8.5).trunc().clamp(0, 15) - 8
    return (whole * scale.half().float()).view(x.shape)


def _inverse(scale: Float[Tensor, "N 1"]) -> Float[Tensor, "N 1"]:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def rounded(name: str, weight: Tensor, wanted: str) -> Tensor:
    """Return a parameter of GPT-2 as it is after it was exported as `wanted` and read back, in its own layout."""
    kind = stored_type(name, weight.shape, wanted)
    if kind == "f32":
        return weight
    return round_rows(weight.T.contiguous(), kind).T if is_conv1d(name) else round_rows(weight, kind)
