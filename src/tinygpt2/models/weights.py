"""Weight files: which ones a model directory has, whether they fit the model, and their checksums."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt2.errors import ModelError, listed, one_line
from tinygpt2.utils.files import sha256_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GPT2LMHeadModel

CHECKSUMS = "SHA256SUMS"  # checksums of the weight files, in the format of `sha256sum -c`
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
RUN_PREFIX = "student."  # the names in a training checkpoint begin with it


def weight_files(directory: Path, *, allow_pickle: bool = False) -> list[Path]:
    """Return the weight files that `transformers` reads in a model directory: one file, or the shards of an index.

    Args:
        allow_pickle: return pickled weights if there are no safetensors.

    Raises:
        ModelError: the index cannot be read, or a shard that it lists is missing.
    """
    for name in (SAFETENSORS, PICKLE) if allow_pickle else (SAFETENSORS,):
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if not index.is_file():
            continue
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} does not list the files of the weights: {one_line(error)}") from error
        if missing := [shard for shard in shards if not (directory / str(shard)).is_file()]:
            raise ModelError(f"{index.name} in {directory} lists files that are missing: {listed(missing)}")
        return [directory / str(shard) for shard in shards]
    return []


def stored_tensors(files: Iterable[Path], where: str) -> dict[str, Tensor]:
    """Return every tensor in weight files, on the meta device: with its shape and dtype, but without values.

    Args:
        where: what error messages call the model.

    Raises:
        ModelError: a file cannot be read.
    """
    import torch
    from transformers.modeling_utils import load_state_dict

    found: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors = load_state_dict(file, map_location="meta")
            found |= {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
        except Exception as error:  # a broken file can make the library raise any exception
            raise ModelError(f"cannot load {where}: {file.name}: {one_line(error, 300)}") from error
    return found


def unused_tensors(found: dict[str, Tensor], model: GPT2LMHeadModel, where: str) -> list[str]:
    """Check that weight files hold every tensor of a model, and return the names of those that it does not use.

    Unused tensors are the old buffers of the causal mask, and the heads of other models. Names may lack
    `transformer.`, and those of a training checkpoint begin with `student.`.

    Args:
        found: the tensors in the files; see `stored_tensors`.
        model: needs only shapes, so it may be on the meta device.
        where: what error messages call the model.

    Raises:
        ModelError: a tensor is missing, has another shape or whole numbers, or the files have more blocks.
    """
    expected = model.state_dict()
    named = {_model_name(name, expected): tensor for name, tensor in found.items()}
    tied = {"lm_head.weight", "transformer.wte.weight"} if model.config.tie_word_embeddings else set()
    missing = [name for name in expected if name not in named and not (name in tied and tied & named.keys())]
    if missing:
        strange = None if expected.keys() & named.keys() else f"the names in its files are others: {listed(found)}"
        raise ModelError(f"{where}: missing weights: {listed(missing)}", strange)
    for name, tensor in expected.items():
        stored = named.get(name, tensor)
        if stored.shape != tensor.shape:
            raise ModelError(
                f"{where}: {name} should have shape {list(tensor.shape)} (from config.json), "
                f"but the weight files have {list(stored.shape)}"
            )
        if not stored.is_floating_point():
            raise ModelError(f"{where}: {name} is stored as {stored.dtype}: quantized weights are not supported")
    unused = [name for name in named if name not in expected]
    first = {_in_first_block(name) for name in expected if block_of(name)}
    if beyond := [name for name in unused if block_of(name) and _in_first_block(name) in first]:
        blocks = sorted({int(name.split(".")[2]) for name in beyond})
        raise ModelError(
            f"{where}: unexpected weights of block {listed(blocks)} ({beyond[0]}): "
            f"config.json says n_layer {model.config.n_layer}"
        )
    return unused


def _model_name(name: str, expected: Iterable[str]) -> str:
    """Return the name that a stored tensor has in the model."""
    name = name.removeprefix(RUN_PREFIX)
    return f"transformer.{name}" if f"transformer.{name}" in expected or name.startswith("h.") else name


def _in_first_block(name: str) -> str:
    """Return the name of the same tensor in block 0."""
    return "transformer.h.0" + name.removeprefix(block_of(name))


def write_checksums(directory: Path) -> None:
    """Write the SHA-256 of every safetensors file in a directory to its SHA256SUMS file."""
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in sorted(directory.glob("*.safetensors"))]
    (directory / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def check_checksums(directory: Path) -> Iterator[str]:
    """Yield a message for each file that is missing or has another SHA-256 than when it was saved."""
    sums = directory / CHECKSUMS
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else []:
        expected, _, name = line.partition("  ")
        if not (directory / name).is_file():
            yield f"{name} is listed in {CHECKSUMS}, but it is missing"
        elif sha256_of(directory / name) != expected:
            yield f"{name} was changed since it was saved: its SHA-256 differs from the one in {CHECKSUMS}"


def block_of(name: str) -> str:
    """Return the block in a tensor's name, such as `transformer.h.3`; an empty string for tensors outside blocks."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["transformer", "h"] and parts[2:3] and parts[2].isdigit() else ""
