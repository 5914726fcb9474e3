"""How many threads compute: every core, but one for work that is too small to share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tinygpt2.runtime.devices import current_device
from tinygpt2.utils.progress import detail

SHARED = 1e8  # operations of a forward pass below which one thread is faster than two: benchmarks/threads.py


def on_several_threads(operations: float) -> bool:
    """Return whether forward passes with that many operations are computed by several threads, see `enough_threads`."""
    if current_device().type != "cpu" or torch.get_num_threads() == 1:
        return False
    return operations >= SHARED or bool(os.environ.get("OMP_NUM_THREADS"))


@contextmanager
def enough_threads(operations: float) -> Iterator[None]:
    """Compute on one thread in the block if its forward passes are too small for several.

    Threads wait for each other after every product. If the products are small, or another process needs a core, they
    wait longer than they compute. The earlier number returns at the end of the block. A number of threads that
    OMP_NUM_THREADS gives is kept.

    Args:
        operations: floating-point operations of one forward pass.
    """
    threads = torch.get_num_threads()
    if current_device().type != "cpu" or threads == 1 or on_several_threads(operations):
        yield
        return
    detail(
        f"1 thread instead of {threads}: a forward pass takes {operations / 1e6:,.0f} million operations, "
        f"fewer than {SHARED / 1e6:,.0f} million (OMP_NUM_THREADS sets the number)"
    )
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tell_machine(device: torch.device, precision: str) -> None:
    """Say with --verbose on what a command computes."""
    where = f"device {device}, precision {precision}"
    if device.type == "cpu":
        named = "OMP_NUM_THREADS" if os.environ.get("OMP_NUM_THREADS") else "one for each core"
        where += f", {torch.get_num_threads()} threads ({named}), OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY')}"
    detail(where)
