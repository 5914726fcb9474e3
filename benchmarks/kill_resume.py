"""Kill runs with SIGKILL at random moments, resume them until they are done, and compare with an uninterrupted run.

    python benchmarks/kill_resume.py --json [--runs 20] [--processes 1]

Every run distils with dropout, evaluates, and saves every other step. It is started with --resume again and again, as
a job script would do, and killed up to three times: at a random moment, or as soon as a checkpoint is being written.
Two runs are equal if the SHA-256 of their final weights is the same and their metrics.jsonl differ only in times.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TIMES = ("tokens_per_second", "mfu")
STEPS = 60


def tinygpt2(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tinygpt2", *arguments]


def prepare(folder: Path) -> None:
    """Make the tokenizer, the dataset, the teacher and the untrained student."""
    (folder / "shape.yaml").write_text("{n_layer: 4, n_embd: 96, n_head: 4, n_positions: 64}\n")
    data = ["--data", str(folder / "data")]
    for command in (
        ["train-tokenizer", "python-docs", "--vocab-size", "1024", "--out", str(folder / "tokenizer")],
        ["pregenerate", "python-docs", "--tokenizer", str(folder / "tokenizer"), "--sequence-length", "64",
         "--test-fraction", "0.01", "--out", str(folder / "data")],
        ["pretrain", "--model-config", str(folder / "shape.yaml"), *data, "--max-steps", "20", "--out",
         str(folder / "teacher")],
        ["truncate-student", "--teacher", str(folder / "teacher"), "--num-layers", "2", "--out", str(folder / "cut")],
    ):  # fmt: skip
        subprocess.run(tinygpt2(*command), check=True, capture_output=True)


def command(folder: Path, out: Path, processes: int) -> list[str]:
    return tinygpt2(
        "distill", "--teacher", str(folder / "teacher"), "--student", str(folder / "cut"),
        "--data", str(folder / "data"),
        "--out", str(out), "--max-steps", str(STEPS), "--micro-batch-size", "4", "--dropout", "0.1", "--log-every", "1",
        "--eval-every", "20", "--save-every", "2", "--num-processes", str(processes), "--resume",
    )  # fmt: skip


def saving(out: Path) -> bool:
    return any((out / "checkpoints").glob(".step-*"))


def killed(folder: Path, out: Path, processes: int, moment: random.Random) -> dict[str, Any]:
    """Run until done and kill up to three times.

    Returns:
        Counts of kills, of kills while a checkpoint was being written, and of damaged checkpoints that were ignored.
    """
    found = {"kills": 0, "while_saving": 0, "passed_over": 0}
    for attempt in range(4):
        waits_for_saving, lines = moment.random() < 0.5, len(rows(out))
        due = 0.0
        with subprocess.Popen(
            command(folder, out, processes), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            while process.poll() is None:
                begun = len(rows(out)) != lines
                if begun and not due:
                    due = time.monotonic() + moment.uniform(0, 1.5)
                if attempt < 3 and due and time.monotonic() >= due and (saving(out) or not waits_for_saving):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    found["kills"] += 1
                    found["while_saving"] += saving(out)
                    break
                time.sleep(0.001)
            errors = process.stderr.read() if process.stderr else ""
        found["passed_over"] += errors.count("ignoring the damaged checkpoint")
        if process.returncode == 0:
            return found
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(errors)
    raise RuntimeError("the run did not finish in the last attempt")


def rows(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append({key: value for key, value in json.loads(line).items() if key not in TIMES})
        except json.JSONDecodeError:
            break
    return found


def weights(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    moment = random.Random(options.seed)
    result: dict[str, Any] = {"runs": options.runs, "processes": options.processes, "steps": STEPS, "equal": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        whole = folder / "whole"
        subprocess.run(command(folder, whole, options.processes), check=True, capture_output=True)
        for run in range(options.runs):
            out = folder / f"run-{run}"
            found = killed(folder, out, options.processes, moment)
            if not found["kills"]:
                raise RuntimeError(f"run {run + 1} finished before it could be killed")
            equal = weights(out) == weights(whole) and rows(out) == rows(whole)
            result["equal"] += equal
            for key, value in found.items():
                result[key] = result.get(key, 0) + value
            print(f"run {run + 1}/{options.runs}: {'equal' if equal else 'DIFFERENT'}, {found}", file=sys.stderr)
    print(json.dumps(result) if options.json else result)
    sys.exit(result["equal"] != options.runs)


if __name__ == "__main__":
    main()
