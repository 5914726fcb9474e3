"""Measure what a teacher's cache costs and saves: the time of a step, of whole runs, and the space on the disk.

    python benchmarks/teacher_cache.py --teacher TEACHER --student STUDENT --data DATA --json

- `steps`: a step with cross-entropy alone, with exact KL from the running teacher, and with KL from a full cache of
  each kind. They take turns, a few steps each. The optimizer is AdamW, whose short step hides least.
- `disk`: bytes for each token, and gigabytes for 1 billion tokens, by kind.
- `teach`: tokens per second of filling a cache, by kind.
- `epochs`: the default recipe over 1, 2 and 4 epochs, with and without a cache of states that is empty at first.
  `reused` is one epoch with a cache that is already full, as for a second student. The seconds are those of the
  training steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator

from tinygpt2 import DistillConfig, TeachConfig, distill, teach
from tinygpt2.config.distillation import CacheKind
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.models.loading import load_model
from tinygpt2.models.teachers.loading import load_teacher
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.runtime.cpu import fast_products, usable_cores
from tinygpt2.training.optimizers import make_optimizer
from tinygpt2.training.step import Step
from tinygpt2.training.teacher_cache import TeacherCache
from tinygpt2.training.throughput import step_seconds

KINDS: tuple[CacheKind, ...] = get_args(CacheKind)
STEPS, ROUNDS = 4, 5  # steps in a turn, and turns that count


def main() -> None:
    """Read the options, measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument(
        "--data", required=True, help="pregenerated dataset; a small one, because an epoch is its whole training split"
    )
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--only-steps", action="store_true", help="leave out `epochs` and `reused`")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, fast_products():
        found = caches(options, Path(place))
        if not options.only_steps:
            found |= epochs(options, Path(place))
    data = load_packed_dataset(options.data)
    found |= {
        "tokens": len(data.train) * data.sequence_length, "precision": options.precision, "cores": usable_cores(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(found, indent=None if options.json else 2))


def caches(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Fill a cache of each kind, and time steps from them, from the teacher itself and without one."""
    filled = {
        kind: teach(
            TeachConfig(
                teacher=options.teacher, data=options.data, out=str(place / "taught"), teacher_cache_kind=kind,
                precision=options.precision, micro_batch_size=options.micro_batch_size,
            )
        )
        for kind in KINDS
    }  # fmt: skip
    seconds = steps(options, place / "taught")
    return {
        "steps": {
            name: {
                "seconds": own, "of_cross_entropy": own / seconds["cross_entropy"], "of_exact_kl": own / seconds["kl"],
            }
            for name, own in seconds.items()
        },
        "disk": {
            kind: {"bytes_per_token": one.bytes_per_token, "gigabytes_per_billion_tokens": one.bytes_per_token}
            for kind, one in filled.items()
        },
        "teach": {kind: {"tokens_per_second": one.tokens_per_second} for kind, one in filled.items()},
    }  # fmt: skip


def steps(options: argparse.Namespace, cache: Path) -> dict[str, float]:
    """Return the median seconds of a step of each variant. They take turns."""
    data, accelerator = load_packed_dataset(options.data), Accelerator(cpu=True, mixed_precision=autocast(options))
    racers = {}
    for name in ("cross_entropy", "kl", *KINDS):
        objective = {"prediction_weight": float(name != "cross_entropy"), "ce_weight": float(name == "cross_entropy")}
        config = DistillConfig(
            teacher=options.teacher, student=options.student, data=options.data, out="unused", learning_rate=1e-5,
            optimizer="adamw", precision=options.precision, **objective,
        )  # fmt: skip
        student, _ = load_model(options.student)
        teacher, store = None, None
        if name in ("kl", "states"):
            teacher, _ = load_teacher(options.teacher, data, torch.float32)
        if name == "states":
            store = TeacherCache(cache, teacher, data, options.precision)
        elif name in KINDS:
            store = TeacherCache.of_predictions(cache, data, name, 1.0)
        if teacher is not None and options.precision != "fp32":
            teacher.cast(torch.bfloat16)
        step = Step(student, teacher, LossWeights.of(config), config, store)
        module, optimizer = accelerator.prepare(step, make_optimizer(step, config))
        racers[name] = (module.train(), optimizer)
    size = options.micro_batch_size
    taken: dict[str, list[float]] = {name: [] for name in racers}
    for turn in range(ROUNDS + 1):
        for name, (module, optimizer) in racers.items():
            found = step_seconds(accelerator, module, optimizer, data.train, size, size, STEPS)
            if turn:  # the first turn warms up
                taken[name].append(statistics.median(found))
    return {name: statistics.median(times) for name, times in taken.items()}


def autocast(options: argparse.Namespace) -> str:
    """Return Accelerate's word for the precision."""
    return "no" if options.precision == "fp32" else str(options.precision)


def epochs(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Train and time each variant. Runs with and without the cache take turns."""
    rows = []
    for count in (1, 2, 4):
        plain = seconds(options, place / f"plain-{count}", count, None)
        cached = seconds(options, place / f"cached-{count}", count, place / f"cache-{count}")
        rows.append({"epochs": count, "seconds": plain, "seconds_with_cache": cached, "speedup": plain / cached})
    again = seconds(options, place / "again", 1, place / "cache-4")
    size = sum(file.stat().st_size for file in (place / "cache-4").rglob("*") if file.is_file())
    reused = {"seconds": again, "speedup": rows[0]["seconds"] / again}
    return {"epochs": rows, "reused": reused, "cache_bytes": size}


def seconds(options: argparse.Namespace, out: Path, count: int, cache: Path | None) -> float:
    """Return the seconds that the training steps of one run take."""
    result: Any = distill(
        DistillConfig(
            teacher=options.teacher, student=options.student, data=options.data, out=str(out), num_epochs=count,
            precision=options.precision, micro_batch_size=options.micro_batch_size,
            teacher_cache=None if cache is None else str(cache), save_every=10**6,
        )
    )  # fmt: skip
    return float(result.seconds)


if __name__ == "__main__":
    main()
