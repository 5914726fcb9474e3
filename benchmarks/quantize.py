"""Measure what rounding to q8_0 and q4_0 costs: after training, and if the student is trained with rounded weights.

    TINYGPT2_TEST_DATA=DATA python benchmarks/quantize.py --work WORK --json   # continues where it stopped

The students `half` and `fifth`, the teacher, the texts and the number of tokens are those of
benchmarks/recipes/plan.yaml; recipe and learning rate are the defaults of `distill`. All students of a size see the
same tokens in the same order.

Each figure is a held-out loss in nats per token, and its difference from the student that was never rounded, paired by
block, with the standard error over groups of neighbouring blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes import Study, block_losses, grouped

from tinygpt2 import DistillConfig, distill
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.models.loading import load_model
from tinygpt2.models.quantization import rounded
from tinygpt2.runtime.cpu import fast_products

STARTS = {"q8_0": (0.5,), "q4_0": (0.0, 0.5, 0.75, 0.9)}  # values of --quantize-from
BLOCKS = 600  # held-out blocks to measure on


def main() -> None:
    """Train what is not trained yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for datasets, students and results")
    parser.add_argument("--tokens", type=int, help="tokens to train on; those of the plan's finals by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="a seed for each repetition")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    study = Study(options.work, options.work / "quantize.jsonl")
    tokens = options.tokens or study.plan["final"]["tokens"]
    with fast_products():
        study.prepare()
        for size in study.plan["sizes"]:
            for seed in options.seeds:
                train(study, size, tokens, seed)
    rows = list(table(study, tokens, options.seeds))
    if options.json:
        print(json.dumps({"tokens": tokens, "rows": rows}))
        return
    for row in rows:
        spread = "" if row["stderr"] is None else f"  {row['difference']:+.4f} +- {row['stderr']:.4f}"
        print(f"{row['size']:>6}  seed {row['seed']}  {row['weights']:<28} {row['loss']:.4f}{spread}")


def train(study: Study, size: str, tokens: int, seed: int) -> None:
    """Train a student without rounding and one for each start of it; write a line of results for each."""
    held_out = load_packed_dataset(str(study.work / "data")).test
    for kind, start in [(None, None), *((kind, start) for kind, starts in STARTS.items() for start in starts)]:
        name = "float32" if kind is None else f"{kind}, rounded from {start:g} on"
        known = {"stage": "quantize", "size": size, "tokens": tokens, "seed": seed}
        if any({**known, "weights": name}.items() <= line.items() for line in study.lines("quantize")):
            continue
        out = study.work / "runs" / f"quantize-{size}-{tokens}-{seed}-{kind}-{start}"
        rounding = {} if kind is None else {"quantize": kind, "quantize_from": start}
        steps = round(tokens / (4 * study.plan["sequence_length"]))
        config = DistillConfig(
            teacher=study.teacher, student=str(study.work / size), data=str(study.work / "data"), out=str(out),
            teacher_cache=str(study.work / "cache"), max_steps=steps, seed=seed, eval_blocks=8, save_every=10**6,
            resume=out.exists(), **study.plan["common"], **rounding,
        )  # fmt: skip
        result = distill(config)
        seconds = {"seconds": round(result.seconds, 1)}
        if kind is None:  # the same student, rounded afterwards
            for plain in STARTS:
                losses = block_losses(str(_rounded(out, plain)), held_out, BLOCKS)
                weights = f"{plain}, rounded afterwards"
                study.write({**known, "weights": weights, "loss": statistics.mean(losses), "groups": grouped(losses)})
        losses = block_losses(str(out), held_out, BLOCKS)
        study.write({**known, "weights": name, "loss": statistics.mean(losses), "groups": grouped(losses), **seconds})


def _rounded(model: Path, kind: str) -> Path:
    """Save a model whose weights are rounded as an export of this type would round them."""
    out = model.with_name(f"{model.name}-{kind}")
    student, _ = load_model(str(model))
    student.load_state_dict({name: rounded(name, one, kind) for name, one in student.state_dict().items()})
    shutil.rmtree(out, ignore_errors=True)
    student.save_pretrained(str(out))
    return out


def table(study: Study, tokens: int, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Yield each student's loss, and its difference from the one of its size and seed that was never rounded."""
    lines = [one for one in study.lines("quantize") if one["tokens"] == tokens and one["seed"] in seeds]
    plain = {(one["size"], one["seed"]): one for one in lines if one["weights"] == "float32"}
    for line in sorted(lines, key=lambda one: (one["size"], one["seed"], one["weights"])):
        other = plain[line["size"], line["seed"]]
        pairs = [a - b for a, b in zip(line["groups"], other["groups"], strict=True)]
        error = None if line is other else statistics.stdev(pairs) / math.sqrt(len(pairs))
        yield {
            **{key: line[key] for key in ("size", "seed", "weights", "loss")},
            "difference": line["loss"] - other["loss"], "stderr": error, "seconds": line.get("seconds"),
        }  # fmt: skip


if __name__ == "__main__":
    main()
