"""Run the package on a fake GPU and show what was counted.

python -m tests.fake_gpu            # the cases of the test suite
python -m tests.fake_gpu --all      # every recipe, precision, optimizer, padded or not, accumulation 1 and 4
python -m tests.fake_gpu --json     # one line of JSON for each case
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from tests.fake_gpu.device import ON_FAKE_GPU, start


def results(*, every: bool, faults: bool) -> Iterator[dict[str, Any]]:
    """Run the cases in this process, which has the fake GPU."""
    from tests.fake_gpu.cases import Case, every_case, pairwise_cases, run
    from tests.fake_gpu.faults import CASE, FAULTS

    logging.getLogger("torch").setLevel(logging.CRITICAL)  # a fault that raises is not also to be written
    trained = every_case() if every else pairwise_cases()
    jobs: list[tuple[Case, str, str | None]] = [(case, "train", None) for case in trained]
    for precision in ("fp32", "bf16", "fp16"):
        jobs.append((Case(precision=precision), "perplexity", None))
        jobs.append((Case(precision=precision, padded=precision != "bf16"), "cached train", None))
        jobs.append((Case("tinygpt2", precision, accumulation=4), "auto-batch-size", None))
    jobs.append((Case(), "cut", None))
    jobs += [
        (Case(optimizer=one, precision="bf16", quantize="q4_0"), "quantized train", None) for one in ("adamw", "muon")
    ]
    jobs += [(CASE, "train", None)] + [(CASE, "train", name) for name in FAULTS] if faults else []
    for case, work, fault in jobs:
        row: dict[str, Any] = {"case": case.name, "work": work, "fault": fault, "padded": case.padded}
        row |= {
            "expected": FAULTS[fault][0] if fault else None,
            "optimizer": case.optimizer,
            "error": None,
            "parts": {},
        }
        try:
            parts = run(case, work, **({"planted": FAULTS[fault][1]} if fault else {}))
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
            parts = {}
        for name, counts in parts.items():
            row["parts"][name] = {
                "synchronisations": counts.synchronisations, "kernels": counts.kernels.total(),
                "waits": dict(counts.waits), "faults": dict(counts.faults), "logit_bytes": counts.logit_bytes,
            }  # fmt: skip
        yield row


def main() -> None:
    """Start the process with the fake GPU, or be it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every combination")
    parser.add_argument("--faults", action="store_true", help="also plant faults, and see whether they are found")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each case")
    options = parser.parse_args()
    if ON_FAKE_GPU not in os.environ:
        sys.exit(start("tests.fake_gpu", *sys.argv[1:], capture=False).returncode)
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    for row in results(every=options.all, faults=options.faults):
        if options.json:
            print(json.dumps(row), flush=True)
            continue
        print(f"{row['case']}, {row['work']}" + (f", planted: {row['fault']}" if row["fault"] else ""))
        if row["error"]:
            print(f"  raised {row['error'][:300]}")
        for name, counts in row["parts"].items():
            if name not in ("start", "end", "step 1", "step 2"):
                print(f"  {name}: {counts['synchronisations']} synchronisations, {counts['kernels']} kernels")
                for what in [*counts["waits"].items(), *counts["faults"].items()]:
                    print(f"    {what[1]} x {what[0]}")
    sys.stdout.flush()
    os._exit(0)  # torch was not built for this device, and its end may crash


if __name__ == "__main__":
    main()
