"""What a run measures: metrics.jsonl, the picture of its curves, the model card."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from tinygpt2.utils.files import write_text
from tinygpt2.utils.plotting import figure_of, save_figure

METRICS, CURVES = "metrics.jsonl", "curves.png"


class MetricsLog:
    """metrics.jsonl: one object per logged step, appended as it happens, whole or not at all.

    Args:
        out: the run's directory.
        step: the step that the run continues from; later lines of an earlier attempt are dropped.
    """

    def __init__(self, out: Path, step: int) -> None:
        self._path = out / METRICS
        kept = [row for row in read_metrics(out) if row["step"] <= step] if step else []
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._waiting = b""

    def write(self, row: Mapping[str, float]) -> None:
        """Append one step's figures, and those that could not be written before; what is not finite becomes null.

        Raises:
            OSError: the disk is full; the figures wait.
        """
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._waiting += (json.dumps(finite) + "\n").encode()
        with self._path.open("r+b", buffering=0) as stream:
            end = stream.seek(0, os.SEEK_END)
            if stream.write(self._waiting) != len(self._waiting):  # the disk took only a part
                stream.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._waiting = b""


def read_metrics(out: Path) -> list[dict[str, float]]:
    """Read a run's metrics; a last line that was cut short by a crash is passed over."""
    rows = []
    path = out / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_runs(runs: Mapping[str, Path], key: str, path: Path, title: str) -> None:
    """Draw one metric of several runs against tokens, as a PNG."""
    figure, axes = figure_of(1)
    for name, out in runs.items():
        rows = [row for row in read_metrics(out) if key in row]
        axes[0].plot([row["tokens"] for row in rows], [row[key] for row in rows], marker=".", label=name)
    axes[0].set(xlabel="tokens", ylabel=key, title=title)
    axes[0].legend()
    save_figure(figure, path)


def plot_curves(out: Path) -> None:
    """Draw a run's losses and learning rate against tokens into its directory."""
    rows = read_metrics(out)
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if "loss" in key]
    figure, axes = figure_of(2)
    for key in keys:
        points = [(row["tokens"], row[key]) for row in rows if row.get(key) is not None]
        axes[0].plot(*zip(*points, strict=True), label=key, marker="o" if key.startswith("eval") else None)
    axes[0].set(xlabel="tokens", ylabel="loss (nats)", title=out.name)
    axes[0].legend()
    rates = [(row["tokens"], row["learning_rate"]) for row in rows if "learning_rate" in row]
    if rates:
        axes[1].plot(*zip(*rates, strict=True))
    axes[1].set(xlabel="tokens", ylabel="learning rate")
    save_figure(figure, out / CURVES)
