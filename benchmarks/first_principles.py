"""Measure three properties of GPT-2's parts (the results are in docs/gpt2-from-scratch.md).

    python benchmarks/first_principles.py --model MODEL --data DATA --json
    python benchmarks/first_principles.py --model MODEL --data DATA --positions 1024 --json

1. How much the logits change, position by position, if GELU is computed with the error function instead of the tanh
   formula. With --positions, the model's position embeddings are interpolated to that number of positions.
2. How much GPT-2's Conv1D differs from a Linear layer.
3. How much the loss rises without each single attention head.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch

from tinygpt2.compression.calibration import calibration_batches, mean_loss
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.models import reference
from tinygpt2.models.loading import load_model
from tinygpt2.runtime.cpu import fast_products


def stretched(model: reference.GPT2, positions: int) -> reference.GPT2:
    """Return the model with its position embeddings interpolated to more positions."""
    longer = reference.GPT2(dataclasses.replace(model.shape, n_positions=positions)).double()
    table = torch.nn.functional.interpolate(
        model.wpe.weight.T[None], size=positions, mode="linear", align_corners=True
    )[0].T  # (P, D)
    longer.load_state_dict({**model.state_dict(), "wpe.weight": table})
    return longer


@torch.no_grad()
def gelu_drift(directory: str, ids: torch.Tensor) -> dict[str, object]:
    """Compare the reference model with either GELU, in float64."""
    tanh = reference.load(directory).double()
    tanh = tanh if ids.shape[1] <= tanh.shape.n_positions else stretched(tanh, ids.shape[1])
    erf = reference.GPT2(dataclasses.replace(tanh.shape, activation_function="gelu")).double()
    erf.load_state_dict(tanh.state_dict())
    a, b = tanh(ids).logits, erf(ids).logits
    gap = (a - b).abs().amax((0, 2))  # (T,)
    places = [p for p in (0, 1, 15, 63, 255, 511, 1023) if p < len(gap)]
    texts = [model.greedy(ids[:8, :16], min(100, tanh.shape.n_positions - 16)) for model in (tanh, erf)]
    losses = [
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
        for logits in (a, b)
    ]
    return {
        "largest_logit": float(a.abs().max()), "gap_by_position": {str(p): float(gap[p]) for p in places},
        "largest_gap": float(gap.max()), "mean_gap": float((a - b).abs().mean()),
        "same_likeliest_token": float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        "loss_tanh": losses[0], "loss_erf": losses[1],
        "greedy_texts_that_part": int((texts[0] != texts[1]).any(1).sum()), "greedy_texts": len(texts[0]),
    }  # fmt: skip


def conv1d_and_linear(directory: str) -> float:
    """Return the largest difference between a block's Conv1D and a Linear with the transposed matrix, in float32."""
    model, _ = load_model(directory)
    conv = model.transformer.h[0].mlp.c_fc
    linear = torch.nn.Linear(*conv.weight.shape)
    linear.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})
    x = torch.randn(4, 64, conv.weight.shape[0], generator=torch.Generator().manual_seed(0))
    return float((conv(x) - linear(x)).abs().max().detach())


@torch.no_grad()
def single_heads(directory: str, batches: list[torch.Tensor]) -> dict[str, object]:
    """Set each head's output to zero, one at a time, and measure how much the loss rises."""
    model, _ = load_model(directory)
    whole, width = mean_loss(model, batches), model.config.n_embd // model.config.n_head
    costs = []
    for block in model.transformer.h:
        weight, row = block.attn.c_proj.weight, []
        for head in range(model.config.n_head):
            part = slice(head * width, (head + 1) * width)
            kept = weight[part].clone()
            weight[part] = 0
            row.append(mean_loss(model, batches) - whole)
            weight[part] = kept
        costs.append(row)
    return {"loss": whole, "rise_without_head": costs}


def main() -> None:
    """Read the options, measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--positions", type=int, help="number of positions for the comparison of GELUs")
    parser.add_argument("--sequences", type=int, default=32, help="number of blocks of the test split")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    options = parser.parse_args()
    blocks = load_packed_dataset(options.data).test
    batches = calibration_batches(blocks, options.sequences, torch.device("cpu"))
    length = options.positions or blocks.sequence_length
    count = options.sequences * blocks.sequence_length // length * length // blocks.sequence_length
    texts = blocks.batch(range(count)).input_ids.view(-1, length) if options.positions else torch.cat(batches)
    with fast_products():
        found = {
            "gelu": gelu_drift(options.model, texts),
            "conv1d_and_linear": conv1d_and_linear(options.model),
            "heads": single_heads(options.model, batches),
        }
    print(json.dumps(found, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
