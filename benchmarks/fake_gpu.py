"""Count what a training step would do on a GPU, without one, by torch's fake tensors.

    python benchmarks/fake_gpu.py --json

GPT-2 small teaches 6 layers of its width with the default recipe, 8 x 1024 tokens in bfloat16. Needs a C++ compiler.

- `synchronisations`: how often the host waits for the GPU in an optimizer step; `padded_...`: with padded blocks.
- `optimizer_kernels`: operations of an optimizer step; each is at least one kernel.
- `logit_bytes_moved`: by element-wise work on logits. A pass that torch compiles counts as two reads of each matrix of
  logits and one write of the gradient.
- `gigabytes_moved`, `teraflops`: of the whole step, with Muon.
- `floor_ms`: the sum over all kernels of the time by peak rate or by bandwidth, whichever is longer, on an H100 SXM by
  its data sheet (989 TFLOP/s in 16 bits, 3.35 TB/s). A real step takes longer.
- `eager`: the last four without the compiled losses.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def measured(folder: Path) -> dict[str, Any]:
    """Compile the device's library into a folder, and count in a process that loads it."""
    from tests.fake_gpu.harness import compile_device, run

    done = run(compile_device(folder), str(Path(__file__)), "--worker")
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def count() -> dict[str, Any]:
    """Take the steps."""
    from dataclasses import replace

    from tests.fake_gpu.cases import case_of
    from tests.fake_gpu.harness import Taken, take_step

    small = {"vocabulary": 50257, "length": 1024, "size": 8, "student": (6, 768, 12), "teacher": (12, 768, 12)}
    case = replace(case_of("default", "bf16", "muon", False, 1), **small)

    def totals(taken: Taken) -> dict[str, float]:
        parts = (taken.gradients, taken.decision, taken.optimizer)
        return {
            "logit_bytes_moved": taken.gradients.logit_bytes,
            "gigabytes_moved": sum(part.bytes for part in parts) / 1e9,
            "teraflops": sum(part.operations for part in parts) / 1e12,
            "floor_ms": 1e3 * sum(part.floor for part in parts),
        }

    muon = take_step(case, compiled=True)
    padded = take_step(replace(case, padded=True), compiled=True)
    adamw = take_step(replace(case, optimizer="adamw"), compiled=True)
    deep = take_step(replace(case, student=(12, 768, 12)), compiled=True)
    kernels = {"adamw": adamw, "muon": muon, "muon_12_layers": deep}
    return {
        "synchronisations": sum(muon.waits.values()),
        "padded_synchronisations": sum(padded.waits.values()),
        "optimizer_kernels": {name: sum(one.optimizer.kernels.values()) for name, one in kernels.items()},
        **totals(muon),
        "eager": totals(take_step(case)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(count()), flush=True)
        os._exit(0)  # the library of the device does not survive the interpreter's end
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder))
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
