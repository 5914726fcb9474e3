"""The metrics of a run: what the processes agree on after a step, and metrics.jsonl."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt2.utils.files import write_text

if TYPE_CHECKING:  # `runs` and `show` read metrics without torch
    from accelerate import Accelerator
    from torch import Tensor

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends one line of JSON for each logged step to metrics.jsonl, and never a part of a line.

    Args:
        out: the run's directory.
        step: the step that the run continues from. Lines of later steps, from an earlier attempt, are deleted.
    """

    def __init__(self, out: Path, step: int) -> None:
        self._path = out / METRICS
        kept = [row for row in read_metrics(out) if row["step"] <= step] if step else []
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._waiting = b""

    def write(self, row: Mapping[str, float]) -> None:
        """Append one step's metrics, after those that could not be written before. NaN and infinity become null.

        Raises:
            OSError: the disk is full. The next call tries to write these metrics again.
        """
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._waiting += (json.dumps(finite) + "\n").encode()
        with self._path.open("r+b", buffering=0) as stream:
            end = stream.seek(0, os.SEEK_END)
            if stream.write(self._waiting) != len(self._waiting):  # the disk is full, and only a part was written
                stream.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._waiting = b""


def read_metrics(out: Path) -> list[dict[str, float]]:
    """Read a run's metrics; ignore a last line that was cut short by a crash.

    The first row may also have figures before training: of the model (`before/loss`) and the teacher (`teacher/loss`).
    """
    rows = []
    path = out / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def metrics_of(evaluations: Mapping[str, Any]) -> dict[str, float]:
    """Return evaluations (`Evaluation`) as metrics.jsonl has them: NAME/loss, NAME/perplexity and NAME/stderr."""
    row = {f"{name}/{key}": value for name, one in evaluations.items() for key, value in asdict(one).items()}
    return {key: value for key, value in row.items() if value is not None}


def agreed(
    accelerator: Accelerator, parts: dict[str, Tensor], norm: Tensor, stop: bool, overdue: bool, steps: int
) -> tuple[dict[str, float], float, bool, bool, int]:
    """Agree with all processes, and read from the device what decides about the step: the only wait for a GPU.

    Returns:
        Mean loss and parts, the norm, whether any process is to stop or to save, and the main process's steps.
    """
    import torch

    own = [float(stop), float(overdue), float(steps if accelerator.is_main_process else 0)]
    said = [torch.full((), value, device=accelerator.device) for value in own]  # a tensor of the numbers would wait
    means = accelerator.reduce(torch.stack([*parts.values(), *said]), "mean")
    *terms, asked, late, whole, size = torch.cat([means, norm.to(means.dtype)[None]]).cpu().tolist()
    shared = round(whole * accelerator.num_processes)
    return dict(zip(parts, terms, strict=True)), size, asked > 0, late > 0, shared
