"""Tables and pictures of the study of recipes, from its lines of results alone.

    python benchmarks/recipes_report.py

writes benchmarks/recipes/report.md, and into docs/images the held-out loss against tokens and against seconds, one
curve per recipe, and the final perplexity against the student's size.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).parent / "recipes"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
HALVED = ", half the rate"
PLAIN = "kl"  # what single changes are compared with
Line = dict[str, Any]


def main() -> None:
    """Read the lines, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    plan = yaml.safe_load((HERE / "plan.yaml").read_text(encoding="utf-8"))
    report = "\n".join(["# What was measured", "", *screened(lines, plan), *finals(lines, plan), *again(lines)])
    (HERE / "report.md").write_text(report + "\n", encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    draw(lines, plan)


def of(lines: list[Line], **known: Any) -> list[Line]:
    """Return the lines with these values."""
    return [line for line in lines if all(line.get(key) == value for key, value in known.items())]


def paired(ours: list[Line], theirs: list[Line], groups: str | None = None) -> tuple[float, float]:
    """Return by how much the mean loss of `theirs` lies above that of `ours`, and its paired standard error.

    The pairs are groups of neighbouring blocks, each a mean over the seeds that both have: the error is that of the
    choice of held-out text, not of the seeds.
    """

    def read(line: Line) -> Any:
        return np.array(line["groups"] if groups is None else line["checks"][groups])

    seeds = {line["seed"] for line in ours} & {line["seed"] for line in theirs}
    mean = [np.mean([read(line) for line in side if line["seed"] in seeds], axis=0) for side in (ours, theirs)]
    gap = mean[1] - mean[0]
    return float(gap.mean()), float(gap.std(ddof=1) / math.sqrt(len(gap)))


def screened(lines: list[Line], plan: dict[str, Any]) -> Iterator[str]:
    """Yield the screening: each recipe's loss at each rate, and at its best beside plain KL at its best."""
    screen, recipes = plan["screen"], plan["recipes"]
    asked = {recipe: how.get("rates", screen["rates"]) for recipe, how in recipes.items()}
    rates = sorted({rate for own in asked.values() for rate in own})
    found: dict[str, dict[float, Line]] = {recipe: {} for recipe in recipes}
    for line in of(lines, stage="screen"):
        found[line["recipe"]][line["rate"]] = line
    best = {recipe: min(own.values(), key=lambda line: line["loss"]) for recipe, own in found.items() if own}
    yield f"## Screening: {screen['size']}, {screen['tokens']:,} tokens, seed {screen['seed']}, nats per token"
    yield ""
    yield "| recipe | " + " | ".join(f"{rate:g}" for rate in rates) + f" | above {PLAIN} |"
    yield "|---" * (2 + len(rates)) + "|"
    for recipe in sorted(recipes, key=lambda name: best[name]["loss"] if name in best else math.inf):
        cells = ["not measured" if rate in asked[recipe] else "" for rate in rates]
        for number, rate in enumerate(rates):
            if rate in found[recipe]:
                loss = f"{found[recipe][rate]['loss']:.3f}"
                cells[number] = f"**{loss}**" if found[recipe][rate] is best[recipe] else loss
        above = "-"
        if recipe != PLAIN and {recipe, PLAIN} <= set(best):
            above = "{:+.3f} +- {:.3f}".format(*paired([best[PLAIN]], [best[recipe]]))
        yield f"| {recipe} | {' | '.join(cells)} | {above} |"
    yield ""


def speeds(lines: list[Line], size: str) -> dict[tuple[str, bool], float]:
    """Return tokens per second by recipe and whether the teacher's states were read from the cache."""
    return {(line["recipe"], line["cached"]): line["tokens_per_second"] for line in of(lines, stage="time", size=size)}


def ranked(lines: list[Line], size: str, stage: str = "final") -> dict[str, list[Line]]:
    """Return a size's finished lines by recipe, the best first; of seeds that all of them have.

    A recipe at half its rate of the screening, where the student is wider, is one of its own.
    """
    found: dict[str, list[Line]] = {}
    for line in of(lines, stage=stage, size=size):
        found.setdefault(line["recipe"], []).append(line)
    for line in of(lines, stage="other-rate", size=size) if stage == "final" else []:
        found.setdefault(f"{line['recipe']}{HALVED}", []).append(line)
    seeds = set.intersection(*({one["seed"] for one in own} for own in found.values())) if found else set()
    found = {recipe: [one for one in own if one["seed"] in seeds] for recipe, own in found.items()}
    return dict(sorted(found.items(), key=lambda item: statistics.mean(one["loss"] for one in item[1])))


def finals(lines: list[Line], plan: dict[str, Any]) -> Iterator[str]:
    """Yield for each size the recipes at equal tokens, and what equal time says."""
    for size in plan["sizes"]:
        by = ranked(lines, size)
        if not by:
            continue
        winner, speed = next(iter(by)), speeds(lines, size)
        first = by[winner][0]
        yield f"## {size}: {first['parameters']:,} parameters, {first['tokens']:,} tokens, seeds {seeds_of(by[winner])}"
        yield ""
        yield f"| recipe | rate | loss | perplexity | above {winner} | tokens/s | with the cache |"
        yield "|---" * 7 + "|"
        for recipe, own in by.items():
            loss = statistics.mean(one["loss"] for one in own)
            gap, error = paired(by[winner], own)
            above = "-" if recipe == winner else f"{gap:+.4f} +- {error:.4f}"
            rates = [speed.get((recipe.removesuffix(HALVED), cached)) for cached in (False, True)]
            cells = ["-" if rate is None else f"{rate:,.0f}" for rate in rates]
            start = f"| {recipe} | {own[0]['rate']:g} | {loss:.4f} | {math.exp(loss):.1f} | {above} "
            yield start + f"| {' | '.join(cells)} |"
        yield ""
        yield from equal_time(lines, plan, size, by)
        yield from reached(by, size, speed)


def seeds_of(lines: list[Line]) -> str:
    """Name the seeds."""
    return ", ".join(str(line["seed"]) for line in lines)


def equal_time(lines: list[Line], plan: dict[str, Any], size: str, by: dict[str, list[Line]]) -> Iterator[str]:
    """Say what cross-entropy reaches with the tokens that fit into the time of the screening's best recipe.

    It is compared with that recipe at the better of its rates.
    """
    screened = sorted(of(lines, stage="screen"), key=lambda line: float(line["loss"]))
    leader = next((line["recipe"] for line in screened if line["recipe"] not in plan["baselines"]), None)
    leader = next((name for name in by if name.removesuffix(HALVED) == leader), None)
    for recipe, longer in ranked(lines, size, "equal-time").items():
        if leader is not None:
            gap, error = paired(by[leader], longer)
            yield (
                f"In {leader}'s time {recipe} sees {longer[0]['tokens']:,} tokens and comes to "
                f"{statistics.mean(one['loss'] for one in longer):.4f}: {gap:+.4f} +- {error:.4f} above {leader}."
            )
            yield ""


def reached(by: dict[str, list[Line]], size: str, speed: dict[tuple[str, bool], float]) -> Iterator[str]:
    """Say when the best recipe that has a curve passes below each other one's end, as a share of its time."""
    known = {name: own for name, own in by.items() if len(own[0]["curve"]) > 1 and (name, False) in speed}
    best = next(iter(known), None)
    for recipe, own in known.items():
        end = own[0]["curve"][-1]
        tokens = next((tokens for tokens, loss in known[best or ""][0]["curve"] if loss <= end[1]), None)
        if recipe != best and tokens is not None:
            share = (tokens / speed[best or "", False]) / (end[0] / speed[recipe, False])
            yield f"{best} is below the end of {recipe} after {tokens:,} tokens: at most {share:.2f} of its time."
    yield ""


def again(lines: list[Line]) -> Iterator[str]:
    """Yield the smallest row with the texts that nothing was chosen on."""
    rows = of(lines, stage="smallest")
    if not rows:
        return
    rows = sorted(rows, key=lambda line: float(line["loss"]))
    names = list(rows[0]["checks"])
    yield f"## The smallest row: {rows[0]['size']}, {rows[0]['tokens']:,} tokens, seed {rows[0]['seed']}"
    yield ""
    yield "| recipe | held-out novels | " + " | ".join(names) + " |"
    yield "|---" * (2 + len(names)) + "|"
    for line in rows:
        cells = [f"{line['loss']:.4f}"]
        for name in names:
            gap, error = paired(rows[:1], [line], name)
            mean = statistics.mean(line["checks"][name])
            cells.append(f"{mean:.4f}" + ("" if line is rows[0] else f" ({gap:+.4f} +- {error:.4f})"))
        yield f"| {line['recipe']} | {' | '.join(cells)} |"
    yield ""


def draw(lines: list[Line], plan: dict[str, Any]) -> None:
    """Draw the curves against tokens and seconds, and perplexity against size."""
    from matplotlib.figure import Figure

    sizes = [size for size in plan["sizes"] if of(lines, stage="final", size=size)]
    if not sizes:
        return
    for name, what in (("tokens", "tokens"), ("seconds", "seconds on 2 cores")):
        figure = Figure(figsize=(5.5 * len(sizes), 4), layout="constrained")
        for axes, size in zip(np.atleast_1d(figure.subplots(1, len(sizes))), sizes, strict=True):
            speed = speeds(lines, size)
            for recipe, own in ranked(lines, size).items():
                curve = np.array(own[0]["curve"])
                across = curve[:, 0] / (speed[recipe.removesuffix(HALVED), False] if name == "seconds" else 1)
                axes.plot(across, curve[:, 1], marker=".", label=recipe)
            axes.set(title=f"student: {size}", xlabel=what, ylabel="held-out loss (nats per token)")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        figure.savefig(IMAGES / f"recipes-{name}.png", dpi=110)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for recipe in dict.fromkeys(name for size in sizes for name in ranked(lines, size)):
        points = sorted(
            (own[0]["parameters"], math.exp(statistics.mean(one["loss"] for one in own)))
            for size in sizes for name, own in ranked(lines, size).items() if name == recipe
        )  # fmt: skip
        axes.plot(*zip(*points, strict=True), marker="o", label=recipe)
    axes.set(xlabel="student's parameters", ylabel="held-out perplexity", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(IMAGES / "recipes-size.png", dpi=110)


if __name__ == "__main__":
    main()
