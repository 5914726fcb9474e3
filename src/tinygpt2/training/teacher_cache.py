"""A cache on disk for a teacher's last hidden states: they are computed once and serve several epochs and students.

The states are stored in bfloat16, which takes a fraction of the space that logits would take; each step computes the
logits from them, chunk by chunk. States are rounded to bfloat16 whether they were read or have just been computed. So
a run that fills the cache and a run that reads it learn the same, if the teacher computed the same products: with
another micro-batch or device, or with --compile, a few values are rounded differently.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.config.common import Precision
from tinygpt2.data.dataset import PackedDataset
from tinygpt2.errors import os_failure
from tinygpt2.utils.files import write_json
from tinygpt2.utils.progress import follow
from tinygpt2.utils.types import Array
from tinygpt2.utils.units import size

_FIGURES = (  # settings that change the states, in addition to the weights
    "n_head", "activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
)  # fmt: skip


class TeacherCache:
    """The last hidden states of one teacher on the training split of one dataset.

    states.bin holds the states of all blocks, one after another. checksums.bin holds a CRC-32 for each block, or 0 if
    its states are not computed yet. A block whose states do not match the checksum, after a crash or on a bad disk, is
    computed again. For the same reason, several processes may fill a cache at the same time.

    Args:
        root: the directory of all caches; this one gets a subdirectory.
        teacher, data, precision: the subdirectory's name is computed from the teacher's weights and their type, the
            content of the blocks, and the precision of the products.

    Raises:
        MachineError: there is too little space for the files.
        ConfigError: the files cannot be made, for example without permission to write.
    """

    def __init__(self, root: Path, teacher: GPT2LMHeadModel, data: PackedDataset, precision: Precision) -> None:
        self._shape = (len(data.train), data.sequence_length, teacher.config.n_embd)
        self.path = root / cache_name(teacher, data, precision)
        needed = cache_bytes(teacher.config, data)
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

    @property
    def filled(self) -> float:
        """The share of the blocks whose states are in the cache."""
        return float((self._checksums != 0).mean())

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
        lost = [i for i, row in enumerate(rows) if _checksum(kept[i]) != self._checksums[row]]
        if lost:
            made = compute(input_ids[lost]).to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
            for i, block in zip(lost, made, strict=True):
                self._states[rows[i]] = kept[i] = block
                self._checksums[rows[i]] = _checksum(block)
        return torch.from_numpy(np.stack(kept)).view(torch.bfloat16).to(input_ids.device)


def cache_bytes(teacher: GPT2Config, data: PackedDataset) -> int:
    """Return the size of all states in bytes."""
    return 2 * len(data.train) * data.sequence_length * int(teacher.n_embd)


def cache_name(teacher: GPT2LMHeadModel, data: PackedDataset, precision: Precision) -> str:
    """Return a name that depends only on the teacher, the precision and the content of the blocks."""
    digest = hashlib.sha256(f"{data.content} {precision}".encode())
    digest.update(repr([getattr(teacher.config, key) for key in _FIGURES]).encode())
    for name, tensor in teacher.transformer.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().view(torch.uint8).numpy()))
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
