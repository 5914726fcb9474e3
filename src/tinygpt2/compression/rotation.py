"""Cut a residual stream along its principal directions instead of its coordinates.

GPT-2's residual stream is read by layer norms alone, and each of them removes the mean of what it reads. So whatever
writes into the stream can be projected onto the complement of the ones vector, and a rotation of this complement
commutes with the layer norms, once their gains and biases are part of the matrices that read them. A student keeps the
directions that matter most for the loss. It is a plain GPT-2 again.

Only a tied output matrix cannot take in the last norm's gain, because it is the embedding too. Three things make up for
that. The kept directions are turned until the gain is almost diagonal in them. The gain of the student's last norm is
fitted. And the last norm's bias becomes a number for each token: every norm removes the part of an embedding that lies
along the ones vector, so this part is free to hold it.

Source: SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024, section 3, rotates models with RMSNorm and adds maps between
the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel

from tinygpt2.compression.calibration import Batches, add_products
from tinygpt2.compression.importance import norm_gradients
from tinygpt2.compression.taps import tap, tapped
from tinygpt2.models.lm_head import scoring_chunk
from tinygpt2.runtime.devices import float64_device
from tinygpt2.utils.progress import follow

LOSS_TOKENS = 16_384  # that gradients and probabilities are measured on; they take longer than the rest


@dataclass(frozen=True)
class StreamMoments:
    """What the layer norms of a model read, over calibration texts. All numbers are float64, on the CPU.

    Attributes:
        norms: for every norm (two in each block, then the last one), the mean of x^T x, where x is the norm's output
            before its gain and bias.
        gradients: for every norm, the mean of g^T g, where g is the gradient of the loss for x.
        tokens: the mean probability that the model gives to each token.
    """

    norms: list[Float[Tensor, "D D"]]
    gradients: list[Float[Tensor, "D D"]]
    tokens: Float[Tensor, " V"]


@dataclass(frozen=True)
class Rotation:
    """A student's residual stream as a linear map of its teacher's. All matrices are float64.

    Attributes:
        kept: orthonormal directions of the teacher's stream, which are orthogonal to the ones vector.
        basis: as many orthonormal directions of the student's stream, also orthogonal to its ones vector.
        moments: what was measured of the teacher.
        tied: whether the student's output matrix is its embedding.
    """

    kept: Float[Tensor, "D K"]
    basis: Float[Tensor, "Ds K"]
    moments: StreamMoments
    tied: bool

    @property
    def encode(self) -> Float[Tensor, "D Ds"]:
        """The matrix that turns the teacher's stream (rows) into the student's."""
        return self.kept @ self.basis.T

    def share(self, norm: int) -> float:
        """Return which share of the variance of a norm's input the kept directions hold."""
        moment = self.moments.norms[norm]
        return float(torch.trace(self.kept.T @ moment @ self.kept) / torch.trace(moment))

    def scale(self, norm: int) -> float:
        """Return the factor that makes up for what a norm loses.

        The student's norm makes its input as long as sqrt(Ds). The same part of the teacher's norm's output has a
        length of sqrt(share x D).
        """
        return math.sqrt(self.share(norm) * len(self.kept) / len(self.basis))


@torch.no_grad()
def stream_moments(model: GPT2LMHeadModel, batches: Batches, *, tied: bool) -> StreamMoments:
    """Measure what the layer norms of a model read, and how much the loss depends on it.

    Args:
        batches: calibration texts. Gradients and probabilities use the first `LOSS_TOKENS` of their tokens.
        tied: whether the tokens' mean probabilities are needed too.
    """
    transformer, head = model.transformer, model.lm_head.weight
    norms: list[Any] = [norm for block in transformer.h for norm in (block.ln_1, block.ln_2)]
    norms.append(transformer.ln_f)
    exact = float64_device(head.device)
    moments, gradients = (
        [torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64, device=exact) for _ in norms] for _ in range(2)
    )
    tokens, count = torch.zeros(len(head), dtype=torch.float64, device=exact), 0
    with_loss = 0

    def see(x: Float[Tensor, "B T D"], number: int) -> None:
        normed = F.layer_norm(x, x.shape[-1:], eps=model.config.layer_norm_epsilon)
        add_products(moments[number], normed.flatten(0, 1))

    taps = {norm: partial(see, number=number) for number, norm in enumerate(norms)}
    for ids in follow(batches, "measure the residual stream", "batches"):
        count += ids.numel()
        if with_loss >= LOSS_TOKENS:
            tap(model, ids, taps)
            continue
        with_loss += ids.numel()
        with tapped(taps):
            found = norm_gradients(model, ids)
        for norm, total, (_, gradient) in zip(norms, gradients, found, strict=True):
            add_products(total, (gradient * norm.weight).flatten(0, 1) * ids.numel())
        if tied:
            chunk = scoring_chunk(len(head), head.device.type)
            last, _ = found[-1]
            for rows in last.flatten(0, 1).split(chunk):  # type: ignore[no-untyped-call]
                tokens += (rows @ head.T).softmax(-1).sum(0).to(exact).double()
    return StreamMoments(
        [(moment / count).cpu() for moment in moments],
        [(gradient / with_loss).cpu() for gradient in gradients],
        (tokens / with_loss).cpu(),
    )


def complement(size: int) -> Float[Tensor, "D D-1"]:
    """Return an orthonormal basis of the complement of the ones vector, as close to the unit vectors as one can be."""
    normal = torch.full((size,), -1 / math.sqrt(size), dtype=torch.float64)
    normal[-1] += 1
    normal /= normal.norm()
    reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(normal, normal)
    return reflection[:, :-1]


def principal_rotation(
    teacher: GPT2LMHeadModel, moments: StreamMoments, layers: Sequence[int], width: int, *, tied: bool
) -> Rotation:
    """Keep the directions of the stream that matter most for the loss.

    With the moments S of what the norms of the kept blocks and the last norm read, and G of the loss's gradients there,
    the linear map of rank K that changes the loss least, to the second order, maps onto the span of S^(1/2) V, where V
    are the first K eigenvectors of S^(1/2) G S^(1/2). The kept directions are an orthonormal basis of this span.

    Args:
        layers: the teacher's blocks that the student keeps.
        width: the student's hidden size.
        tied: whether the student's output matrix is its embedding.
    """
    places = [2 * layer + norm for layer in layers for norm in (0, 1)] + [-1]
    inside = complement(len(moments.norms[0]))
    read, loss = (
        inside.T @ torch.stack([matrices[place] for place in places]).sum(0) @ inside
        for matrices in (moments.norms, moments.gradients)
    )
    values, vectors = torch.linalg.eigh(read)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    first = torch.linalg.eigh(root @ loss @ root).eigenvectors[:, len(root) - (width - 1) :]
    kept = inside @ torch.linalg.qr(root @ first).Q
    # Turn the directions within what they span, so that the last norm's gain becomes as diagonal as it can be.
    gain = teacher.transformer.ln_f.weight.detach().cpu().double()
    kept = kept @ torch.linalg.eigh(kept.T @ (gain[:, None] * kept)).eigenvectors
    return Rotation(kept, complement(width), moments, tied)


@torch.no_grad()
def rotated_weights(teacher: GPT2LMHeadModel, rotation: Rotation) -> dict[str, Tensor]:
    """Return the weights of a model with all of the teacher's heads and inner units, and the student's stream.

    Its norms have a gain of 1 and a bias of 0, because the matrices that read them have taken in the teacher's.
    """
    old = {name: tensor.detach().cpu().double() for name, tensor in teacher.state_dict().items()}
    encode, width = rotation.encode, len(rotation.basis)
    new: dict[str, Tensor] = {}
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        new[name] = old[name] @ encode
    for layer in range(teacher.config.n_layer):
        block = f"transformer.h.{layer}"
        for number, (norm, reader, writer) in enumerate(
            (("ln_1", "attn.c_attn", "attn.c_proj"), ("ln_2", "mlp.c_fc", "mlp.c_proj"))
        ):
            gain, bias = old[f"{block}.{norm}.weight"], old[f"{block}.{norm}.bias"]
            matrix = old[f"{block}.{reader}.weight"]
            new[f"{block}.{norm}.weight"], new[f"{block}.{norm}.bias"] = torch.ones(width), torch.zeros(width)
            scale = rotation.scale(2 * layer + number)
            new[f"{block}.{reader}.weight"] = scale * encode.T @ (gain[:, None] * matrix)
            new[f"{block}.{reader}.bias"] = old[f"{block}.{reader}.bias"] + bias @ matrix
            for kind in ("weight", "bias"):
                new[f"{block}.{writer}.{kind}"] = old[f"{block}.{writer}.{kind}"] @ encode
    gain, bias, head = old["transformer.ln_f.weight"], old["transformer.ln_f.bias"], old["lm_head.weight"]
    # The last norm's bias is 1. What it meets is a part of the head along the ones vector, which no norm's output has.
    along_ones = (head @ bias / width)[:, None]
    new["transformer.ln_f.bias"] = torch.ones(width)
    target = rotation.scale(-1) * (head * gain) @ encode
    if rotation.tied:
        table = new["transformer.wte.weight"] = new["transformer.wte.weight"] + along_ones
        new["transformer.ln_f.weight"] = _last_gain(rotation, table, target)
        new["lm_head.weight"] = table
    else:
        new["transformer.ln_f.weight"] = torch.ones(width)
        new["lm_head.weight"] = target + along_ones
    return {name: tensor.to(teacher.dtype) for name, tensor in new.items()}


def _last_gain(rotation: Rotation, table: Float[Tensor, "V Ds"], target: Float[Tensor, "V Ds"]) -> Float[Tensor, " Ds"]:
    """Return the last norm's gain with which the embedding gives the logits that a head of its own would give.

    Least squares over tokens and texts. A token counts by its mean probability, and only differences between logits
    count. With X the moments of the norm's output, the sum over tokens of p (g t - y)^T X (g t - y) is smallest where
    (sum p t t^T * X) g = sum p t * (X y).
    """
    weights = rotation.moments.tokens / rotation.moments.tokens.sum()
    seen = rotation.encode.T @ rotation.moments.norms[-1] @ rotation.encode / rotation.scale(-1) ** 2
    table, target = (rows - weights @ rows for rows in (table, target))
    square = (table * weights[:, None]).T @ table * seen
    square.diagonal().add_(1e-6 * square.diagonal().mean())
    gain: Tensor = torch.linalg.solve(square, (weights[:, None] * table * (target @ seen)).sum(0))
    return gain
