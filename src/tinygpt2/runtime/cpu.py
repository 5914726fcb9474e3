"""What makes training on a CPU fast: oneDNN's exact float32 products, and memory kept from step to step."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_memory() -> None:
    """Let this process keep the memory it frees, for the next step to use.

    A step takes and frees the same hundreds of megabytes over and over; by default the system takes them back
    each time and clears them page by page for the next. Does nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # older versions refuse more than 32 MiB
        if libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25):
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def fast_products() -> Iterator[None]:
    """Make float32 matrix products with oneDNN where those are exact: on some CPUs half as long as MKL's.

    Torch takes oneDNN for them only if a lower internal precision is allowed, but on a CPU without bfloat16
    matrix units oneDNN then still computes in float32. A product whose result shows the rounding decides.
    The earlier setting comes back at the end; meanwhile torch.get_float32_matmul_precision() raises, as torch
    does not let its two ways of setting a precision be mixed. Does nothing where there is a GPU.
    """
    import torch

    if torch.cuda.is_available():
        yield
        return
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    fine = torch.full((256, 256), 1 + 2**-23)
    if not torch.equal(fine @ torch.eye(256), fine):
        setting.fp32_precision = before
    try:
        yield
    finally:
        setting.fp32_precision = before
