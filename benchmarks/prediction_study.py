"""Compare students that learn from a cache of a teacher's predictions with students that learn from the teacher itself.

    python benchmarks/prediction_study.py --work WORK      # continues where it stopped
    python benchmarks/prediction_study.py --report         # the table, from the results alone
    python benchmarks/prediction_study.py --report --json

The student is `half` of the study of recipes (see docs/recipes.md): 3 of the teacher's 6 layers, cut and refitted.
Texts, tokens and their order are that study's, and the recipe is the default of `distill`, forward KL. `exact` is KL
over the whole vocabulary; `samples` and `top` learn from what `distill --teacher-cache-kind` keeps of it in 196 bytes a
token. Every finished run is a line of benchmarks/predictions/results.jsonl and is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from recipes import Study, begun_within, block_losses, grouped
from result_lines import finished_runs, is_finished

from tinygpt2 import DistillConfig, distill
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.runtime.cpu import fast_products

RESULTS = Path(__file__).parent / "predictions" / "results.jsonl"
BLOCKS = 600  # held-out blocks, as in the finals of the study of recipes
KINDS = ("exact", "samples", "top")
SEEDS = (1, 2)


def train(study: Study, kind: str, seed: int, tokens: int) -> None:
    """Train one student and write its line of results. Skip it if the line exists already."""
    known = {"kind": kind, "seed": seed, "tokens": tokens}
    if is_finished(study.results, known):
        return
    print(known, flush=True)
    data, out = study.work / "data", study.work / "predictions" / f"{kind}-{seed}-{tokens}"
    shutil.rmtree(out, ignore_errors=True)  # an interrupted run starts again
    cache: dict[str, Any] = {}
    if kind != "exact":  # with the teacher, so that only the blocks of this run are computed
        cache = {"teacher_cache": str(study.work / "predictions" / "cache"), "teacher_cache_kind": kind}
    batch = study.plan["common"]["micro_batch_size"]
    result: Any = distill(
        DistillConfig(
            teacher=study.teacher, student=str(study.work / "half"), data=str(data), out=str(out), seed=seed,
            max_steps=tokens // (batch * study.plan["sequence_length"]), save_every=10**6, **cache,
            **study.plan["common"],
        )
    )  # fmt: skip
    losses = block_losses(str(out), load_packed_dataset(str(data)).test, BLOCKS)
    study.write(
        {
            **known, "loss": float(np.mean(losses)), "groups": grouped(losses), "seconds": round(result.seconds, 1),
            "training_loss": result.loss,
        }
    )  # fmt: skip


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the losses by kind and seed, and the differences from exact KL with their paired standard errors."""
    by_kind = {kind: {line["seed"]: line for line in found if line["kind"] == kind} for kind in KINDS}
    rows = {}
    for kind, own in by_kind.items():
        row: dict[str, Any] = {"loss": {seed: line["loss"] for seed, line in sorted(own.items())}}
        both = sorted(own.keys() & by_kind["exact"].keys())
        if kind != "exact" and both:
            means = [np.mean([by_kind[name][seed]["groups"] for seed in both], axis=0) for name in (kind, "exact")]
            gaps = [float(gap) for gap in means[0] - means[1]]
            row |= {"difference": statistics.mean(gaps), "stderr": statistics.stdev(gaps) / math.sqrt(len(gaps))}
        rows[kind] = row
    return rows


def report(rows: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    table = ["| learns from | held-out loss, by seed | difference from exact KL |", "|---|---|---|"]
    for kind, row in rows.items():
        losses = ", ".join(f"{loss:.4f}" for loss in row["loss"].values()) or "-"
        gap = f"{row['difference']:+.4f} +- {row['stderr']:.4f}" if "difference" in row else "-"
        table.append(f"| {kind} | {losses} | {gap} |")
    return "\n".join(table)


def main() -> None:
    """Do the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="directory for texts, datasets, students and runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tokens", type=int, default=307_200, help="tokens that each student sees")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no new run after this many minutes")
    parser.add_argument("--report", action="store_true", help="only print the results so far")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    options = parser.parse_args()
    if not options.report:
        if options.work is None:
            parser.error("give --work, or --report")
        options.work.mkdir(parents=True, exist_ok=True)
        study = Study(options.work, options.results)
        with fast_products():
            study.prepare()
            for seed, kind in begun_within(options.minutes, itertools.product(SEEDS, KINDS)):
                train(study, kind, seed, options.tokens)
    rows = summary(finished_runs(options.results))
    print(json.dumps(rows) if options.json else report(rows))


if __name__ == "__main__":
    main()
