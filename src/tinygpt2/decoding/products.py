"""A model's matrices as functions of rows of activations, in the layouts and formats that are fast with few rows.

Decoding a token multiplies one row by every matrix, so each weight is read from memory for a single multiplication:
the time is that of reading. GPT-2 stores its matrices as (in, out), and on one thread torch reads one row's product
fastest in that layout. So float32 matrices are used where they are, and only the tied head, which is (V, D), is copied
if a caller wants it. Several threads read faster from oneDNN's own layout, which is a copy of every matrix. Fewer bytes
are the other way: bfloat16, or int8 with a scale for each output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tinygpt2.config.decoding import DecodingWeights
from tinygpt2.runtime.devices import has_fast_bf16

Product = Callable[[Tensor], Tensor]
"""From (R, in) to (R, out)."""

Layout = Literal["in place", "transposed head", "packed"]
"""Which float32 matrices are copied into another layout: none, the output matrix, or all of them into oneDNN's."""

INT8_ROWS = 16  # for more rows, a product of matrices in bfloat16 is faster than torch's kernel for int8 weights


class Matrix:
    """A matrix with its bias, as a function from rows (R, in) to rows (R, out).

    Attributes:
        product: the function.
        bytes: what one call reads from memory: weights, scales and bias.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, weights: DecodingWeights, layout: Layout, *, transposed: bool = False
    ) -> None:
        """Lay the matrix out.

        Args:
            weight: (in, out), or (out, in) if `transposed`, as the output matrix is.
            bias: (out,) or None.
            weights: the format. The tensor itself is used, in its own format, with fp32 in place; else a copy.
        """
        if weights == "fp32":
            self.bytes = weight.nbytes
            if layout == "packed":
                self.product = _packed((weight if transposed else weight.mT).detach(), bias)
            elif layout == "transposed head" and transposed:
                self.product = _in_place(weight.detach().mT.contiguous(), bias, transposed=False)
            else:
                self.product = _in_place(weight, bias, transposed=transposed)
        else:
            rows = weight if transposed else weight.mT  # (out, in)
            self.product, self.bytes = (_int8 if weights == "int8" else _bf16)(rows.detach(), bias)
        self.bytes += 0 if bias is None else bias.nbytes


def _in_place(weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Product:
    if transposed:
        return lambda x: F.linear(x, weight, bias)
    rows = weight.mT  # one row times (in, out) is this matrix times a vector, which BLAS reads fastest
    if bias is None:
        return lambda x: torch.mv(rows, x[0])[None] if len(x) == 1 else torch.mm(x, weight)
    return lambda x: torch.addmv(bias, rows, x[0])[None] if len(x) == 1 else torch.addmm(bias, x, weight)


def _packed(rows: Tensor, bias: Tensor | None) -> Product:
    """Let oneDNN lay the matrix (out, in) out once: torch's own call does it again for every product."""
    packed = torch.ops.mkldnn._reorder_linear_weight(rows.contiguous(), 1)
    offset, multiply = None if bias is None else bias.detach(), torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x, packed, offset, "none", [], "")


def _bf16(rows: Tensor, bias: Tensor | None) -> tuple[Product, int]:
    """Round to bfloat16."""
    weight = rows.to(torch.bfloat16).contiguous()
    offset = None if bias is None else bias.detach().to(torch.bfloat16)
    if weight.device.type == "cpu" and has_fast_bf16(weight.device):
        return _packed(weight, offset), weight.nbytes
    return lambda x: F.linear(x, weight, offset), weight.nbytes


def _int8(rows: Tensor, bias: Tensor | None) -> tuple[Product, int]:
    """Round each row to 255 steps of its own size.

    Torch's kernel multiplies bfloat16 activations with the integers. It is made for few rows: for many, the integers
    become bfloat16 first. It takes 16 inputs at a time and does not check the end, so zeros fill up the last ones.
    """
    missing = -rows.shape[1] % 16
    quantised, scales = rounded_to_int8(F.pad(rows, (0, missing)))
    scales = scales.to(torch.bfloat16)
    offset = None if bias is None else bias.detach().to(torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        if missing:
            x = F.pad(x, (0, missing))
        if len(x) <= INT8_ROWS:
            y = torch._weight_int8pack_mm(x, quantised, scales)
        else:
            y = F.linear(x, quantised.to(torch.bfloat16)).mul_(scales)
        return y if offset is None else y.add_(offset)

    return product, quantised.nbytes + scales.nbytes


def rounded_to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix as integers from -127 to 127 and a scale for each row, whose product is near the matrix.

    Args:
        rows: (out, in).

    Returns:
        (out, in), int8, and (out,), float32.
    """
    scales = rows.float().abs().amax(1).clamp_min(1e-12) / 127
    return (rows / scales[:, None]).round_().to(torch.int8).contiguous(), scales
