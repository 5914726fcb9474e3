"""Measure the time that `distill --teacher-cache` saves: the same training over 1, 2 and 4 epochs, with and without it.

    python benchmarks/teacher_cache.py --teacher TEACHER --student STUDENT --data DATA --json

Every run starts with an empty cache, so the first epoch fills it. `reused` is one epoch with a cache that is already
full, as for a second student. The seconds are those of the training steps.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from tinygpt2 import DistillConfig, distill
from tinygpt2.data.dataset import load_packed_dataset


def main() -> None:
    """Read the options, measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument(
        "--data", required=True, help="pregenerated dataset; a small one, because an epoch is its whole training split"
    )
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = measure(options, Path(place))
    print(json.dumps(found, indent=None if options.json else 2))


def measure(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Train and time each variant. Runs with and without the cache take turns."""
    rows = []
    for epochs in (1, 2, 4):
        plain = seconds(options, place / f"plain-{epochs}", epochs, None)
        cached = seconds(options, place / f"cached-{epochs}", epochs, place / f"cache-{epochs}")
        rows.append({"epochs": epochs, "seconds": plain, "seconds_with_cache": cached, "speedup": plain / cached})
    again = seconds(options, place / "again", 1, place / "cache-4")
    size = sum(file.stat().st_size for file in (place / "cache-4").rglob("*") if file.is_file())
    data = load_packed_dataset(options.data)
    return {
        "epochs": rows, "reused": {"seconds": again, "speedup": rows[0]["seconds"] / again},
        "cache_bytes": size, "tokens": len(data.train) * data.sequence_length, "precision": options.precision,
        "cores": os.cpu_count(), "torch": torch.__version__,
    }  # fmt: skip


def seconds(options: argparse.Namespace, out: Path, epochs: int, cache: Path | None) -> float:
    """Return the seconds that the training steps of one run take."""
    result: Any = distill(
        DistillConfig(
            teacher=options.teacher, student=options.student, data=options.data, out=str(out), num_epochs=epochs,
            precision=options.precision, teacher_cache=None if cache is None else str(cache), save_every=10**6,
        )
    )  # fmt: skip
    return float(result.seconds)


if __name__ == "__main__":
    main()
