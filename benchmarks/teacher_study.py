"""Compare what the same student gets from two teachers of equal held-out loss, with the same tokens.

    python benchmarks/llama_teacher.py --work WORK --out WORK/llama       # first: the Llama-shaped teacher
    python benchmarks/teacher_study.py --work WORK --llama WORK/llama     # continues where it stopped
    python benchmarks/teacher_study.py --report                           # the table, from the results alone

The student is `half` of the study of recipes (see docs/recipes.md): 3 of the GPT-2 teacher's 6 layers, cut and
refitted, or random weights of that shape, because a cut already has something of the GPT-2 teacher. Texts, tokens and
their order are that study's, and the recipe is the default of `distill`. Every finished run is a line of
benchmarks/teachers/results.jsonl and is not run again.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llama_teacher import mean_loss, spaced
from recipes import Study, begun_within, block_losses, grouped
from result_lines import finished_runs, is_finished
from transformers import AutoModelForCausalLM

from tinygpt2 import DistillConfig, distill
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.runtime.cpu import fast_products

RESULTS = Path(__file__).parent / "teachers" / "results.jsonl"
BLOCKS = 600  # held-out blocks, as in the finals of the study of recipes
TEACHERS = ("gpt2", "llama")
SEEDS = (1, 2)
# Learning rates of each start. None is the default of `distill`; random weights need a higher one.
RATES: dict[str, tuple[float | None, ...]] = {"cut": (None,), "random": (None, 0.004)}


@dataclass(frozen=True)
class Run:
    """One student to train. These values also identify its line of results."""

    teacher: str
    start: str
    rate: float | None
    seed: int
    tokens: int


def runs(tokens: int) -> Iterator[Run]:
    """Yield all runs. Both teachers take turns, so that a study that stops early still compares them."""
    for seed in SEEDS:
        for start, rates in RATES.items():
            for rate in rates:
                for teacher in TEACHERS:
                    yield Run(teacher, start, rate, seed, tokens)


def train(study: Study, run: Run, teacher: str) -> None:
    """Train one student and write its line of results. Skip it if the line exists already."""
    known = asdict(run)
    if is_finished(study.results, known):
        return
    print(known, flush=True)
    data, out = study.work / "data", study.work / "teachers" / "-".join(map(str, known.values()))
    shutil.rmtree(out, ignore_errors=True)  # an interrupted run starts again
    batch = study.plan["common"]["micro_batch_size"]
    start = study.work / "half" / ("config.json" if run.start == "random" else "")
    result: Any = distill(
        DistillConfig(
            teacher=teacher, student=str(start), data=str(data), out=str(out), seed=run.seed, learning_rate=run.rate,
            max_steps=run.tokens // (batch * study.plan["sequence_length"]), save_every=10**6, **study.plan["common"],
        )
    )  # fmt: skip
    test = load_packed_dataset(str(data)).test
    losses = block_losses(str(out), test, BLOCKS)
    original = AutoModelForCausalLM.from_pretrained(teacher)
    study.write(
        {
            **known, "loss": float(np.mean(losses)), "groups": grouped(losses), "seconds": round(result.seconds, 1),
            "parameters": result.parameters, "teacher_parameters": original.num_parameters(),
            "teacher_loss": mean_loss(original, spaced(test, BLOCKS)),
        }
    )  # fmt: skip


def report(found: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table: losses of the students, and paired differences between the teachers."""
    if not found:
        return "no run is finished"
    teachers = sorted({f"{line['teacher']} {line['teacher_loss']:.4f}" for line in found})
    table = [
        f"Held-out losses of the teachers, in nats per token: {', '.join(teachers)}",
        "",
        "| start | learning rate | from gpt2 | from llama | difference, llama - gpt2 |",
        "|---|---|---|---|---|",
    ]
    for start, rates in RATES.items():
        for rate in rates:
            by_seed = {
                name: {
                    line["seed"]: line for line in found
                    if (line["teacher"], line["start"], line["rate"]) == (name, start, rate)
                }
                for name in TEACHERS
            }  # fmt: skip
            cells = [
                ", ".join(f"{line['loss']:.4f}" for _, line in sorted(by_seed[name].items())) or "-"
                for name in TEACHERS
            ]
            both = sorted(by_seed["gpt2"].keys() & by_seed["llama"].keys())
            cells.append(difference(*([by_seed[name][seed]["groups"] for seed in both] for name in TEACHERS)))
            table.append(f"| {start} | {'default' if rate is None else rate} | {' | '.join(cells)} |")
    return "\n".join(table)


def difference(gpt2: list[list[float]], llama: list[list[float]]) -> str:
    """Return the mean difference over the seeds that both have, and its paired standard error over groups of blocks."""
    if not gpt2:
        return "-"
    gaps = [b - a for a, b in zip(np.mean(gpt2, axis=0), np.mean(llama, axis=0), strict=True)]
    return f"{statistics.mean(gaps):+.4f} +- {statistics.stdev(gaps) / math.sqrt(len(gaps)):.4f}"


def main() -> None:
    """Do the runs that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="directory for texts, datasets, students and runs")
    parser.add_argument("--llama", help="the teacher that llama_teacher.py made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tokens", type=int, default=307_200, help="tokens that each student sees")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no new run after this many minutes")
    parser.add_argument("--report", action="store_true", help="only print the table of the results so far")
    options = parser.parse_args()
    if not options.report:
        if options.work is None or options.llama is None:
            parser.error("give --work and --llama, or --report")
        options.work.mkdir(parents=True, exist_ok=True)
        study = Study(options.work, options.results)
        with fast_products():
            study.prepare()
            for run in begun_within(options.minutes, runs(options.tokens)):
                train(study, run, study.teacher if run.teacher == "gpt2" else options.llama)
    print(report(finished_runs(options.results)))


if __name__ == "__main__":
    main()
