"""Measure how close the students of the study of recipes are to their teacher, on texts on which no choice was based.

    python benchmarks/fidelity.py --work WORK --json            # the smallest comparison: about 10 minutes on 2 cores
    python benchmarks/fidelity.py --work WORK --finals --json   # the finals of the first seed, at both sizes: hours

Trains the students again with the recorded learning rates (`recipes.py`; finished ones in WORK are kept) and measures
them with `ppl --reference`. Also says whether their order by KL is that by loss.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from recipes import HERE, Run, Study

from tinygpt2 import PplConfig, ppl
from tinygpt2.runtime.cpu import fast_products

KEYS = ("kl", "stderr", "kl_median", "kl_p99", "reverse_kl", "same_top", "acceptance", "loss_difference",
        "loss_difference_stderr", "calibration_error", "reference_calibration_error")  # fmt: skip


def runs_of(study: Study, *, finals: bool) -> list[Run]:
    """Return the runs whose students are measured."""
    if not finals:
        return list(study.smallest())
    tokens, seed = study.plan["final"]["tokens"], study.first_seed
    return [
        Run("final", size, recipe, study.tried(recipe, size)[1], tokens, seed)
        for size, recipe in itertools.product(study.plan["sizes"], study.chosen())
    ]


def student_of(study: Study, run: Run) -> str:
    """Return the directory of a run's student: that of its last stage."""
    stages = study.plan["recipes"][run.recipe]["stages"]
    values = (run.stage, run.size, run.recipe, run.rate, run.tokens, run.seed)
    return str(study.work / "runs" / study.results.stem / "-".join(map(str, values)) / f"stage-{len(stages) - 1}")


def turned(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the pairs of students of one size that loss and KL rank differently, on one text."""
    return [
        [a["student"], b["student"]]
        for a, b in itertools.combinations(rows, 2)
        if a["size"] == b["size"] and (a["loss"] - b["loss"]) * (a["kl"] - b["kl"]) < 0
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="directory for texts, datasets, students and runs")
    parser.add_argument("--finals", action="store_true", help="the finals instead of the smallest comparison")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    recorded, again = Study(options.work, HERE / "results.jsonl"), Study(options.work, options.work / "fidelity.jsonl")
    texts = [again.work / "check" / again.plan["check"]["novel"]]
    texts += [again.shared / name for name in again.plan["check"]["texts"]]
    with fast_products():
        again.prepare()
        runs = runs_of(recorded, finals=options.finals)
        for run in runs:
            again.train(run)
    students = {student_of(again, run): run for run in runs}
    measured = ppl(PplConfig(model=list(students), reference=again.teacher, task=[str(text) for text in texts])).results
    table: dict[str, list[dict[str, Any]]] = {text.name: [] for text in texts}
    for row in measured:
        run = students[row.model]
        figures = {key: getattr(row.fidelity, key) for key in KEYS}
        one = {"student": f"{run.size} {run.recipe}", "size": run.size, "loss": row.loss, "tokens": row.tokens}
        table[Path(row.task).name].append({**one, **figures})
    result = {"texts": table, "ranked_differently": {name: turned(rows) for name, rows in table.items()}}
    if options.json:
        print(json.dumps(result))
        return
    for name, rows in table.items():
        print(f"\n{name}\n\n| student | loss | KL | reverse KL | same top | acceptance | calibration |")
        print("|---|---|---|---|---|---|---|")
        for one in sorted(rows, key=lambda one: one["kl"]):
            print(
                f"| {one['student']} | {one['loss']:.4f} | {one['kl']:.4f} ± {one['stderr']:.4f} | "
                f"{one['reverse_kl']:.4f} | {one['same_top']:.2%} | {one['acceptance']:.2%} | "
                f"{one['calibration_error']:.2%} |"
            )
        print(f"\nranked differently by loss and by KL: {result['ranked_differently'][name] or 'none'}")


if __name__ == "__main__":
    main()
