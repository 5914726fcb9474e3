"""A cache on disk for a teacher's last hidden states: they are computed once and serve several epochs and students.

The states are stored in bfloat16, which takes a fraction of the space that logits would take; each step computes the
logits from them, chunk by chunk. States are rounded to bfloat16 whether they were read or have just been computed. So
a run that fills the cache and a run that reads it learn the same, if the teacher computed the same products: with
another micro-batch or device, or with --compile, a few values are rounded differently.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tinygpt2.config.common import Precision
from tinygpt2.data.dataset import PackedDataset, to_device
from tinygpt2.errors import os_failure
from tinygpt2.models.teachers.loading import as_teacher
from tinygpt2.models.teachers.teacher import Teacher
from tinygpt2.utils.files import write_json
from tinygpt2.utils.progress import follow
from tinygpt2.utils.types import Array
from tinygpt2.utils.units import size


class TeacherCache:
    """The last hidden states of one teacher on the training split of one dataset.

    states.bin holds the states of all blocks, one after another. checksums.bin holds a CRC-32 for each block, or 0 if
    its states are not computed yet. A block whose states do not match the checksum, after a crash or on a bad disk, is
    computed again. For the same reason, several processes may fill a cache at the same time.

    Args:
        root: the directory of all caches; this one gets a subdirectory.
        teacher, data, precision: the subdirectory's name is computed from the teacher's weights and their type, how it
            reads the student's tokens, the content of the blocks, and the precision of the products.

    Raises:
        MachineError: there is too little space for the files.
        ConfigError: the files cannot be made, for example without permission to write.
    """

    def __init__(
        self, root: Path, teacher: Teacher | PreTrainedModel, data: PackedDataset, precision: Precision
    ) -> None:
        teacher = as_teacher(teacher)
        self._shape = _stored_shape(teacher, data)
        self.path = root / cache_name(teacher, data, precision)
        needed = cache_bytes(teacher, data)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _reserve(self.path / "states.bin", needed)
            _reserve(self.path / "checksums.bin", 4 * len(data.train))
            about = {"sequences": self._shape[0], "length": self._shape[1], "width": self._shape[2]}
            write_json(self.path / "about.json", {**about, "dtype": "bfloat16", "data": data.content})
        except OSError as error:
            raise os_failure(
                error,
                f"--teacher-cache {root}: {size(needed)} cannot be reserved there",
                "or give another directory, or leave out --teacher-cache",
            ) from error
        self._states: Array = np.memmap(self.path / "states.bin", np.int16, "r+", shape=self._shape)
        self._checksums: Array = np.memmap(self.path / "checksums.bin", np.uint32, "r+", shape=self._shape[:1])
        self._checked = np.zeros(len(data.train), np.bool_)

    @property
    def filled(self) -> float:
        """The share of the blocks whose states are in the cache."""
        return float((self._checksums != 0).mean())

    def read(self, rows: Sequence[int], device: torch.device) -> CachedStates:
        """Read the states of some blocks from the disk, if the cache has all of them.

        Args:
            device: where they will be needed; for a GPU they are read into memory that it can copy from by itself.
        """
        if not all(self._checksums[row] for row in rows):
            return CachedStates(list(rows), None)
        blocks = torch.empty((len(rows), *self._shape[1:]), dtype=torch.bfloat16, pin_memory=device.type == "cuda")
        for row, block in zip(rows, blocks.view(torch.int16).numpy(), strict=True):
            block[:] = self._states[row]
            if not self._matches(row, block):
                return CachedStates(list(rows), None)
        return CachedStates(list(rows), blocks)

    def states(
        self, rows: Sequence[int], input_ids: Int[Tensor, "B T"], compute: Callable[[Tensor], Float[Tensor, "B T D"]]
    ) -> Float[Tensor, "B T D"]:
        """Return the states of some blocks in bfloat16. States that are not in the cache are computed and stored.

        Args:
            rows: the numbers of the blocks.
            input_ids: their tokens.
            compute: runs the teacher on tokens and returns its last hidden states.
        """
        kept = [self._states[row] for row in rows]
        lost = [i for i, row in enumerate(rows) if not self._matches(row, kept[i])]
        if not lost:
            return torch.from_numpy(np.stack(kept)).view(torch.bfloat16).to(input_ids.device)
        fresh = compute(input_ids if len(lost) == len(rows) else input_ids[lost]).to(torch.bfloat16)
        for i, block in zip(lost, fresh.cpu().contiguous().view(torch.int16).numpy(), strict=True):
            self._states[rows[i]] = kept[i] = block
            self._checksums[rows[i]] = _checksum(block)
            self._checked[rows[i]] = True
        if len(lost) == len(rows):
            return fresh
        return torch.from_numpy(np.stack(kept)).view(torch.bfloat16).to(input_ids.device)

    def _matches(self, row: int, block: Array) -> bool:
        """Return whether a block's states are in the cache and undamaged; they are checked once."""
        if not self._checked[row]:
            self._checked[row] = _checksum(block) == self._checksums[row]
        return bool(self._checked[row])


class CachedStates(NamedTuple):
    """The teacher's states of some blocks, as the cache has them.

    Attributes:
        rows: the numbers of the blocks.
        states: in bfloat16 (B, T, D); None if the cache lacks any of them.
    """

    rows: list[int]
    states: Float[Tensor, "B T D"] | None

    def to(self, device: torch.device) -> CachedStates:
        """Return them with their states on another device, which is not waited for."""
        return CachedStates(self.rows, None if self.states is None else to_device(self.states, device))


def _stored_shape(teacher: Teacher, data: PackedDataset) -> tuple[int, int, int]:
    return len(data.train), teacher.covered(data.sequence_length), teacher.shape.last_width


def cache_bytes(teacher: Teacher, data: PackedDataset) -> int:
    """Return the size of all states in bytes."""
    return 2 * math.prod(_stored_shape(teacher, data))


def cache_name(teacher: Teacher | PreTrainedModel, data: PackedDataset, precision: Precision) -> str:
    """Return a name that depends only on the teacher, the precision and the content of the blocks."""
    digest = hashlib.sha256(f"{data.content} {precision}".encode())
    for name, tensor in as_teacher(teacher).identity():
        if tensor is None:
            digest.update(name.encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values: Any = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest.update(memoryview(values))
    return digest.hexdigest()[:16]


def _checksum(block: Array) -> int:
    return zlib.crc32(np.ascontiguousarray(block).data) or 1  # 0 means that the block is not computed yet


def _reserve(path: Path, length: int) -> None:
    """Make a file and reserve its space: writing to a memory map on a full disk would kill the process."""
    if path.is_file() and path.stat().st_size == length:
        return
    try:
        with path.open("ab") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, length)
            else:
                for start in follow(range(0, length, 1 << 20), f"reserve {path}", "MiB", announce=False):
                    file.write(bytes(min(1 << 20, length - start)))
    except OSError:
        path.unlink(missing_ok=True)
        raise
