"""Choose the blocks of text that a model is measured on, and compute its loss on them."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.data.dataset import Blocks
from tinygpt2.models.lm_head import target_losses
from tinygpt2.runtime.devices import float64_device
from tinygpt2.utils.progress import ProgressStage

Batches = list[Int[Tensor, "B T"]]

_TOKENS = 2048  # at most, in one forward pass
_SEQUENCES = 64  # blocks without --calibration-sequences, but not more than hold the tokens that follow
_FITTED = 32_768  # tokens to measure the teacher and to fit the student on
_HELD_OUT = 16_384  # tokens to compare student and teacher on
_SIDE = 512  # columns of the squares that a product of activations with themselves consists of


def calibration_count(blocks: Blocks, asked: int | None, tokens: int = _FITTED) -> int:
    """Return how many blocks to measure on: `asked`, or else 64, or fewer if these hold more than `tokens` tokens."""
    return asked or max(1, min(_SEQUENCES, tokens // blocks.sequence_length))


def calibration_batches(blocks: Blocks, asked: int | None, device: torch.device) -> Batches:
    """Return up to `calibration_count` evenly spaced blocks, in batches.

    If blocks are padded, only the longest ones are used, without their padding.
    """
    count = calibration_count(blocks, asked)
    lengths = blocks.lengths(range(len(blocks))) if blocks.padded else []
    longest = max(lengths, default=None)
    whole = [index for index, length in enumerate(lengths) if length == longest] or range(len(blocks))
    chosen = [
        whole[place] for place in np.unique(np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int))
    ]
    size = max(1, _TOKENS // blocks.batch(chosen[:1]).input_ids.shape[1])
    batches = (blocks.batch(chosen[i : i + size]).input_ids for i in range(0, len(chosen), size))
    return [ids[:, :longest].to(device) for ids in batches]


def held_out_batches(blocks: Blocks, asked: int | None, device: torch.device) -> Batches:
    """Return blocks to compare a student with its teacher on: `calibration_batches` with fewer tokens by default."""
    return calibration_batches(blocks, calibration_count(blocks, asked, _HELD_OUT), device)


def tokens_of(batches: Batches) -> int:
    """Return the number of tokens in all blocks."""
    return sum(ids.numel() for ids in batches)


def add_products(total: Float[Tensor, "N N"], rows: Float[Tensor, "B N"]) -> None:
    """Add rows^T rows to a float64 total, on the total's device, in the rows' precision.

    The result is symmetric, so what is below the diagonal is copied. Float32 is enough for a batch: its error, about
    1e-6 of the largest products, is far below what texts differ by.
    """
    rows = rows.to(total.device)
    for start in range(0, len(total), _SIDE):
        square = slice(start, start + _SIDE)
        products = (rows[:, square].T @ rows[:, start:]).double()
        total[square, start:] += products
        total[start + _SIDE :, square] += products[:, _SIDE:].T


@torch.no_grad()
def mean_loss(model: GPT2LMHeadModel, batches: Batches, stage: ProgressStage | None = None) -> float:
    """Return the cross-entropy in nats per token, over all tokens but the first of each block.

    Args:
        stage: is told the number of tokens of each batch.
    """
    total, count = 0.0, 0
    for ids in batches:
        losses, _ = target_losses(model, model.lm_head.weight, ids)
        total, count = total + float(losses.to(float64_device(losses.device)).double().sum()), count + losses.numel()
        if stage is not None:
            stage.advance(ids.numel())
    return total / count
