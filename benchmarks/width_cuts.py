"""Measure the held-out loss of students right after the cut and after the refit, before any training.

    python benchmarks/width_cuts.py --teacher TEACHER --data DATA --results FILE [--json]

Every case is a set of options of `truncate-student`. A finished case is a line of FILE and is not run again, so the
command continues where it stopped. Parts are chosen and fitted on blocks of the dataset's training split. Losses are
those of blocks of its test split, in nats per token. The table shows them above the teacher's loss on the same blocks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from tinygpt2 import TruncateStudentConfig
from tinygpt2.compression.calibration import Batches, calibration_batches, mean_loss
from tinygpt2.compression.cut import KeptParts, cut_model
from tinygpt2.compression.least_squares import refit
from tinygpt2.compression.measurements import Measurements
from tinygpt2.compression.rotation import principal_rotation, stream_moments
from tinygpt2.compression.taps import tap
from tinygpt2.compression.truncate import choose_parts
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.models.loading import load_model
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.cpu import fast_products

STRATEGIES = ("first", "middle", "last", "alternate", "uniform", "importance")


def cases(shape: Any) -> dict[str, dict[str, Any]]:
    """Return the options of every case by its name. Names that end in `turned only` cut nothing."""
    found: dict[str, dict[str, Any]] = {}
    head = shape.n_embd // shape.n_head
    for name, width in (("half", shape.n_embd // 2), ("three quarters", 3 * shape.n_embd // 4)):
        fewer, sizes = {"n_head": width // head}, {"n_embd": width}
        found |= {
            f"{name}: coordinates, fewer heads": sizes | fewer | {"axes": "coordinates"},
            f"{name}: coordinates, narrower heads": sizes | {"axes": "coordinates"},
            f"{name}: rotated, fewer heads": sizes | fewer,
            f"{name}: rotated, narrower heads": sizes,
            f"{name}: rotated, narrower heads, inner units by activity": sizes | {"units": "active"},
            f"{name}: rotated, narrower heads, head of its own": sizes | {"untie_head": True},
        }
    found |= {
        "full: turned only": {"n_embd": shape.n_embd},
        "full: turned only, head of its own": {"n_embd": shape.n_embd, "untie_head": True},
    }
    half = {"num_layers": shape.n_layer // 2}
    found |= {f"half the blocks: {name}": half | {"strategy": name} for name in STRATEGIES}
    if shape.n_layer <= 6:  # every choice that keeps the first block
        rest = itertools.combinations(range(1, shape.n_layer), shape.n_layer // 2 - 1)
        chosen = [",".join(map(str, (0, *others))) for others in rest]
        found |= {f"half the blocks: {layers}": {"layers": layers} for layers in chosen}
    both = half | {"n_embd": shape.n_embd // 2}
    return found | {
        "half of both: coordinates, fewer heads": both | {"axes": "coordinates", "n_head": shape.n_head // 2},
        "half of both: rotated, narrower heads": both,
    }


def measure(
    teacher: GPT2LMHeadModel, options: dict[str, Any], name: str, batches: Batches, held_out: Batches
) -> dict[str, Any]:
    """Cut, measure, refit and measure again. Losses are in nats per token, times in seconds."""
    active = options.pop("units", None)
    config = TruncateStudentConfig(teacher="", out="", data="data", refit=True, **options)
    begun = time.perf_counter()
    kept, _ = choose_parts(config, Measurements(teacher, batches), (teacher.config.n_positions, "first"))
    if "turned only" in name:
        tied = not config.untie_head
        moments = stream_moments(teacher, batches, tied=tied)
        kept = replace(kept, dimensions=principal_rotation(teacher, moments, kept.layers, kept.width, tied=tied))
    if active:
        kept = replace(kept, inner=by_activity(teacher, kept, batches))
    student = cut_model(teacher, kept)
    chosen = time.perf_counter() - begun
    before, after, fitted = mean_loss(student, held_out), None, 0.0
    if "turned only" not in name:
        begun = time.perf_counter()
        refit(student, teacher, kept, batches)
        after, fitted = mean_loss(student, held_out), time.perf_counter() - begun
    return {
        "cut": before, "refit": after, "parameters": count_parameters(student), "layers": kept.layers,
        "seconds": {"cut": round(chosen, 1), "refit": round(fitted, 1)},
    }  # fmt: skip


def by_activity(teacher: GPT2LMHeadModel, kept: KeptParts, batches: Batches) -> list[torch.Tensor]:
    """Return the inner units with the largest mean absolute activation, as many as are kept."""
    scores = [torch.zeros(len(block.mlp.c_proj.weight)) for block in teacher.transformer.h]
    taps = {
        block.mlp.c_proj: lambda x, score=score: score.add_(x.abs().sum((0, 1)))
        for block, score in zip(teacher.transformer.h, scores, strict=True)
    }
    with torch.no_grad():
        for ids in batches:
            tap(teacher, ids, taps)
    chosen = zip(kept.layers, kept.inner, strict=True)
    return [scores[layer].topk(len(units)).indices.sort().values for layer, units in chosen]


def main() -> None:
    """Run the cases that are missing and print all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--results", type=Path, required=True, help="file with a line of JSON for each finished case")
    parser.add_argument("--calibration-sequences", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=64, help="number of blocks of the test split to measure on")
    parser.add_argument("--cases", default="", help="only cases whose names contain this")
    parser.add_argument("--json", action="store_true", help="print JSON on one line instead of a table")
    options = parser.parse_args()
    done: dict[str, Any] = {}
    if options.results.is_file():
        done = {line["case"]: line for line in map(json.loads, options.results.read_text("utf-8").splitlines())}
    teacher, _ = load_model(options.teacher)
    data, device = load_packed_dataset(options.data), torch.device("cpu")
    batches = calibration_batches(data.train, options.calibration_sequences, device)
    held_out = calibration_batches(data.test, options.sequences, device)
    with fast_products():
        missing = {k: v for k, v in cases(teacher.config).items() if k not in done and options.cases in k}
        loss = mean_loss(teacher, held_out) if missing else 0.0
        for name, asked in missing.items():
            found = measure(teacher, asked, name, batches, held_out)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            done[name] = {"case": name, "teacher": loss, **found, "peak_memory_bytes": peak}
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[name]) + "\n")
    if options.json:
        print(json.dumps(list(done.values())))
        return
    print("| case | cut | refitted | parameters | seconds |\n|---|---|---|---|---|")
    for name, line in done.items():
        after = "" if line["refit"] is None else f"{line['refit'] - line['teacher']:.3f}"
        seconds = line["seconds"]["cut"] + line["seconds"]["refit"]
        print(f"| {name} | {line['cut'] - line['teacher']:.3f} | {after} | {line['parameters']:,} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
