"""The cores of this process; faster training on a CPU by oneDNN's exact products and by memory that is reused."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from tinygpt2.utils.progress import detail

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def usable_cores() -> int:
    """Return the number of cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_bf16_units() -> bool:
    """Return whether the CPU multiplies bfloat16 matrices in hardware, as far as torch knows it."""
    import torch

    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not have it
    return any(known.get(unit) for unit in ("avx512_bf16", "amx_bf16"))


def wait_passively() -> None:
    """Let waiting threads sleep soon. Call it before torch is imported; it does nothing if OMP_WAIT_POLICY is set.

    By default, the threads of OpenMP spin while they wait for each other. If another process needs a core, each spins
    for the whole time slice of the other. Waking a thread takes time, too. With GNU's OpenMP, a thread therefore spins
    for some microseconds first, which is enough between most products of a training step (benchmarks/threads.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_memory() -> None:
    """Let this process keep the memory that it frees, so that the next step can use it.

    Every step allocates and frees the same hundreds of megabytes. By default, the system takes them back each time
    and clears them page by page for the next step. Does nothing if the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # older versions of glibc refuse more than 32 MiB
        if libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25):
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def fast_products(*, tf32: bool = False) -> Iterator[None]:
    """Compute float32 matrix products in the fastest way that is right for what the block does.

    On a CPU, oneDNN is used if it is exact: on some CPUs its products take half as long as MKL's. Torch uses oneDNN
    only if a lower internal precision is allowed. On a CPU without bfloat16 matrix units, oneDNN still computes in
    float32 then. This function tries a product whose result shows any rounding, and uses oneDNN only if it was not
    rounded.

    The earlier setting returns at the end of the block. Inside it, torch.get_float32_matmul_precision() raises an
    error, because torch does not allow its two ways of setting a precision to be mixed.

    Args:
        tf32: whether products on a CUDA GPU may round their operands to TF32's 10 bits of fraction, as training may.
    """
    import torch

    from tinygpt2.runtime.devices import current_device, float32_products

    if current_device().type != "cpu":
        with float32_products(tf32=tf32):
            yield
        return
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    fine = torch.full((256, 256), 1 + 2**-23)
    exact = torch.equal(fine @ torch.eye(256), fine)
    if not exact:
        setting.fp32_precision = before
    detail(f"float32 products: {'by oneDNN, which is exact on this CPU' if exact else 'as torch chooses them'}")
    try:
        yield
    finally:
        setting.fp32_precision = before
