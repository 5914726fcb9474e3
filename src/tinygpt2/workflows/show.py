"""`show`: a run's curves on the terminal, and its picture and its report written anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinygpt2.config.workflows import ShowConfig
from tinygpt2.errors import ConfigError
from tinygpt2.utils.charts import Chart
from tinygpt2.utils.progress import say
from tinygpt2.workflows.curves import CURVES, plot_curves, run_charts
from tinygpt2.workflows.report import write_run_report
from tinygpt2.workflows.runs import RunStatus, is_run, run_status


@dataclass(frozen=True)
class ShowResult:
    """A run and its curves.

    Attributes:
        picture, report: the paths of curves.png and report.html; None if they could not be written.
        curves: what they show: charts of pairs (tokens, value).
    """

    run: RunStatus
    picture: str | None
    report: str | None
    curves: list[Chart]


def show(config: ShowConfig) -> ShowResult:
    """Return a run's curves, and write curves.png and report.html in its directory anew.

    Raises:
        ConfigError: the directory holds no training run.
    """
    out = Path(config.path)
    if not is_run(out):
        raise ConfigError(f"{out} holds no training run", "tinygpt2 runs lists the runs below a directory")
    picture = _written(lambda: (out / CURVES) if plot_curves(out) else None)
    report = _written(lambda: write_run_report(out))
    return ShowResult(run_status(out), picture, report, run_charts(out))


def _written(write: Callable[[], Path | None]) -> str | None:
    try:
        path = write()
    except OSError as error:  # the run may belong to somebody else
        say(f"not written: {error.filename}: {error.strerror}")
        return None
    return str(path.resolve()) if path else None
