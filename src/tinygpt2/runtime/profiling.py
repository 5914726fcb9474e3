"""`--profile N`: a trace of some training steps by torch's profiler, and the kernels that take the longest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from tinygpt2.errors import explained
from tinygpt2.runtime.devices import on_cuda
from tinygpt2.runtime.processes import rank
from tinygpt2.utils.progress import say

TRACE = "trace.json.gz"
_SKIPPED, _WARMED = 2, 1  # steps before the trace: the first ones compile and choose kernels; one warms the profiler up
_SHOWN = 10  # kernels in the table
_NAME = 70  # longest name of a kernel in the table


class Profiler(Protocol):
    """What the training loop tells of its steps."""

    def step(self) -> Any:
        """Say that a step is done."""


class _NoProfiler:
    def step(self) -> None:
        pass


@contextmanager
def profiled(steps: int | None, folder: Path) -> Iterator[Profiler]:
    """Trace some steps of the block, write the trace into a folder, and report the kernels that took the longest.

    The block calls `step` after every step. Only the first process of several is traced. The first three steps are not.

    Args:
        steps: how many to trace; None traces nothing.

    Raises:
        ConfigError, MachineError: the trace cannot be written.
    """
    if steps is None or rank():
        yield _NoProfiler()
        return
    traced: list[Path] = []

    def write(found: Any) -> None:
        with explained(f"--profile: {folder}", "add --resume to continue the run"):
            folder.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(folder / TRACE))
        traced.append(folder / TRACE)
        say(f"--profile: {folder / TRACE}, for ui.perfetto.dev or chrome://tracing")
        for line in kernel_table(found.key_averages()):
            say(line)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda() else [])]
    plan = schedule(wait=_SKIPPED, warmup=_WARMED, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler
    if not traced:
        say(f"--profile: the run ended before the trace began, after step {_SKIPPED + _WARMED}")


def kernel_table(events: Any) -> list[str]:
    """Return the lines of a table of the kernels that took the longest: on the GPU if there are any, else on the CPU.

    Args:
        events: of torch's profiler, as `key_averages` sums them up.
    """
    on_gpu = [one for one in events if one.device_type == DeviceType.CUDA]
    times = {
        one: (one.self_device_time_total if on_gpu else one.self_cpu_time_total)
        for one in (on_gpu or events)
        if not one.key.startswith("ProfilerStep")
    }
    whole = sum(times.values()) or 1.0
    longest = sorted(times, key=lambda one: -times[one])[:_SHOWN]
    lines = [f"{'share':>6}  {'ms':>9}  {'calls':>6}  {'kernel' if on_gpu else 'operation'}"]
    for one in longest:
        name = one.key if len(one.key) <= _NAME else f"{one.key[: _NAME - 3]}..."
        lines.append(f"{times[one] / whole:>6.1%}  {times[one] / 1000:>9.2f}  {one.count:>6}  {name}")
    return lines
