"""The device that a command computes on, the number types of each precision, and the peak rates of devices."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from tinygpt2.config.common import Device, Precision, TrainingPrecision
from tinygpt2.config.models import DeviceOptions
from tinygpt2.errors import ConfigError

C = TypeVar("C", bound=DeviceOptions)
P = ParamSpec("P")
R = TypeVar("R")

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_chosen: Device = "auto"  # by the command that runs


def current_device() -> torch.device:
    """Return the device of the command that runs; by default a CUDA GPU if there is one, else the CPU."""
    if _chosen == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(_chosen)


def on_cuda() -> bool:
    """Return whether the command that runs computes on a CUDA GPU."""
    return current_device().type == "cuda"


@contextmanager
def device_chosen(device: Device) -> Iterator[None]:
    """While the block runs, compute on this device. `auto` keeps the choice of the block around it.

    Raises:
        ConfigError: torch cannot use such a device here.
    """
    global _chosen
    if device == "auto":
        yield
        return
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[device]:
        kind = "no CUDA GPU" if device == "cuda" else "no Apple GPU (MPS)"
        raise ConfigError(
            f"--device {device}: torch {torch.__version__} finds {kind} on this machine",
            "use --device cpu, or auto; for a GPU, install torch's build for it",
        )
    before, _chosen = _chosen, device
    try:
        yield
    finally:
        _chosen = before


def computes_on_device(command: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """Decorate a function whose first argument is a configuration: it computes on `config.device`."""

    @wraps(command)
    def run(config: C, /, *arguments: P.args, **more: P.kwargs) -> R:
        with device_chosen(config.device):
            return command(config, *arguments, **more)

    return run


def chosen_precision(asked: TrainingPrecision) -> Precision:
    """Return the number format of training: the one that was asked for, or for `auto` the fastest safe one.

    That is bf16 on a CUDA GPU that has it, fp16 on an older one, and fp32 elsewhere. The first GPU of the machine
    decides, so all processes on one machine choose the same.
    """
    if asked != "auto":
        return asked
    if not on_cuda():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices at least as fast as float32 ones.

    On an x86 CPU without AVX-512, torch's bfloat16 products take ten times as long as float32's. CUDA GPUs before
    Ampere only emulate them.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """While the block runs, compute float32 products on a CUDA GPU in TF32, or exactly, as evaluation needs them."""
    if not on_cuda():
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision == "tf32"
    matmul.allow_tf32 = tf32  # sets both of torch's settings, which must agree; `fp32_precision` sets one of them
    try:
        yield
    finally:
        matmul.allow_tf32 = before


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """While the block runs, allow only algorithms that give the same bits every time, if that is wanted.

    Call it before the first product on a GPU: cuBLAS reads its setting then.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of the two that NVIDIA names, the faster one
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    settings = (cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(True)
    # nothing here reads memory before it is written, so it need not be filled
    cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = True, False, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = settings


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 numbers of a device can be computed: there, or on the CPU for Apple's GPUs, without them."""
    return torch.device("cpu") if device.type == "mps" else device


# Dense peak rates in 10^12 operations per second: (float32, TF32, bf16 and fp16). From NVIDIA's data sheets, halved
# where they count sparsity; those of the RTX 3090, 4090 and 5090 are from the white papers on their architectures, with
# sums in float32. A longer name, such as H200 NVL, comes before the name that it begins with. Laptops have no entry:
# their rate depends on the power that the maker allows.
PEAKS = {
    "GB300": (80, 1250, 2500), "GB200": (80, 1250, 2500), "B300": (75, 1125, 2250), "B200": (75, 1125, 2250),
    "H200 NVL": (60, 417, 835), "H200": (67, 494, 989), "GH200": (67, 494, 989), "H20": (44, 74, 148),
    "H100 NVL": (60, 417, 835), "H100 PCIe": (51, 378, 756), "H100": (67, 494, 989),
    "A100": (19.5, 156, 312), "A40": (37.4, 74.8, 149.7), "A30": (10.3, 82, 165), "A10G": (31.5, 35, 70),
    "A10": (31.2, 62.5, 125), "L40S": (91.6, 183, 362), "L40": (90.5, 90.5, 181), "L4": (30.3, 60, 121),
    "V100": (15.7, 15.7, 125), "T4": (8.1, 8.1, 65),
    "RTX A6000": (38.7, 77.4, 154.8), "RTX 6000 Ada": (91.1, 182.1, 364.2),
    "RTX 5090": (104.8, 104.8, 209.5), "RTX 4090": (82.6, 82.6, 165.2), "RTX 3090": (35.6, 35.6, 71),
}  # fmt: skip
_WITHOUT_BF16 = ("V100", "T4")  # and without TF32


def device_peak(device: torch.device, precision: TrainingPrecision) -> float | None:
    """Return a device's peak rate in operations per second, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    part = next((part for part in PEAKS if re.search(rf"\b{part}\b(?!.*Laptop)", name)), None)
    if part is None or (precision == "bf16" and part in _WITHOUT_BF16):
        return None
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return PEAKS[part][2 if precision != "fp32" else int(tf32)] * 1e12


def measured_rate(device: torch.device, precision: TrainingPrecision) -> float:
    """Return the operations per second of a matrix product on this device: the best of five measurements."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=DTYPES[precision])
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
