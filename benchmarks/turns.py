"""Run variants of one job in turns, each in its own process.

So the peak memory of each variant is measured separately, and ratios are fair on a machine whose speed varies. A
variant is the benchmark script itself, called with `--worker`. It prints one line of JSON when it is ready, and one for
every line that it reads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def resident(key: str) -> int:
    """Return VmRSS or VmHWM (the peak) of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


def forget_peak() -> None:
    """Reset VmHWM, so that it counts from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


class Worker:
    """One variant in its own process.

    Args:
        script: the benchmark script to run.
        arguments: its arguments, which make it a worker.
        python: the Python interpreter to run it with.
    """

    def __init__(self, script: str, arguments: list[str], python: str = sys.executable) -> None:
        self.process = subprocess.Popen(
            [python, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = self._read()
        self.turns: list[dict[str, Any]] = []

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with exit code {self.process.wait()}")
        return dict(json.loads(line))

    def turn(self) -> None:
        """Run the job once and keep the answer in `turns`."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.turns.append(self._read())

    def end(self) -> None:
        """End the process."""
        self.process.communicate()
