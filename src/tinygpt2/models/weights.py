"""Weight files: finding tensors by name, and the checksums that are saved next to the files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from tinygpt2.utils.files import sha256_of

CHECKSUMS = "SHA256SUMS"  # checksums of the weight files, in the format of `sha256sum -c`
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory."""
    return sorted(directory.glob("model*.safetensors"))


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a safetensors file. Yield it, and a mapping from each tensor's name in the model to its name in the file.

    Names in the model begin with `transformer.`, but some files leave that out.
    """
    with safe_open(file, "pt") as weights:
        prefix = "transformer."
        yield weights, {key if key.startswith((prefix, "lm_head.")) else prefix + key: key for key in weights.keys()}  # noqa: SIM118 - it is not a dictionary


def stored_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor in a safetensors file, by its name in the model. Reads only the header."""
    with _opened(file) as (weights, keys):
        return {name: weights.get_slice(key).get_shape() for name, key in keys.items()}


def stored_tensor(directory: Path, name: str) -> Tensor | None:
    """Read one tensor of a model directory by its name in the model; None if no file has it."""
    for file in weight_files(directory):
        with _opened(file) as (weights, keys):
            if name in keys:
                tensor: Tensor = weights.get_tensor(keys[name])
                return tensor
    return None


def write_checksums(directory: Path) -> None:
    """Write the SHA-256 of every safetensors file in a directory to its SHA256SUMS file."""
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in sorted(directory.glob("*.safetensors"))]
    (directory / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def check_checksums(directory: Path) -> Iterator[str]:
    """Yield a message for each file that is missing or has another SHA-256 than when it was saved."""
    sums = directory / CHECKSUMS
    for line in sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []:
        expected, _, name = line.partition("  ")
        if not (directory / name).is_file():
            yield f"{name} is listed in {CHECKSUMS}, but it is missing"
        elif sha256_of(directory / name) != expected:
            yield f"{name} was changed since it was saved: its SHA-256 differs from the one in {CHECKSUMS}"


def block_of(name: str) -> str:
    """Return the block in a tensor's name, such as `transformer.h.3`; an empty string for tensors outside blocks."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["transformer", "h"] else ""
