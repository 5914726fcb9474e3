"""Make attention heads narrower, with few changes to what they attend to and to what they add.

GPT-2 has no rotary positions. So a head's queries and keys matter only through their products, and its values only
through what the output projection makes of them. Both are products of two matrices, whose best approximation of a
lower rank follows from a singular value decomposition, weighted by the activations of calibration texts.

- Scores are q k^T. A softmax ignores what is equal for all keys, so the keys count without their mean. With the moments
  Q of the queries and K of the centred keys, and Q^(1/2) K^(1/2) = A S B^T, the new queries are q Q^(-1/2) A S^(1/2)
  and the new keys k K^(-1/2) B S^(1/2), cut to the first columns.
- A head adds m W, where m is the mean of values that it attends to. With the centred moments M of m and
  M^(1/2) W = A S B^T, the new values are v M^(-1/2) A, and the new projection A^T M^(1/2) W. What m has on average
  outside of the kept directions goes into the projection's bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from tinygpt2.compression.selection import Moments

_SMALLEST = 1e-6  # of a matrix' eigenvalues, relative to the largest: directions with less count as absent


@dataclass(frozen=True)
class HeadMap:
    """How the attention of a student's block follows from its teacher's, in float64.

    W and Ws are the widths of all heads together.

    Attributes:
        inputs: turns the teacher's queries, keys and values (rows) into the student's.
        outputs: the student's output projection is `outputs` times the teacher's.
        rest: what is added to the bias of the output projection is `rest` times the teacher's output projection.
    """

    inputs: Float[Tensor, "3*W 3*Ws"]
    outputs: Float[Tensor, "Ws W"]
    rest: Float[Tensor, " W"]

    def fused(self, scale: float) -> Float[Tensor, "3*W 3*Ws"]:
        """Return `inputs` with queries that are multiplied by a factor."""
        factors = torch.ones(3 * len(self.outputs), dtype=self.inputs.dtype)
        factors[: len(self.outputs)] = scale
        return self.inputs * factors


@dataclass(frozen=True)
class HeadMoments:
    """What the heads of a block do on calibration texts, for each head, in float64 on the CPU.

    Attributes:
        queries: the mean of q^T q over the queries q.
        keys, mixed: the covariances of the keys and of the heads' outputs.
        mix: the mean of the heads' outputs.
    """

    queries: Float[Tensor, "H K K"]
    keys: Float[Tensor, "H K K"]
    mixed: Float[Tensor, "H K K"]
    mix: Float[Tensor, "H K"]


@torch.no_grad()
def head_moments(block: GPT2Block, read: Moments, mixed: Moments) -> HeadMoments:
    """Compute what the heads of a block do from what the block's attention reads and what its heads give.

    Args:
        read: of the outputs of the block's first layer norm.
        mixed: of what its output projection reads.
    """
    heads = block.attn.num_heads
    weight, bias = (one.detach().cpu().double() for one in (block.attn.c_attn.weight, block.attn.c_attn.bias))
    query, key, _ = weight.view(len(weight), 3, heads, -1).permute(1, 2, 0, 3)  # (H, D, K)
    mean = read.mean.cpu() @ query + bias.view(3, heads, -1)[0]
    width = len(mixed.mean) // heads
    within = mixed.covariance.cpu().view(heads, width, heads, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    spread = read.covariance.cpu()
    return HeadMoments(
        query.mT @ spread @ query + mean[:, :, None] * mean[:, None],
        key.mT @ spread @ key, within, mixed.mean.cpu().view(heads, width),
    )  # fmt: skip


def whole_heads(heads: Int[Tensor, " Hs"], total: int, width: int) -> HeadMap:
    """Keep heads as they are.

    Args:
        heads: the numbers of the heads to keep, ascending.
        total: the number of heads of the teacher.
        width: the width of a head.
    """
    columns = (heads[:, None] * width + torch.arange(width)).flatten()
    select = torch.eye(total * width, dtype=torch.float64)[:, columns]
    return HeadMap(torch.kron(torch.eye(3, dtype=torch.float64), select), select.T, torch.zeros(total * width).double())


def narrow_heads(
    moments: HeadMoments, projection: Float[Tensor, "W Ds"], heads: Int[Tensor, " Hs"], width: int
) -> HeadMap:
    """Change the width of the heads that are kept.

    Args:
        moments: of the teacher's block.
        projection: the teacher's output projection, into the stream of the student.
        heads: the numbers of the heads to keep, ascending.
        width: the new width of a head. If it is larger than the teacher's, the heads compute the same as before.
    """
    total, old = moments.mix.shape
    generator = torch.Generator().manual_seed(0)
    inputs = torch.zeros(3, total, old, 3, len(heads), width, dtype=torch.float64)
    outputs = torch.zeros(len(heads), width, total, old, dtype=torch.float64)
    rest = torch.zeros(total, old, dtype=torch.float64)
    rows = projection.detach().cpu().double().view(total, old, -1)
    kept = min(width, old)
    for new, head in enumerate(heads.tolist()):
        query_root, query_inverse = _roots(moments.queries[head])
        key_root, key_inverse = _roots(moments.keys[head])
        left, sizes, right = torch.linalg.svd(query_root @ key_root)
        parts = sizes[:kept].sqrt()
        inputs[0, head, :, 0, new, :kept] = query_inverse @ left[:, :kept] * parts
        inputs[1, head, :, 1, new, :kept] = key_inverse @ right[:kept].T * parts
        mean = moments.mix[head]
        root, inverse = _roots(moments.mixed[head])
        left = torch.linalg.svd(root @ rows[head], full_matrices=False).U[:, :kept]
        inputs[2, head, :, 2, new, :kept] = inverse @ left
        outputs[new, :kept, head] = left.T @ root
        rest[head] = mean - mean @ inverse @ left @ left.T @ root
        # New columns change nothing, because their keys and outputs are 0; they can learn, because the others are not.
        extra = (old, width - kept)
        for part in (0, 2):
            inputs[part, head, :, part, new, kept:] = torch.randn(extra, generator=generator, dtype=torch.float64) / old
    return HeadMap(inputs.reshape(3 * total * old, -1), outputs.reshape(len(heads) * width, -1), rest.flatten())


def _roots(moment: Float[Tensor, "K K"]) -> tuple[Float[Tensor, "K K"], Float[Tensor, "K K"]]:
    """Return the root of a symmetric matrix and its inverse. Directions that hardly occur get a small size."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(max(float(values[-1]) * _SMALLEST, 1e-30)).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T
