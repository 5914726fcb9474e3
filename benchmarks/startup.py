"""Measure how long each command takes to start, and how many modules it imports.

    python benchmarks/startup.py --model MODEL --json

Every command runs on very little data, in a process of its own: five times in turns with the others; the figures are
medians of wall seconds. `--source` names the `src` folder of another version to measure instead of the installed one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNTED = """
import atexit, sys
atexit.register(lambda: print("MODULES", len(sys.modules), file=sys.stderr))
from tinygpt2.cli.app import main
main(sys.argv[1:])
"""


def commands(folder: Path, model: str) -> dict[str, list[str]]:
    """Return what to run, by name; `OUT` stands for a folder that does not exist."""
    text = str(folder / "text.txt")
    data = ["--tokenizer", str(folder / "tokenizer"), "--sequence-length", "32"]
    return {
        "--help": ["--help"],
        "verify --help": ["verify", "--help"],
        "presets": ["presets"],
        "ppl --list-tasks": ["ppl", "--list-tasks"],
        "train-tokenizer": ["train-tokenizer", text, "--vocab-size", "300", "--out", "OUT"],
        "pregenerate": ["pregenerate", text, *data, "--out", "OUT"],
        "verify of a dataset": ["verify", str(folder / "data")],
        "verify of a model": ["verify", model],
        "generate, first token": ["generate", "--model", model, "--prompt", "The", "--max-new-tokens", "1"],
        "ppl": ["ppl", "--model", model, "--task", text],
    }


def run(arguments: list[str], folder: Path, number: int) -> tuple[float, int]:
    """Run a command; return its wall seconds and the number of modules that it imported."""
    out = str(folder / f"out-{number}")
    line = [sys.executable, "-c", COUNTED, *(out if part == "OUT" else part for part in arguments)]
    started = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return seconds, int(done.stderr.rsplit("MODULES", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("TINYGPT2_TEST_DATA", "."))
    parser.add_argument("--model", default=str(data / "models" / "novels-6x256"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--source", help="the src folder of another version")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.source:
        os.environ["PYTHONPATH"] = options.source
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [f"word{number % 97} is number {number}.\n" for number in range(400)]
        (folder / "text.txt").write_text("".join(words), encoding="utf-8")
        every = commands(folder, options.model)
        for made, command in (("tokenizer", "train-tokenizer"), ("data", "pregenerate")):
            arguments = [str(folder / made) if part == "OUT" else part for part in every[command]]
            run(arguments, folder, 0)  # this also compiles the bytecode
        turns: dict[str, list[tuple[float, int]]] = {command: [] for command in every}
        for number in range(options.rounds * len(every)):
            command = list(every)[number % len(every)]
            turns[command].append(run(every[command], folder, number))
    rows = [
        {"command": command, "seconds": statistics.median(seconds for seconds, _ in found), "modules": found[-1][1]}
        for command, found in turns.items()
    ]
    if options.json:
        print(json.dumps({"load": os.getloadavg()[0], "rows": rows}))
        return
    for row in rows:
        print(f"{row['command']:24} {row['seconds']:6.2f} s {row['modules']:6,} modules")


if __name__ == "__main__":
    main()
