"""Estimate what fits on GPUs of several sizes, without one: with the estimate of `--validate-only`, from shapes alone.

    python benchmarks/gpu_memory.py --json

For each run, in blocks of 1,024 tokens and bfloat16: the gigabytes of the fixed part and of each block, without and
with --gradient-checkpointing, and the largest power of two of blocks that fills at most 80 % of the card's memory, as
--auto-batch-size would choose by the estimate. A card of 8 GB has 8 GiB, of which the driver, a desktop and CUDA itself
are taken to need 1 GiB.
"""

from __future__ import annotations

import argparse
import json
from typing import Any
from unittest import mock

import torch
from transformers import GPT2Config

from tinygpt2.config.training import TrainOptions
from tinygpt2.models.loading import random_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.planning.memory_estimate import step_memory

SMALL, MEDIUM, LARGE, XL = (12, 768, 12), (24, 1024, 16), (36, 1280, 20), (48, 1600, 25)
LANGUAGE, PREDICTION = LossWeights(), LossWeights(ce=0.0, prediction=1.0)
RUNS = {  # student, teacher: layers, width, heads
    "pretrain gpt2": (SMALL, None, LANGUAGE),
    "pretrain gpt2-medium": (MEDIUM, None, LANGUAGE),
    "pretrain gpt2-large": (LARGE, None, LANGUAGE),
    "pretrain gpt2-xl": (XL, None, LANGUAGE),
    "gpt2 teaches 6 layers": ((6, 768, 12), SMALL, PREDICTION),
    "gpt2 teaches 4 x 312, recipe tinygpt2": (
        (4, 312, 12), SMALL, LossWeights(ce=0.0, prediction=1.0, attention=1.0, hidden=1.0, loss="soft_ce"),
    ),
    "gpt2-medium teaches 12 layers": ((12, 1024, 16), MEDIUM, PREDICTION),
    "gpt2-large teaches 18 layers": ((18, 1280, 20), LARGE, PREDICTION),
    "gpt2-xl teaches 24 layers": ((24, 1600, 25), XL, PREDICTION),
}  # fmt: skip
CARDS = (8, 24, 80)  # GiB
_TAKEN, _FILLED = 1, 0.8  # GiB that others use; share of the rest


def estimates(length: int = 1024) -> dict[str, Any]:
    """Return the estimate of every run."""
    found: dict[str, Any] = {}
    for name, (student, teacher, weights) in RUNS.items():
        models = [
            None if shape is None else random_model(GPT2Config(**_sizes(shape)), 0, hollow=True)
            for shape in (student, teacher)
        ]
        assert models[0] is not None
        for checkpointing in (False, True):
            options = TrainOptions(out="-", precision="bf16", gradient_checkpointing=checkpointing)
            fixed, each = step_memory(models[0], models[1], weights, options, length)
            found.setdefault(name, {})["checkpointing" if checkpointing else "plain"] = {
                "fixed_gigabytes": fixed / 1e9,
                "gigabytes_a_block": each / 1e9,
                "micro_batch_size": {card: _fitting(fixed, each, card) for card in CARDS},
            }
    return found


def _sizes(shape: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("n_layer", "n_embd", "n_head"), shape, strict=True))


def _fitting(fixed: int, each: int, card: int) -> int:
    usable = _FILLED * (card - _TAKEN) * 2**30
    return max((2**power for power in range(9) if fixed + each * 2**power <= usable), default=0)


def main() -> None:
    """Print the estimates as JSON, or as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with mock.patch.object(torch.cuda, "is_available", return_value=True):  # estimate as on a GPU
        found = estimates()
    if options.json:
        print(json.dumps(found))
        return
    print("| run | fixed + each block | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---|---|" + "---|" * len(CARDS))
    for name, both in found.items():
        plain, kept = both["plain"], both["checkpointing"]
        cells = [f"{plain['micro_batch_size'][card]} ({kept['micro_batch_size'][card]})" for card in CARDS]
        size = f"{plain['fixed_gigabytes']:.1f} GB + {plain['gigabytes_a_block']:.2f} GB"
        print(f"| {name} | {size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
