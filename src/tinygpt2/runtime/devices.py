"""The device that a command computes on, the number types of each precision, and the peak rates of devices."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

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


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 numbers of a device can be computed: there, or on the CPU for Apple's GPUs, without them."""
    return torch.device("cpu") if device.type == "mps" else device


# Dense peak rates from the makers' data sheets, in 10^12 operations per second: (float32 with TF32 off, 16 bits)
PEAKS = {
    "H200": (67, 989), "H100 PCIe": (51, 756), "H100": (67, 989), "GH200": (67, 989), "B200": (75, 2250),
    "A100": (19.5, 312), "A40": (37.4, 149.7), "A10": (31.2, 125), "L40S": (91.6, 362), "L4": (30.3, 121),
    "V100": (15.7, 125), "T4": (8.1, 65), "RTX 4090": (82.6, 165.2), "RTX 3090": (35.6, 71),
}  # fmt: skip


def device_peak(device: torch.device, precision: TrainingPrecision) -> float | None:
    """Return a device's peak rate in operations per second, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = next((peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
    return None if peaks is None else peaks[precision != "fp32"] * 1e12


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
