"""Measure the held-out loss of students right after the cut, before any training, for several ways to cut.

    python benchmarks/students.py --teacher TEACHER --data DATA --json

Depth: every strategy at the same number of layers.

Width: heads and inner units by activation, with dimensions by a first-order estimate of the loss (as truncate-student
chooses them) or by activation (as it chooses them with `--refit`). These are compared with the first heads, units and
dimensions, and with random ones.

Each student is measured as cut and with refitted output projections. Importance and refits use the dataset's training
split. Losses are measured on its test split, in nats per token.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch

from tinygpt2 import TruncateStudentConfig
from tinygpt2.compression.calibration import calibration_batches, mean_loss
from tinygpt2.compression.cut import KeptParts, choose_layers, cut_model
from tinygpt2.compression.importance import active_dimensions, depth_importance, important_dimensions, width_importance
from tinygpt2.compression.least_squares import refit
from tinygpt2.compression.sizes import sizes_of
from tinygpt2.compression.truncate import _top
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.models.loading import load_model
from tinygpt2.runtime.cpu import fast_products

STRATEGIES = ("first", "middle", "last", "alternate", "uniform", "distilgpt2")


def main() -> None:
    """Read the options, measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--num-layers", type=int, help="number of layers to keep; half of the teacher's by default")
    parser.add_argument("--n-embd", type=int, help="hidden size to keep; half of the teacher's by default")
    parser.add_argument("--calibration-sequences", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=256, help="number of blocks of the test split to measure on")
    parser.add_argument("--seeds", type=int, default=3, help="number of random choices")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    options = parser.parse_args()
    with fast_products():
        found = measure(options)
    print(json.dumps(found, indent=None if options.json else 2))


def measure(options: argparse.Namespace) -> dict[str, object]:
    teacher, _ = load_model(options.teacher)
    data, shape, device = load_packed_dataset(options.data), teacher.config, torch.device("cpu")
    batches = calibration_batches(data.train, options.calibration_sequences, device)
    held_out = calibration_batches(data.test, options.sequences, device)
    layers = options.num_layers or shape.n_layer // 2
    asked = TruncateStudentConfig(
        teacher="", out="", data="", n_embd=options.n_embd or shape.n_embd // 2, num_layers=layers
    )
    width, heads, inner = sizes_of(asked, shape)
    head_width = shape.n_embd // shape.n_head
    positions = (shape.n_positions, "first")

    def losses(kept: KeptParts) -> dict[str, float]:
        student = cut_model(teacher, kept)
        before = mean_loss(student, held_out)
        refit(student, teacher, kept.layers, kept.dimensions, batches)
        return {"cut": before, "refit": mean_loss(student, held_out)}

    def whole(layers: list[int]) -> KeptParts:
        sizes = (shape.n_embd, shape.n_head, shape.n_inner or 4 * shape.n_embd)
        dims, all_heads, units = (torch.arange(size) for size in sizes)
        return KeptParts(layers, dims, [all_heads] * len(layers), [units] * len(layers), positions)

    def narrow(layers: list[int], choose: Callable[[str, int, int], torch.Tensor]) -> KeptParts:
        return KeptParts(
            layers, choose("dimensions", -1, width), [choose("heads", layer, heads) for layer in layers],
            [choose("inner", layer, inner) for layer in layers], positions,
        )  # fmt: skip

    found = width_importance(teacher, batches)
    ways = {"important": important_dimensions, "active": active_dimensions}
    dimensions = {name: way(teacher, batches, width) for name, way in ways.items()}

    def measured(how: str) -> Callable[[str, int, int], torch.Tensor]:
        return lambda what, layer, count: (
            dimensions[how] if what == "dimensions" else _top(getattr(found, what)[layer], count)
        )

    sizes = {"dimensions": shape.n_embd, "heads": shape.n_head, "inner": shape.n_inner or 4 * shape.n_embd}
    every = list(range(shape.n_layer))
    depth = {name: losses(whole(choose_layers(shape.n_layer, layers, name))) for name in STRATEGIES}
    important = depth_importance(teacher, batches, layers).kept
    depth["importance"] = losses(whole(important)) | {"layers": important}
    randoms = []
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)

        def anyhow(what: str, _: int, count: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randperm(sizes[what], generator=generator)[:count].sort().values

        randoms.append(losses(narrow(every, anyhow)))
    return {
        "teacher": mean_loss(teacher, held_out),
        "tokens": sum(ids.numel() for ids in held_out),
        "depth": {"layers": layers, **depth},
        "width": {
            "n_embd, n_head, n_inner": [width, heads, inner], "head width": head_width,
            **{f"{how} dimensions": losses(narrow(every, measured(how))) for how in ways},
            "first": losses(narrow(every, lambda what, _, count: torch.arange(count))),
            "random": {key: statistics.mean(one[key] for one in randoms) for key in ("cut", "refit")},
            "random, each": randoms,
        },
        "both": {f"{how} dimensions": losses(narrow(important, measured(how))) for how in ways},
    }  # fmt: skip


if __name__ == "__main__":
    main()
