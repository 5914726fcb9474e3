"""Find which recipe of `distill` wins at the lengths that people train: 0.3, 1, 3 and 10 million tokens.

    python benchmarks/long_recipes.py --work WORK                   # continues the plan where it stopped
    python benchmarks/long_recipes.py --work WORK --minutes 30      # starts no run after 30 minutes
    python benchmarks/long_recipes.py --work WORK --only ce         # only the recipes whose names begin so
    python benchmarks/long_recipes.py --report                      # writes the tables, from the results alone
    python benchmarks/long_recipes.py --work WORK --tiny            # tries everything with runs of five steps

The teacher, the texts and the students are those of the study of recipes (benchmarks/recipes.py), whose folder
TINYGPT2_TEST_DATA names; benchmarks/long_recipes/plan.yaml has what differs. Every finished run is a line of
benchmarks/long_recipes/results.jsonl and is not run again. The folder WORK is another one than that of the study of
recipes, because there are more novels in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pretraining import paired
from recipes import Run, Study, begun_within

from tinygpt2 import DistillConfig
from tinygpt2.planning.scaling_law import Law
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.training.schedule import peak_learning_rate

HERE = Path(__file__).parent / "long_recipes"
TINY = 5 * 4 * 256  # tokens of a run with --tiny


class LongStudy(Study):
    """The study of recipes with longer runs."""

    def __init__(self, work: Path, results: Path, tiny: bool) -> None:
        super().__init__(work, results)
        self.stage = (
            "screen" if tiny else "final"
        )  # as the study of recipes calls runs with few and many held-out blocks
        self.plan |= yaml.safe_load((HERE / "plan.yaml").read_text(encoding="utf-8"))
        if tiny:
            self.plan |= {
                "every": 40,
                "tokens": [TINY, 2 * TINY],
                "longest": dict.fromkeys(self.plan["sizes"], 2 * TINY),
            }
            self.plan["recipes"] = {
                name: {**recipe, "longest": 2 * TINY} for name, recipe in self.plan["recipes"].items()
            }

    def fitting(self, options: dict[str, Any], size: str, *, cached: bool) -> DistillConfig:
        """Adapt the options to the student's shape, without a cache, which would take gigabytes."""
        return super().fitting(options, size, cached=False)

    def rate(self, size: str, recipe: str) -> float:
        """Return the rate that the rule of `distill` gives the first stage of a recipe."""
        stage = {key: value for key, value in self.plan["recipes"][recipe]["stages"][0].items() if key != "share"}
        asked = DistillConfig(teacher="teacher", student="student", data="data", out="out", **stage)
        width = json.loads((self.work / size / "config.json").read_text(encoding="utf-8"))["n_embd"]
        return peak_learning_rate(asked.model_copy(update={"learning_rate": None}), width)

    def runs(self) -> Iterator[Run]:
        """Yield all runs: every recipe with its rate at every length, then other rates at the ends."""
        sizes, lengths, seed = self.plan["sizes"], self.plan["tokens"], self.plan["seed"]
        for factor in self.plan["factors"]:
            for recipe in self.plan["recipes"]:
                for size in sizes:
                    own = [tokens for tokens in lengths if tokens <= self.longest(size, recipe)]
                    for tokens in own if factor == 1 else sorted({own[0], own[-1]}):
                        yield Run(self.stage, size, recipe, factor * self.rate(size, recipe), tokens, seed)

    def longest(self, size: str, recipe: str) -> int:
        """Return the tokens of the longest run of a recipe for a student."""
        return min(self.plan["longest"][size], self.plan["recipes"][recipe].get("longest", math.inf))


def best(lines: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the line with the lowest loss of each recipe at each length, of the lines of one seed."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in sorted(lines, key=lambda one: one["loss"]):
        found.setdefault((line["recipe"], line["tokens"]), line)
    return found


def report(lines: list[dict[str, Any]]) -> str:
    """Return the tables of all lines."""
    text = ["# Recipes by length", "", "`benchmarks/long_recipes.py --report` writes this page from results.jsonl.", ""]
    text += ['Losses in nats per token on held-out novels, each recipe at the best of its rates. "+-" is the paired']
    text += ["standard error over groups of blocks.", ""]
    for size in dict.fromkeys(line["size"] for line in lines):
        seeds = sorted({line["seed"] for line in lines if line["size"] == size})
        own, *others = (best([one for one in lines if (one["size"], one["seed"]) == (size, seed)]) for seed in seeds)
        first = next(iter(own.values()))
        text += [f"## {size}: {first['parameters']:,} weights", ""]
        text += ["| recipe | tokens | tokens for each weight | rate | loss | above the default | seconds |"]
        text += ["|---|---|---|---|---|---|---|"]
        for (recipe, tokens), line in sorted(own.items(), key=lambda one: (one[0][1], one[1]["loss"])):
            base = own.get(("default", tokens))
            gap = "-" if base is None or base is line else "{:+.4f} +- {:.4f}".format(*paired(line, base))
            each = tokens / line["parameters"]
            text += [
                f"| {recipe} | {tokens:,} | {each:.2f} | {line['rate']:.3g} | {line['loss']:.4f} | {gap} | "
                f"{line['seconds']:,.0f} |"
            ]
        text += ["", *crossings(own)]
        for seed, again in zip(seeds[1:], others, strict=True):
            for (recipe, tokens), line in again.items():
                gap = ""
                if recipe != "default" and (base := again.get(("default", tokens))) is not None:
                    gap = ", {:+.4f} +- {:.4f} above the default".format(*paired(line, base))
                text += [f"- Seed {seed}, {recipe}, {tokens:,} tokens: {line['loss']:.4f}{gap}."]
        text += [""]
    return "\n".join(text)


def crossings(own: dict[tuple[str, int], dict[str, Any]]) -> Iterator[str]:
    """Yield for each recipe whether the law of its losses meets that of the default at a longer run."""
    laws, longest = {}, max(tokens for _, tokens in own)
    for recipe in dict.fromkeys(name for name, _ in own):
        lengths = sorted(tokens for name, tokens in own if name == recipe)
        try:
            laws[recipe] = Law(lengths, [own[recipe, tokens]["loss"] for tokens in lengths])
        except ValueError as error:
            yield f"- {recipe}: no law, {error}."
    for recipe, law in laws.items():
        if recipe == "default" or "default" not in laws:
            continue
        for times in np.geomspace(1, 16, 17):
            mine, other = law.at(longest * times), laws["default"].at(longest * times)
            if mine.loss < other.loss:
                error = math.hypot(mine.error, other.error)
                yield (
                    f"- {recipe} is predicted below the default from about {longest * times:,.0f} tokens on (there by "
                    f"{other.loss - mine.loss:.3f} +- {error:.3f})."
                )
                break
        else:
            yield f"- {recipe}: no crossing is predicted up to {16 * longest:,} tokens."


def main() -> None:
    """Continue the plan, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="directory for texts, datasets, students and runs")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no new run after this many minutes")
    parser.add_argument("--only", default="", help="only run the recipes whose names begin so")
    parser.add_argument("--size", help="only run students of this size")
    parser.add_argument("--longest", type=int, help="start no run with more tokens")
    parser.add_argument(
        "--tiny", action="store_true", help="try everything with runs of five steps, with results in WORK"
    )
    parser.add_argument("--report", action="store_true", help="write report.md beside the results")
    options = parser.parse_args()
    if options.report:
        lines = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
        options.results.with_name("report.md").write_text(report(lines), encoding="utf-8")
        return
    if options.work is None or "TINYGPT2_TEST_DATA" not in os.environ:
        raise SystemExit(
            "give --work, and set TINYGPT2_TEST_DATA to the folder that holds the plan's teacher and texts"
        )
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / "results.jsonl" if options.tiny else options.results
    study = LongStudy(options.work, results, options.tiny)
    runs = begun_within(options.minutes, study.runs())
    study.prepare()
    with fast_products():
        for run in runs:
            wanted = run.recipe.startswith(options.only) and options.size in (None, run.size)
            if wanted and run.tokens <= (options.longest or math.inf):
                study.train(run)
    if options.tiny:
        print(report(study.lines(study.stage)))


if __name__ == "__main__":
    main()
