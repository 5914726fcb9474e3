"""Count what a distillation step asks of a GPU, without one: on fake tensors, which have shapes but no numbers.

    python benchmarks/fake_gpu.py --json

GPT-2 small teaches a student (--layers x 768) with the default recipe, in bfloat16, on 8 blocks of 1024 tokens. The
training loop takes its third step on the fake GPU of tests/fake_gpu, which needs g++ once.

- `synchronisations`, `padded_synchronisations`: how often the host waits for the GPU.
- `optimizer_kernels`: kernels that an optimizer's step starts.
- `logit_bytes_moved`: bytes that element-wise work on logits moves. Each operation of an eager pass reads its inputs
  and writes its outputs; a compiled pass over a chunk reads each logit matrix twice and writes the gradient once.
- `gigabytes_moved`, `teraflops`: of all operations; the latter in matrix products and attention.
- `floor_ms`: the shortest time of the step by the data sheet of --card. Each operation takes as long as its bytes or
  its floating-point operations, whichever take longer. Waits and the starts of kernels are not counted. A real step
  takes longer.
- `dearest`: the operations that take most of this time.
- `eager`: the figures of bytes and time if the losses were not compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Data sheets: operations per second of float32 (with TF32 off) and 16-bit products (dense), bytes per second of memory
CARDS = {
    "H100 SXM": (67e12, 989e12, 3.35e12), "A100 SXM 80 GB": (19.5e12, 312e12, 2.04e12),
    "RTX 4090": (82.6e12, 165.2e12, 1.01e12), "L4": (30.3e12, 121e12, 0.3e12),
}  # fmt: skip


def floor_ms(work: list[Any], card: str) -> float:
    """Return the shortest time of some kernels in milliseconds. They are those of `Counts.work`."""
    single, half, memory = CARDS[card]
    seconds = (
        max(one.bytes / memory, one.operations / (half if one.kind in ("float16", "bfloat16") else single))
        for one in work
    )
    return 1000 * sum(seconds)


def dearest(work: list[Any], card: str, shown: int = 12) -> dict[str, dict[str, float]]:
    """Return how often the operations that take longest are done, their bytes, and their shortest time in all."""
    by_name: dict[str, list[Any]] = {}
    for one in work:
        by_name.setdefault(one.name, []).append(one)
    rows = {
        name: {"times": len(some), "gigabytes": sum(one.bytes for one in some) / 1e9, "ms": floor_ms(some, card)}
        for name, some in by_name.items()
    }
    return dict(sorted(rows.items(), key=lambda row: -row[1]["ms"])[:shown])


def count(options: argparse.Namespace) -> dict[str, Any]:
    """Count in this process, which has the fake GPU."""
    from tests.fake_gpu.cases import STEPS, Case, Sizes, run

    width, batch, card = options.width, options.micro_batch_size, options.card

    def parts(optimizer: str, *, padded: bool = False, layers: int = options.layers, compiled: bool = True) -> Any:
        shapes = (layers, width, options.heads), (12, 768, 12)
        case = Case(options.recipe, options.precision, optimizer, padded)
        found = run(case, sizes=Sizes(*shapes, 50257, options.sequence_length, batch), compiled=compiled)
        return found[f"step {STEPS}"], found["optimizer"]

    def figures(step: Any) -> dict[str, float]:
        return {
            "logit_bytes_moved": step.logit_bytes,
            "gigabytes_moved": sum(one.bytes for one in step.work) / 1e9,
            "teraflops": sum(one.operations for one in step.work) / 1e12,
            "floor_ms": floor_ms(step.work, card),
        }

    (usual, muon), (padded, _) = parts("muon"), parts("muon", padded=True)
    kernels = {"adamw": parts("adamw")[1], "muon": muon, "muon_12_layers": parts("muon", layers=12)[1]}
    return {
        "synchronisations": usual.synchronisations,
        "padded_synchronisations": padded.synchronisations,
        "optimizer_kernels": {name: one.kernels.total() for name, one in kernels.items()},
        **figures(usual),
        "card": card,
        "kernels": usual.kernels.total(),
        "dearest": dearest(usual.work, card),
        "eager": figures(parts("muon", compiled=False)[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--card", choices=CARDS, default="H100 SXM")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--layers", type=int, default=6, help="layers of the student")
    parser.add_argument("--width", type=int, default=768, help="hidden size of the student")
    parser.add_argument("--heads", type=int, default=12, help="heads of the student")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=1024)
    options = parser.parse_args()
    from tests.fake_gpu.device import ON_FAKE_GPU, start

    if ON_FAKE_GPU not in os.environ:
        sys.exit(start(str(Path(__file__)), *sys.argv[1:], capture=False).returncode)
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    found = count(options)
    if options.json:
        print(json.dumps(found))
    else:
        rows = found.pop("dearest")
        for name, value in found.items():
            print(f"{name:24} {value:,.1f}" if isinstance(value, float) else f"{name:24} {value}")
        for name, row in rows.items():
            print(f"{row['ms']:8.2f} ms {row['gigabytes']:8.2f} GB {row['times']:5} x {name}")
    sys.stdout.flush()
    os._exit(0)  # torch was not built for this device, and its end may crash


if __name__ == "__main__":
    main()
