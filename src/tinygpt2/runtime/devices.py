"""The device to use, the number types of each precision, and the peak rates of devices."""

from __future__ import annotations

import re
import time

import torch

from tinygpt2.config.common import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Dense peak rates from the makers' data sheets, in 10^12 operations per second: (float32 with TF32 off, 16 bits)
PEAKS = {
    "H200": (67, 989), "H100 PCIe": (51, 756), "H100": (67, 989), "GH200": (67, 989), "B200": (75, 2250),
    "A100": (19.5, 312), "A40": (37.4, 149.7), "A10": (31.2, 125), "L40S": (91.6, 362), "L4": (30.3, 121),
    "V100": (15.7, 125), "T4": (8.1, 65), "RTX 4090": (82.6, 165.2), "RTX 3090": (35.6, 71),
}  # fmt: skip


def device_peak(device: torch.device, precision: Precision) -> float | None:
    """Return a device's peak rate in operations per second, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = next((peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
    return None if peaks is None else peaks[precision != "fp32"] * 1e12


def measured_rate(device: torch.device, precision: Precision) -> float:
    """Return the operations per second of a matrix product on this device: the best of five measurements."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=DTYPES[precision])
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
