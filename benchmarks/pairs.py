"""Measure fine-tuning on pairs of prompt and response: several in a block, or one in each padded block.

Both take the same pairs, and as many in a step. The result is a JSON object with real tokens and counted targets per
second. Usage: python benchmarks/pairs.py [--pairs N] [--layers N] [--width N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config

from tinygpt2 import PretrainConfig
from tinygpt2.data.batches.batch import Batch
from tinygpt2.data.batches.packing import COUNTED, FIRST, REAL, best_fit, block_of, document_lengths
from tinygpt2.models.loading import random_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.runtime.devices import current_device
from tinygpt2.training.step import Step

Pair = tuple[Any, Any]


def some_pairs(count: int, vocabulary: int, longest: int) -> list[Pair]:
    """Make pairs of random tokens whose lengths spread as those of instructions do: most short, a few long."""
    pick = random.Random(1)
    pairs = []
    for _ in range(count):
        prompt, response = (max(2, min(longest // 2, round(pick.lognormvariate(mean, 0.9)))) for mean in (3.3, 4.0))
        tokens = np.array([pick.randrange(vocabulary) for _ in range(prompt + response)])
        pairs.append((tokens, np.arange(len(tokens)) >= prompt))
    return pairs


def batch_of(blocks: list[tuple[Any, Any]]) -> Batch:
    """Return blocks with marks as a batch, as a dataset gives it."""
    ids, marks = (np.stack(values) for values in zip(*blocks, strict=True))
    lengths = [int(one) for one in (marks & REAL).sum(1)]
    documents = [document_lengths(first) for first in marks & FIRST != 0]
    return Batch(torch.from_numpy(ids), lengths, marks & COUNTED != 0, documents)


def batches(pairs: list[Pair], length: int, in_step: int, *, packed: bool) -> list[Batch]:
    """Put the pairs into one batch for each step; a padded batch is as long as its longest pair."""
    found = []
    for start in range(0, len(pairs), in_step):
        some = pairs[start : start + in_step]
        if packed:
            numbers = best_fit([len(tokens) for tokens, _ in some], length)
            found.append(batch_of([block_of([some[number] for number in block], length) for block in numbers]))
        else:
            widest = max(len(tokens) for tokens, _ in some)
            found.append(batch_of([block_of([pair], widest) for pair in some])._replace(documents=None))
    return found


def seconds(step: Step, work: list[Batch], device: torch.device) -> float:
    """Return how long the gradients of all batches take, after one that warms up."""
    started = 0.0
    for number, batch in enumerate([work[0], *work]):
        if number == 1:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
        there = batch.to(device)
        loss, _ = step(**there._asdict())
        loss.backward()
        step.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both forms in turns, and return their best speeds."""
    device = current_device()
    heads = max(1, options.width // 64)
    shape = GPT2Config(
        vocab_size=options.vocab_size,
        n_layer=options.layers,
        n_embd=options.width,
        n_head=heads,
        n_positions=options.length,
        bos_token_id=0,
        eos_token_id=0,
    )
    pairs = some_pairs(options.pairs, shape.vocab_size, options.length)
    step = Step(random_model(shape, 0), None, LossWeights(), PretrainConfig(data="-", shape="-", out="-"))
    step.to(device).train()
    tokens, targets = sum(len(one) for one, _ in pairs), int(sum(counted.sum() for _, counted in pairs))
    forms = {
        name: batches(pairs, options.length, options.in_step, packed=name == "packed") for name in ("packed", "padded")
    }
    best = dict.fromkeys(forms, math.inf)
    for _ in range(options.turns):
        for name, work in forms.items():
            best[name] = min(best[name], seconds(step, work, device))
    result: dict[str, Any] = {"pairs": len(pairs), "tokens": tokens, "targets": targets, "device": str(device)}
    for name, work in forms.items():
        places = sum(batch.input_ids.numel() for batch in work)
        result[name] = {
            "padding": 1 - tokens / places,
            "tokens_per_second": tokens / best[name],
            "targets_per_second": targets / best[name],
        }
    result["packed_over_padded"] = best["padded"] / best["packed"]
    return result


def main() -> None:
    """Measure, and print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--in-step", type=int, default=32, help="pairs in an optimizer step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a block")
    parser.add_argument("--vocab-size", type=int, default=50_257)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", help="write the JSON here, too")
    options = parser.parse_args()
    text = json.dumps(measured(options), indent=1)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
