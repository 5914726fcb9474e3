"""Choose the heads and inner units of a block by what is lost after the output projection has been refitted.

An output projection adds x W to the stream, where x are the outputs of the heads or of the inner units. Without some of
the columns of x, the rows that are left are refitted by least squares. With the inverse H of the centred moments of x,
removing the columns R then costs tr(W_R^T (H_RR)^-1 W_R), and both W and H of what is left follow in closed form.

Source: for the removal with a fit inside, ZipLM, Kurtic et al. 2023, arXiv:2302.04089, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from tinygpt2.compression.calibration import Batches, add_products
from tinygpt2.compression.taps import tap
from tinygpt2.runtime.devices import float64_device
from tinygpt2.utils.progress import follow

_ROUNDS = 64  # at most, in which units are removed; after each round the costs of the others are known again
_NUMBERS = 2**28  # at most, in the covariances that are held at a time
_RIDGE = 1e-4  # added to the moments, in units of their mean


@dataclass(frozen=True)
class Moments:
    """The covariance and the mean of some activations over calibration texts, in float64."""

    covariance: Float[Tensor, "N N"]
    mean: Float[Tensor, " N"]


def projection_moments(
    model: GPT2LMHeadModel, batches: Batches, layers: Sequence[int]
) -> Iterator[tuple[Moments, Moments, Moments]]:
    """Yield, for each of these blocks, the moments of what its attention and its two output projections read.

    As many blocks are measured in one pass as fit into about 2 GiB.
    """
    at_once = max(1, _NUMBERS // len(model.transformer.h[0].mlp.c_proj.weight) ** 2)
    for start in range(0, len(layers), at_once):
        blocks = [model.transformer.h[layer] for layer in layers[start : start + at_once]]
        modules = [one for block in blocks for one in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_proj)]
        found = _moments(model, batches, modules)
        yield from zip(found[::3], found[1::3], found[2::3], strict=True)


@torch.no_grad()
def _moments(model: GPT2LMHeadModel, batches: Batches, modules: list[Any]) -> list[Moments]:
    exact = float64_device(model.lm_head.weight.device)
    squares = [torch.zeros(len(one.weight), len(one.weight), dtype=torch.float64, device=exact) for one in modules]
    sums = [torch.zeros(len(one.weight), dtype=torch.float64, device=exact) for one in modules]

    def see(x: Float[Tensor, "B T N"], place: int) -> None:
        rows = x.flatten(0, 1)
        add_products(squares[place], rows)
        sums[place] += rows.to(exact).double().sum(0)

    taps: dict[nn.Module, Callable[[Tensor], object]] = {
        one: partial(see, place=place) for place, one in enumerate(modules)
    }
    count = 0
    for ids in follow(batches, "measure heads and inner units", "batches"):
        tap(model, ids, taps)
        count += ids.numel()
    return [
        Moments(square / count - torch.outer(total, total) / count**2, total / count)
        for square, total in zip(squares, sums, strict=True)
    ]


@torch.no_grad()
def least_missed(
    covariance: Float[Tensor, "N N"], weight: Float[Tensor, "N Ds"], keep: int, group: int = 1
) -> Int[Tensor, " n"]:
    """Return the numbers of the groups of columns to keep, ascending.

    Args:
        covariance: of what a projection reads.
        weight: the projection, into the stream of the student.
        keep: how many groups to keep.
        group: how many neighbouring columns make a group: 1 for inner units, a head's width for heads.
    """
    return removal_order(covariance, weight, keep, group)[-keep:].sort().values


@torch.no_grad()
def removal_order(
    covariance: Float[Tensor, "N N"], weight: Float[Tensor, "N Ds"], keep: int, group: int = 1
) -> Int[Tensor, " G"]:
    """Return the numbers of all groups: those that `least_missed` removes in their order, then those that it keeps."""
    if keep * group == len(weight):
        return torch.arange(keep)
    ridge = _RIDGE * covariance.diagonal().mean() + 1e-30
    inverse = torch.linalg.inv(covariance + torch.diag(ridge.expand(len(covariance))))
    weight = weight.to(covariance)
    left = torch.arange(len(weight) // group)
    removed: list[Tensor] = []
    rounds = min(_ROUNDS, len(left) - keep)
    for number in range(rounds):
        count = (len(left) - keep) // (rounds - number)
        blocks = inverse.view(len(left), group, len(left), group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        rows = weight.view(len(left), group, -1)
        costs = (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))
        gone = torch.zeros(len(left), dtype=torch.bool)
        cheapest = costs.topk(count, largest=False).indices.cpu()
        gone[cheapest] = True
        removed.append(left[cheapest])
        columns = gone.repeat_interleave(group).to(covariance.device)
        through = torch.linalg.solve(inverse[columns][:, columns], inverse[columns][:, ~columns]).T
        weight = weight[~columns] - through @ weight[columns]
        inverse = inverse[~columns][:, ~columns] - through @ inverse[columns][:, ~columns]
        left = left[~gone]
    return torch.cat([*removed, left])
