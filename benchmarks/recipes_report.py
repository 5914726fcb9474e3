"""Write the tables and pictures of the recipe study. They need only the lines of results.jsonl.

    python benchmarks/recipes_report.py

writes benchmarks/recipes/report.md and three pictures in docs/images: the held-out loss against tokens and against
seconds, with one curve per recipe, and the final perplexity against the size of the student.
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
PLAIN = "kl"  # the recipe that single changes are compared with
SHOWN = 0.9  # nats per token: curves end at most this far above the best one, else the others would be squeezed
Line = dict[str, Any]


def main() -> None:
    """Read the result lines and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    plan = yaml.safe_load((HERE / "plan.yaml").read_text(encoding="utf-8"))
    report = "\n".join(
        ["# Results of the recipe study", "", *screened(lines, plan), *finals(lines, plan), *again(lines)]
    )
    (HERE / "report.md").write_text(report + "\n", encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    draw(lines, plan)


def of(lines: list[Line], **known: Any) -> list[Line]:
    """Return the lines with these values."""
    return [line for line in lines if all(line.get(key) == value for key, value in known.items())]


def paired(ours: list[Line], theirs: list[Line], groups: str | None = None) -> tuple[float, float]:
    """Return the mean loss of `theirs` minus that of `ours`, and the paired standard error of this difference.

    The pairs are groups of neighbouring blocks. Each group's loss is the mean over the seeds that both sides have, so
    the error covers the choice of held-out text, but not the variation between seeds.

    Args:
        groups: name of a text in `checks`; the held-out novels if None.
    """

    def read(line: Line) -> Any:
        return np.array(line["groups"] if groups is None else line["checks"][groups])

    seeds = {line["seed"] for line in ours} & {line["seed"] for line in theirs}
    mean = [np.mean([read(line) for line in side if line["seed"] in seeds], axis=0) for side in (ours, theirs)]
    gap = mean[1] - mean[0]
    return float(gap.mean()), float(gap.std(ddof=1) / math.sqrt(len(gap)))


def screened(lines: list[Line], plan: dict[str, Any]) -> Iterator[str]:
    """Yield the screening table: each recipe's loss at each rate, and its best loss compared with that of plain KL."""
    screen, recipes = plan["screen"], plan["recipes"]
    asked = {recipe: how.get("rates", screen["rates"]) for recipe, how in recipes.items()}
    rates = sorted({rate for own in asked.values() for rate in own})
    found: dict[str, dict[float, Line]] = {recipe: {} for recipe in recipes}
    for line in of(lines, stage="screen"):
        found[line["recipe"]][line["rate"]] = line
    best = {recipe: min(own.values(), key=lambda line: line["loss"]) for recipe, own in found.items() if own}
    yield f"## Screening: {screen['size']}, {screen['tokens']:,} tokens, seed {screen['seed']}, loss in nats per token"
    yield ""
    yield "| recipe | " + " | ".join(f"{rate:g}" for rate in rates) + f" | loss above {PLAIN} |"
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
    """Return tokens per second, keyed by recipe and by whether the teacher's states were read from the cache."""
    return {(line["recipe"], line["cached"]): line["tokens_per_second"] for line in of(lines, stage="time", size=size)}


def ranked(lines: list[Line], plan: dict[str, Any], size: str) -> dict[str, list[Line]]:
    """Return the final runs of one size, best recipe first: each recipe at its best rate, with one line per seed."""
    found: dict[str, list[Line]] = {}
    for line in of(lines, stage="final", size=size):
        if line["rate"] == min(tried(lines, plan, size, line["recipe"]))[1]:
            found.setdefault(line["recipe"], []).append(line)
    return dict(sorted(found.items(), key=lambda item: mean_loss(item[1])))


def tried(lines: list[Line], plan: dict[str, Any], size: str, recipe: str) -> list[tuple[float, float]]:
    """Return (loss, rate) of a recipe's final runs with the seed that chooses its rate."""
    own = of(lines, stage="final", size=size, recipe=recipe, seed=plan["final"]["seeds"][0])
    return [(line["loss"], line["rate"]) for line in own]


def mean_loss(lines: list[Line]) -> float:
    """Return the mean loss over seeds."""
    return statistics.mean(float(line["loss"]) for line in lines)


def finals(lines: list[Line], plan: dict[str, Any]) -> Iterator[str]:
    """Yield, for each size, the comparison with the default recipe at equal tokens and at equal time."""
    for size in plan["sizes"]:
        by = ranked(lines, plan, size)
        if plan["default"] not in by:
            continue
        default, speed = by[plan["default"]], speeds(lines, size)
        first, seeds = default[0], ", ".join(str(line["seed"]) for line in default)
        yield f"## {size}: {first['parameters']:,} parameters, {first['tokens']:,} tokens, seeds {seeds}"
        yield ""
        above = f"loss above {plan['default']}"
        yield f"| recipe | rate | other rates | loss | loss by seed | perplexity | {above} | tokens/s | with cache |"
        yield "|---" * 9 + "|"
        for recipe, own in by.items():
            others = [f"{rate:g}: {loss:.3f}" for loss, rate in sorted(tried(lines, plan, size, recipe))[1:]]
            gap, error = paired(default, own)
            above = "-" if own is default else f"{gap:+.4f} +- {error:.4f}"
            known = [speed.get((recipe, cached)) for cached in (False, True)]
            cells = [
                recipe, f"{own[0]['rate']:g}", ", ".join(others) or "-", f"{mean_loss(own):.4f}",
                ", ".join(f"{one['loss']:.3f}" for one in own), f"{math.exp(mean_loss(own)):.1f}", above,
                *("-" if rate is None else f"{rate:,.0f}" for rate in known),
            ]  # fmt: skip
            yield f"| {' | '.join(cells)} |"
        yield ""
        yield from by_rule(lines, size, default)
        yield from equal_time(lines, plan, size, default)
        yield from reached(by, plan["default"], speed)


def by_rule(lines: list[Line], size: str, default: list[Line]) -> Iterator[str]:
    """Yield the loss of the default recipe at the default learning rate of `distill`, from the last measurement."""
    for line in of(lines, stage="rule", size=size)[-1:]:
        gap, error = paired(default, [line])
        yield (
            f"At {line['rate']:.3g}, the default learning rate of `distill`, {line['recipe']} reaches a loss of "
            f"{line['loss']:.4f}: {gap:+.4f} +- {error:.4f} compared with the rate in the table and the same seed."
        )
        yield ""


def equal_time(lines: list[Line], plan: dict[str, Any], size: str, default: list[Line]) -> Iterator[str]:
    """Yield the loss of cross-entropy with the tokens that fit into the default recipe's time, as last measured."""
    longer = of(lines, stage="equal-time", size=size)
    longer = of(longer, tokens=longer[-1]["tokens"]) if longer else []
    if longer:
        gap, error = paired(default, longer)
        yield (
            f"In the time of {plan['default']}, {longer[0]['recipe']} sees {longer[0]['tokens']:,} tokens and reaches "
            f"a loss of {mean_loss(longer):.4f}: {gap:+.4f} +- {error:.4f} above {plan['default']}."
        )
        yield ""


def reached(by: dict[str, list[Line]], default: str, speed: dict[tuple[str, bool], float]) -> Iterator[str]:
    """Yield when the default recipe reaches the final loss of each other recipe, as a share of that recipe's time."""
    for recipe, own in by.items():
        end = own[0]["curve"][-1]
        tokens = next((tokens for tokens, loss in by[default][0]["curve"] if loss <= end[1]), None)
        if recipe != default and tokens is not None and (recipe, False) in speed:
            share = (tokens / speed[default, False]) / (end[0] / speed[recipe, False])
            yield (
                f"- {default} reaches the final loss of {recipe} after {tokens:,} tokens, "
                f"in at most {share:.2f} times the time of {recipe}."
            )
    yield ""


def again(lines: list[Line]) -> Iterator[str]:
    """Yield the smallest comparison, with the losses on texts that no choice was based on."""
    rows = of(lines, stage="smallest")
    if not rows:
        return
    rows = sorted(rows, key=lambda line: float(line["loss"]))
    names = list(rows[0]["checks"])
    yield f"## Smallest comparison: {rows[0]['size']}, {rows[0]['tokens']:,} tokens, seed {rows[0]['seed']}"
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
    """Draw the loss against tokens and against seconds, and the perplexity against size."""
    from matplotlib.figure import Figure

    sizes = [size for size in plan["sizes"] if of(lines, stage="final", size=size)]
    if not sizes:
        return
    by = {size: ranked(lines, plan, size) for size in sizes}
    recipes = sorted({name for found in by.values() for name in found})
    colors = {recipe: f"C{number}" for number, recipe in enumerate(recipes)}
    for name, what in (("tokens", "tokens"), ("seconds", "seconds on 2 cores")):
        figure = Figure(figsize=(5.5 * len(sizes) + 1, 4), layout="constrained")
        for axes, size in zip(np.atleast_1d(figure.subplots(1, len(sizes))), sizes, strict=True):
            speed = speeds(lines, size)
            for recipe, own in by[size].items():
                curve = np.array(own[0]["curve"])
                across = curve[:, 0] / (speed[recipe, False] if name == "seconds" else 1)
                axes.plot(across, curve[:, 1], marker=".", label=recipe, color=colors[recipe])
            ends = [own[0]["curve"][-1][1] for own in by[size].values()]
            axes.set(title=f"student: {size}", xlabel=what, ylabel="held-out loss (nats per token)")
            axes.set_ylim(min(ends) - 0.05, min(ends) + SHOWN)
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
        figure.savefig(IMAGES / f"recipes-{name}.png", dpi=110)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for recipe in recipes:
        points = sorted(
            (found[recipe][0]["parameters"], math.exp(mean_loss(found[recipe])))
            for found in by.values() if recipe in found
        )  # fmt: skip
        axes.plot(*zip(*points, strict=True), marker="o", label=recipe, color=colors[recipe])
    axes.set(xlabel="student's parameters", ylabel="held-out perplexity", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(IMAGES / "recipes-size.png", dpi=110)


if __name__ == "__main__":
    main()
