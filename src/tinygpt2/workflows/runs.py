"""`runs`: the training runs below a directory and how far they are, from the files that they write.

Nothing here imports torch, so the list is there at once, also while the machine trains.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil

from tinygpt2.config.workflows import RunsConfig
from tinygpt2.errors import ConfigError
from tinygpt2.training.metrics import METRICS, read_metrics
from tinygpt2.training.state import CHECKPOINTS, RECORD_FILE, RUN_FILE
from tinygpt2.utils.files import read_json
from tinygpt2.utils.locks import Holder, holder_of

State = Literal["done", "running", "maybe running", "interrupted", "failed"]

_FRESH = 300.0  # seconds; a run on another host whose metrics are older may have ended
_RECENT = 5  # logged steps whose speed gives the time left
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class RunStatus:
    """One training run.

    Attributes:
        path: its directory.
        command: `pretrain`, `distill` or `finetune`.
        state: `interrupted` if no process works on it and it has not ended. A process on another host cannot be seen:
            it counts as running if the metrics are fresh, and as `maybe running` if they are older.
        step, total_steps: optimizer steps that are done, and those of the whole run; None if that is not known.
        checkpoint: the step of the newest checkpoint; None if there is none.
        tokens: training tokens so far.
        loss: the training loss of the last logged step.
        eval_loss, perplexity: the last evaluation, in nats per token; None if there is none.
        seconds_left: time to the last step at the speed of the last steps, without evaluation; None if not running.
        host, process: where it runs; None if it does not.
        updated: when the run last wrote metrics, as ISO 8601.
        problem: the message of the error by which it failed.
    """

    path: str
    command: str
    state: State
    step: int
    total_steps: int | None
    checkpoint: int | None
    tokens: int
    loss: float | None
    eval_loss: float | None
    perplexity: float | None
    seconds_left: float | None
    host: str | None
    process: int | None
    updated: str
    problem: str | None = None


@dataclass(frozen=True)
class RunList:
    """Training runs, those that wrote last first."""

    runs: list[RunStatus]


def runs(config: RunsConfig) -> RunList:
    """List the training runs in a directory and below it.

    Raises:
        ConfigError: there is no such directory.
    """
    root = Path(config.path)
    if not root.is_dir():
        raise ConfigError(f"there is no directory {root}", "give the directory that holds the runs")
    found = [run_status(out) for out in _below(root.resolve())]
    return RunList(sorted(found, key=lambda run: (run.updated, run.path), reverse=True))


def is_run(out: Path) -> bool:
    """Return whether a directory holds a training run."""
    return (out / RECORD_FILE).is_file() or ((out / RUN_FILE).is_file() and (out / METRICS).is_file())


def _below(root: Path) -> Iterator[Path]:
    """Yield the runs in a directory and below it. A run holds no other runs; hidden folders are not opened."""
    for folder, inside, _ in os.walk(root):
        if is_run(Path(folder)):
            inside.clear()
            yield Path(folder)
        inside[:] = sorted(name for name in inside if not name.startswith("."))


def run_status(out: Path) -> RunStatus:
    """Read how far a run is from the files in its directory."""
    record = _record(out)
    rows = read_metrics(out)
    last = rows[-1] if rows else {}
    checkpoint, total = _checkpoint(out), last.get("total_steps")
    written = _written(out)
    holder = holder_of(out)
    state = _state(out, record, holder, _age_limit(rows), time.time() - written, new=total is not None)
    works = state in ("running", "maybe running") and holder is not None
    result = record.get("result") or {}
    evaluation = result.get("eval") or {}
    return RunStatus(
        path=str(out.resolve()),
        command=record.get("command") or "training",
        state=state,
        step=int(max(last.get("step", 0), checkpoint or 0)),
        total_steps=None if total is None else int(total),
        checkpoint=checkpoint,
        tokens=int(last.get("tokens", 0)),
        loss=result.get("loss", _latest(rows, "loss")),
        eval_loss=evaluation.get("loss", _latest(rows, "eval/loss")),
        perplexity=evaluation.get("perplexity", _latest(rows, "eval/perplexity")),
        seconds_left=_seconds_left(rows, time.time() - written) if state == "running" else None,
        host=holder.host if works and holder else None,
        process=holder.process if works and holder else None,
        updated=datetime.fromtimestamp(written).astimezone().isoformat(timespec="seconds"),
        problem=record.get("failed") if state == "failed" else None,
    )


def _record(out: Path) -> dict[str, Any]:
    try:
        record = read_json(out / RECORD_FILE)
    except (OSError, ValueError):  # runs of version 0.1.0 had none
        return {}
    return record if isinstance(record, dict) else {}


def _state(out: Path, record: dict[str, Any], holder: Holder | None, limit: float, age: float, *, new: bool) -> State:
    """Return a run's state.

    Args:
        holder: who holds its lock.
        limit: seconds after which metrics are no longer fresh.
        age: seconds since the run last wrote metrics.
        new: whether this version trained it: then run.json says how it ended.
    """
    ended = "result" in record or (not new and any((out / name).is_file() for name in _WEIGHTS))
    if ended:
        return "done"
    if holder is not None and holder.host != socket.gethostname():
        return "running" if age < limit else "maybe running"
    if holder is not None and _alive(holder):
        return "running"
    return "failed" if "failed" in record else "interrupted"


def _alive(holder: Holder) -> bool:
    """Return whether the process that took a lock on this host still lives. Another one may have got its number."""
    try:
        return psutil.Process(holder.process).create_time() <= holder.since + 2
    except psutil.Error:
        return False


def _checkpoint(out: Path) -> int | None:
    found = [path.name.removeprefix("step-") for path in (out / CHECKPOINTS).glob("step-*")]
    return max((int(step) for step in found if step.isdecimal()), default=None)


def _written(out: Path) -> float:
    """Return when a run last wrote, in seconds since 1970."""
    files = [out / name for name in (METRICS, RECORD_FILE, RUN_FILE)]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def _latest(rows: list[dict[str, float]], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def _age_limit(rows: list[dict[str, float]]) -> float:
    """Return how old the metrics of a running run may be, in seconds."""
    if len(rows) < 2 or not rows[-1].get("tokens_per_second"):
        return _FRESH
    return _FRESH + 3 * (rows[-1]["tokens"] - rows[-2]["tokens"]) / rows[-1]["tokens_per_second"]


def _seconds_left(rows: list[dict[str, float]], age: float) -> float | None:
    speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")][-_RECENT:]
    if not speeds or not rows[-1].get("total_steps"):
        return None
    last = rows[-1]
    left = (last["total_steps"] - last["step"]) * last["tokens"] / last["step"]
    return max(0.0, left / median(speeds) - age)
