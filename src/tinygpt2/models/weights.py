"""Files of weights: names of tensors, tensors to ignore, checksums."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from tinygpt2.utils.files import sha256_of

SUMS = "SHA256SUMS"  # of the weights, as sha256sum writes and checks them

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def stored_tensor(directory: Path, name: str) -> Tensor | None:
    """Read one tensor from the weights' files, under its name with or without `transformer.`."""
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, "pt") as weights:
            for key in (name, name.removeprefix("transformer.")):
                if key in weights.keys():  # noqa: SIM118 - it is no dictionary
                    tensor: Tensor = weights.get_tensor(key)
                    return tensor
    return None


def check_sums(directory: Path) -> Iterator[str]:
    """Compare the weights with the checksums that were written with them."""
    sums = directory / SUMS
    for line in sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []:
        expected, _, name = line.partition("  ")
        if not (directory / name).is_file():
            yield f"{name} is missing, which {SUMS} names"
        elif sha256_of(directory / name) != expected:
            yield f"{name} is not the file that was saved: its SHA-256 is not that of {SUMS}"
