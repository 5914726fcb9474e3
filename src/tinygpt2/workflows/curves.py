"""The curves of training runs, from metrics.jsonl and config.yaml alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinygpt2.config.yaml_files import read_yaml
from tinygpt2.errors import ConfigError
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.state import RUN_FILE
from tinygpt2.utils.charts import Chart, Series
from tinygpt2.utils.plotting import draw

CURVES = "curves.png"
TOKENS, CROSS_ENTROPY = "training tokens", "nats per token"
EVALUATED = "eval/loss"

_OBJECTIVES = {
    "attention": ("attention scores: distance to the teacher", "squared error"),
    "hidden": ("hidden states: distance to the teacher", "squared error"),
    "relation": ("relations of the last layer: KL to the teacher", "nats"),
    "cosine": ("last hidden states: distance to the teacher", "1 - cosine"),
}
PREDICTIONS = {
    "forward_kl": "KL to the teacher",
    "reverse_kl": "reverse KL to the teacher",
    "soft_ce": "soft cross-entropy to the teacher",
    "jsd": "Jensen-Shannon divergence to the teacher",
}


def run_options(out: Path) -> dict[str, Any]:
    """Return the options in a run's config.yaml; empty if it is missing or cannot be read."""
    try:
        return read_yaml(out / RUN_FILE)
    except ConfigError:
        return {}


def run_charts(out: Path) -> list[Chart]:
    """Return the charts of a run: losses, each objective in a chart of its own, the learning rate and the speed."""
    rows, options = read_metrics(out), run_options(out)
    charts = [_cross_entropy(rows)]
    terms = {key: name for key, name in _keys(rows, "loss/") if name != "ce"}
    charts += [_one(rows, key, *_objective(name, options)) for key, name in terms.items()]
    if len(list(_keys(rows, "loss/"))) != 1:  # a single term is the loss
        title = "loss: weighted sum of the objectives" if terms else "training loss"
        charts.append(_one(rows, "loss", title, "weighted sum" if terms else "loss"))
    charts.append(_one(rows, "learning_rate", "learning rate", "learning rate"))
    charts.append(_one(rows, "tokens_per_second", "speed, without evaluation", "tokens per second"))
    return [chart for chart in charts if any(one.points for one in chart.series)]


def compared_runs(runs: Mapping[str, Path], levels: Mapping[str, float], title: str) -> Chart:
    """Return a chart of the held-out loss of several runs.

    Args:
        runs: the directory of each run, by its name.
        levels: losses to compare them to.
    """
    series = [_held_out(read_metrics(out), name) for name, out in runs.items()]
    return Chart(title, TOKENS, f"held-out cross-entropy ({CROSS_ENTROPY})", series, dict(levels))


def plot_curves(out: Path) -> bool:
    """Draw a run's curves as curves.png in its directory; return whether it could be drawn."""
    return draw(run_charts(out), out / CURVES, out.resolve().name)


def _cross_entropy(rows: list[dict[str, float]]) -> Chart:
    """Return the chart of what the model predicts of text: while it trains, held out, and before training."""
    held_out = [_held_out(rows, "held out")]
    by_data = [(key, name.removesuffix("/loss")) for key, name in _keys(rows, "eval/") if name.endswith("/loss")]
    held_out += [_series(rows, key, f"held out: {name}") for key, name in by_data]
    training = [_series(rows, "loss/ce", "training")]
    series = [one for one in held_out + training if one.points]
    levels: dict[str, float] = {}
    for name, key in (("before training", "before/loss"), ("teacher", "teacher/loss")):
        levels |= {name: rows[0][key]} if rows and rows[0].get(key) is not None else {}
    title = "cross-entropy" if training[0].points else "held-out cross-entropy"
    return Chart(title, TOKENS, CROSS_ENTROPY, series, levels if series else {})


def _objective(name: str, options: Mapping[str, Any]) -> tuple[str, str]:
    """Return the title of an objective's chart and what its y axis shows."""
    if name != "prediction":
        return _OBJECTIVES.get(name, (name, "value"))
    title = PREDICTIONS.get(options.get("prediction_loss", ""), "predictions: distance to the teacher")
    heat = options.get("temperature") or 1
    return title, CROSS_ENTROPY if heat == 1 else f"{CROSS_ENTROPY} at temperature {heat:g}, times {heat * heat:g}"


def _keys(rows: list[dict[str, float]], start: str) -> list[tuple[str, str]]:
    """Return the keys of the metrics that start like this, each with its rest."""
    every = dict.fromkeys(key for row in rows for key in row)
    return [(key, key.removeprefix(start)) for key in every if key.startswith(start)]


def _one(rows: list[dict[str, float]], key: str, title: str, y: str) -> Chart:
    return Chart(title, TOKENS, y, [_series(rows, key, title)])


def _held_out(rows: list[dict[str, float]], name: str) -> Series:
    """Return the held-out loss by training tokens, from before training if it was measured then."""
    known = rows[0] if rows else {}
    start = {f"eval/{key}": known[f"before/{key}"] for key in ("loss", "stderr") if f"before/{key}" in known}
    return _series([start, *rows], EVALUATED, name)


def _series(rows: list[dict[str, float]], key: str, name: str) -> Series:
    """Return the values of a metric by training tokens. Values that were NaN or infinite are left out."""
    found = [row for row in rows if row.get(key) is not None]
    errors = [row.get("eval/stderr") if key == EVALUATED else None for row in found]
    points = [(float(row.get("tokens", 0)), float(row[key])) for row in found]
    return Series(name, points, errors if any(errors) else [])
