"""Compare students that are rounded to q8_0 and q4_0 after training with students that are trained with rounding.

    python benchmarks/quantize.py --work WORK       # continues where it stopped, then prints the tables
    python benchmarks/quantize.py --report          # the tables, from the results alone

The students `half` and `fifth`, the teacher, the texts and the number of tokens are those of the study of recipes (see
docs/recipes.md), and the recipe is the default of `distill`. All students of a size and seed see the same tokens in the
same order. Every measured student is a line of benchmarks/quantization/results.jsonl and is not measured again.

For each size, the order of the runs is: the student that is rounded after training, then those that are trained with
rounding, from the first step on and in the second half of the run.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes import Study, block_losses, grouped

from tinygpt2 import DistillConfig, distill
from tinygpt2.data.dataset import Blocks, load_packed_dataset
from tinygpt2.models.loading import load_model
from tinygpt2.models.quantization import rounded
from tinygpt2.models.saving import save_model
from tinygpt2.runtime.cpu import fast_products

RESULTS = Path(__file__).parent / "quantization" / "results.jsonl"
SIZES = ("half", "fifth")
STARTS = {"q4_0": (0.0, 0.5), "q8_0": (0.0,)}  # values of --quantize-from
BLOCKS = 600  # held-out blocks, as in the finals of the study of recipes


@dataclass(frozen=True)
class Run:
    """One student to train: without rounding (`type` is None), or with rounding from a share of the steps on."""

    size: str
    type: str | None
    start: float | None
    tokens: int
    seed: int

    @property
    def students(self) -> dict[str, str | None]:
        """What is measured of it: names, and the type to which the trained student is rounded, if it is not yet."""
        if self.type is not None:
            return {f"{self.type}, trained with it from {self.start:.0%} of the steps on": None}
        return {"float32": None} | {f"{kind}, rounded after training": kind for kind in STARTS}


def runs(sizes: Sequence[str], tokens: int, seeds: list[int]) -> Iterator[Run]:
    """Yield all runs, in the order in which they are done."""
    for seed, size in itertools.product(seeds, sizes):
        yield Run(size, None, None, tokens, seed)
        for kind, starts in STARTS.items():
            for start in starts:
                yield Run(size, kind, start, tokens, seed)


def train(study: Study, run: Run, blocks: int) -> None:
    """Train a student and add a line of results for each name in `run.students`. Skip what has its line already."""
    known = {"stage": "quantize", "size": run.size, "tokens": run.tokens, "seed": run.seed}
    done = [line["weights"] for line in study.lines("quantize") if known.items() <= line.items()]
    missing = {name: kind for name, kind in run.students.items() if name not in done}
    if not missing:
        return
    print(f"{datetime.datetime.now():%H:%M:%S} {asdict(run)}", flush=True)
    out = study.work / "runs" / "quantize" / "-".join(map(str, asdict(run).values()))
    shutil.rmtree(out, ignore_errors=True)  # an interrupted run starts again
    batch = study.plan["common"]["micro_batch_size"] * study.plan["sequence_length"]
    rounding = {} if run.type is None else {"quantize": run.type, "quantize_from": run.start}
    config = DistillConfig(
        teacher=study.teacher, student=str(study.work / run.size), data=str(study.work / "data"), out=str(out),
        teacher_cache=str(study.work / "cache"), max_steps=round(run.tokens / batch), seed=run.seed,
        eval_data=str(study.work / "curve.txt"), save_every=10**6, **study.plan["common"], **rounding,
    )  # fmt: skip
    result = distill(config)
    held_out: Blocks = load_packed_dataset(str(study.work / "data")).test
    for name, kind in missing.items():
        losses = block_losses(str(out if kind is None else round_model(out, kind)), held_out, blocks)
        line = {**known, "weights": name, "loss": statistics.mean(losses), "groups": grouped(losses)}
        study.write(line | {"seconds": round(result.seconds, 1)})


def round_model(model: Path, kind: str) -> Path:
    """Save a copy of a model with the weights that an export of this type stores; return its directory."""
    out = model / kind
    student, _ = load_model(str(model))
    student.load_state_dict({name: rounded(name, one, kind) for name, one in student.state_dict().items()})
    save_model(student, out, None, f"The model of the directory above, rounded to {kind}.")
    return out


def table(lines: list[dict[str, Any]], size: str) -> Iterator[str]:
    """Yield the rows of a Markdown table of one size: mean loss over the seeds, and paired differences."""
    yield "| weights | seeds | loss | above float32 | above rounding after training |"
    yield "|---|---|---|---|---|"
    own: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        if line["size"] == size:
            own.setdefault(line["weights"], {})[line["seed"]] = line
    names = dict.fromkeys(name for run in runs([size], 0, [0]) for name in run.students)
    for name in (one for one in names if one in own):
        found = own[name]
        afterwards = f"{name.split(',')[0]}, rounded after training"
        cells = [
            "-" if name in (other, "float32") else difference(found, own.get(other, {}))
            for other in ("float32", afterwards)
        ]
        loss = statistics.mean(line["loss"] for line in found.values())
        yield f"| {name} | {', '.join(map(str, sorted(found)))} | {loss:.4f} | {' | '.join(cells)} |"


def difference(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> str:
    """Return how much higher our losses are: mean over the seeds of both, standard error over groups of blocks."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return ""
    both = [zip(ours[seed]["groups"], theirs[seed]["groups"], strict=True) for seed in seeds]
    pairs = [statistics.mean(parts) for parts in zip(*([a - b for a, b in one] for one in both), strict=True)]
    mean = statistics.mean(ours[seed]["loss"] - theirs[seed]["loss"] for seed in seeds)
    error = f" +- {statistics.stdev(pairs) / math.sqrt(len(pairs)):.4f}" if len(pairs) > 1 else ""
    return f"{mean:+.4f}{error}"


def main() -> None:
    """Run what has no results yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="directory for texts, datasets, students and runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tokens", type=int, default=307_200, help="tokens that each student sees")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="repeat everything with each of these seeds")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="held-out blocks to measure on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no new run after this many minutes")
    parser.add_argument("--report", action="store_true", help="print the tables, and run nothing")
    options = parser.parse_args()
    if not options.report:
        if options.work is None:
            parser.error("give --work or --report")
        for folder in (options.work, options.results.parent):
            folder.mkdir(parents=True, exist_ok=True)
        study, begun = Study(options.work, options.results), time.monotonic()
        with fast_products():
            study.prepare(*SIZES)
            for run in runs(SIZES, options.tokens, options.seeds):
                if time.monotonic() - begun < 60 * options.minutes:
                    train(study, run, options.blocks)
    if not options.results.is_file():
        raise SystemExit(f"{options.results} does not exist: nothing was run yet")
    lines = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    wanted = [line for line in lines if line["tokens"] == options.tokens and line["seed"] in options.seeds]
    for size in SIZES:
        print(f"\n{size}, {options.tokens:,} tokens\n")
        print("\n".join(table(wanted, size)))


if __name__ == "__main__":
    main()
