"""A cache on disk for what a teacher says of each block: it is computed once and serves several epochs and students.

It holds the teacher's last hidden states, or its predictions in the records of `SparseForm`, which need no teacher.
The states are stored in bfloat16, which takes a fraction of the space that logits would take; each step computes the
logits from them, chunk by chunk. States are rounded to bfloat16 whether they were read or have just been computed. So
a run that fills the cache and a run that reads it learn the same, if the teacher computed the same products: with
another micro-batch or device, or with --compile, a few values are rounded differently.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tinygpt2.config.common import Precision
from tinygpt2.config.distillation import CacheKind, DistillConfig
from tinygpt2.data.batches.batch import to_device
from tinygpt2.data.dataset import PackedDataset
from tinygpt2.errors import DataError, ModelError, os_failure
from tinygpt2.models.documents import Documents
from tinygpt2.models.lm_head import Head
from tinygpt2.models.teachers.loading import as_teacher
from tinygpt2.models.teachers.teacher import Teacher
from tinygpt2.objectives.sparse import SparseForm
from tinygpt2.objectives.stored import ABOUT, find_predictions
from tinygpt2.utils.files import shared_name, write_json
from tinygpt2.utils.progress import follow
from tinygpt2.utils.types import Array
from tinygpt2.utils.units import size


class TeacherCache:
    """The last hidden states of one teacher on the training split of one dataset, or its predictions.

    states.bin holds the states (or the records of predictions) of all blocks, one after another. checksums.bin holds
    a CRC-32 for each block, or 0 if its states are not computed yet. A block whose states do not match the checksum,
    after a crash or on a bad disk, is computed again. For the same reason, several processes may fill a cache at the
    same time.

    Args:
        root: the directory of all caches; this one gets a subdirectory.
        teacher, data, precision: the subdirectory's name is computed from the teacher's weights and their type, how it
            reads the student's tokens, the content of the blocks, and the precision of the products; for predictions,
            also from the form and the weights of the output matrix.
        form: of the teacher's predictions, if the cache holds them and not states.
        name: of the teacher, for the model cards of students that learn from the cache alone.

    Attributes:
        path: the directory with the files.
        form: as the argument.
        name: the teacher's name without its directories; empty if it is not known.
        covered: for how many positions of each block the cache has something.

    Raises:
        MachineError: there is too little space for the files.
        ConfigError: the files cannot be made, for example without permission to write.
    """

    def __init__(
        self,
        root: Path,
        teacher: Teacher | PreTrainedModel,
        data: PackedDataset,
        precision: Precision,
        form: SparseForm | None = None,
        name: str = "",
    ) -> None:
        teacher = as_teacher(teacher)
        shape = _stored_shape(teacher, data, form)
        path = root / cache_name(teacher, data, precision, form)
        needed = cache_bytes(teacher, data, form)
        try:
            path.mkdir(parents=True, exist_ok=True)
            _reserve(path / "states.bin", needed)
            _reserve(path / "checksums.bin", 4 * len(data.train))
            about: dict[str, Any] = {"sequences": shape[0], "length": shape[1], "width": shape[2]}
            about |= {"dtype": "bfloat16"} if form is None else {**asdict(form), "teacher": shared_name(name)}
            write_json(path / ABOUT, {**about, "data": data.content})
        except OSError as error:
            raise os_failure(
                error,
                f"--teacher-cache {root}: {size(needed)} cannot be reserved there",
                "or give another directory, or leave out --teacher-cache",
            ) from error
        self._open(path, shape, form, shared_name(name), "r+")

    def _open(
        self, path: Path, shape: tuple[int, int, int], form: SparseForm | None, name: str, mode: Literal["r", "r+"]
    ) -> None:
        self.path, self.form, self.name, self._shape, self.covered = path, form, name, shape, shape[1]
        self._states: Array = np.memmap(path / "states.bin", np.int16, mode, shape=shape)
        self._checksums: Array = np.memmap(path / "checksums.bin", np.uint32, mode, shape=shape[:1])
        self._checked = np.zeros(shape[0], np.bool_)
        self._type = torch.bfloat16 if form is None else torch.int16
        self._head: list[Head] = []

    @classmethod
    def of_predictions(
        cls, root: Path, data: PackedDataset, kind: CacheKind | None, temperature: float
    ) -> TeacherCache:
        """Open a complete cache of predictions, without their teacher and only for reading.

        Args, Raises:
            As `find_predictions`; also DataError if some blocks are missing, or a file has the wrong size.
        """
        found = find_predictions(root, data.content, kind, temperature)
        cache, shape = cls.__new__(cls), (len(data.train), found.length, found.form.width)
        for name, wanted in (("states.bin", 2 * math.prod(shape)), ("checksums.bin", 4 * shape[0])):
            file = found.path / name
            if not file.is_file() or file.stat().st_size != wanted:
                raise DataError(f"{file} does not have {wanted:,} bytes", "remove it, and run tinygpt2 teach again")
        cache._open(found.path, shape, found.form, found.teacher, "r")
        if cache.filled < 1:
            raise DataError(
                f"{found.path} holds only {cache.filled:.1%} of the teacher's predictions",
                "run tinygpt2 teach again, which continues, or give --teacher",
            )
        return cache

    @property
    def kind(self) -> str:
        """What the cache holds: `states`, `samples` or `top`."""
        return "states" if self.form is None else self.form.kind

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens that are predicted; None for states."""
        return None if self.form is None else self.form.vocabulary

    def check_student(self, name: str, vocabulary: int) -> None:
        """Check that a student has all tokens that are predicted.

        Raises:
            ModelError: it has fewer.
        """
        if self.vocabulary is not None and self.vocabulary > vocabulary:
            raise ModelError(
                f"{self.path} has predictions of {self.vocabulary:,} tokens, and student {name} has {vocabulary:,}",
                f"give a student with {self.vocabulary:,} tokens; a preset gets that many",
            )

    @property
    def bytes(self) -> int:
        """The size of states or records and of the checksums."""
        return int(self._states.nbytes + self._checksums.nbytes)

    @property
    def filled(self) -> float:
        """The share of the blocks for which something is in the cache."""
        return float((self._checksums != 0).mean())

    def read(self, rows: Sequence[int], device: torch.device) -> CachedStates:
        """Read the states of some blocks from the disk, if the cache has all of them.

        Args:
            device: where they will be needed; for a GPU they are read into memory that it can copy from by itself.
        """
        if not all(self._checksums[row] for row in rows):
            return CachedStates(list(rows), None)
        blocks = torch.empty((len(rows), *self._shape[1:]), dtype=self._type, pin_memory=device.type == "cuda")
        for row, block in zip(rows, blocks.view(torch.int16).numpy(), strict=True):
            block[:] = self._states[row]
            if not self._matches(row, block):
                return CachedStates(list(rows), None)
        return CachedStates(list(rows), blocks)

    def states(
        self,
        rows: Sequence[int],
        input_ids: Int[Tensor, "B T"],
        compute: Callable[[Tensor, Documents | None], Float[Tensor, "B T D"]],
        documents: Documents | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the states of some blocks in bfloat16, or their records. What the cache lacks is computed and stored.

        Args:
            rows: the numbers of the blocks.
            input_ids: their tokens.
            compute: runs the teacher on tokens and their documents, and returns its last hidden states, or records.
            documents: of the blocks, if they have some that are apart.
        """
        kept = [self._states[row] for row in rows]
        lost = [i for i, row in enumerate(rows) if not self._matches(row, kept[i])]
        if not lost:
            return torch.from_numpy(np.stack(kept)).view(self._type).to(input_ids.device)
        if len(lost) < len(rows):
            input_ids = input_ids[lost]
            documents = documents and Documents([documents.lengths[i] for i in lost], input_ids.device)
        fresh = compute(input_ids, documents).to(self._type)
        for i, block in zip(lost, fresh.cpu().contiguous().view(torch.int16).numpy(), strict=True):
            self._states[rows[i]] = kept[i] = block
            self._checksums[rows[i]] = _checksum(block)
            self._checked[rows[i]] = True
        if len(lost) == len(rows):
            return fresh
        return torch.from_numpy(np.stack(kept)).view(self._type).to(input_ids.device)

    def computed(self, teacher: Teacher, input_ids: Int[Tensor, "B T"], documents: Documents | None = None) -> Tensor:
        """Return what the cache is to hold of some blocks: see `states`.

        Args:
            teacher: is moved to the blocks' device. With a full cache it is on the host, until a block is damaged.
            documents: as the argument of `states`.
        """
        last = teacher.shape.layers
        states = teacher.to(input_ids.device).collect(input_ids, [last], documents=documents).states[last]
        if self.form is None:
            return states
        self._head = self._head or [teacher.head()]
        return self.form.records(self._head[0], states, input_ids)

    def holds(self, row: int) -> bool:
        """Return whether a block is in the cache and undamaged."""
        return bool(self._checksums[row]) and self._matches(row, self._states[row])

    def _matches(self, row: int, block: Array) -> bool:
        """Return whether a block's states are in the cache and undamaged; they are checked once."""
        if not self._checked[row]:
            self._checked[row] = _checksum(block) == self._checksums[row]
        return bool(self._checked[row])


class CachedStates(NamedTuple):
    """The teacher's states of some blocks, as the cache has them.

    Attributes:
        rows: the numbers of the blocks.
        states: in bfloat16 (B, T, D), or records (B, T, R); None if the cache lacks any of them.
    """

    rows: list[int]
    states: Tensor | None

    def to(self, device: torch.device) -> CachedStates:
        """Return them with their states on another device, which is not waited for."""
        return CachedStates(self.rows, None if self.states is None else to_device(self.states, device))


def open_without_teacher(config: DistillConfig, data: PackedDataset) -> TeacherCache:
    """Open the cache of predictions of a run that has no teacher.

    Raises:
        ConfigError, DataError: see `TeacherCache.of_predictions`.
    """
    root, kind = Path(config.teacher_cache or ""), config.teacher_cache_kind
    return TeacherCache.of_predictions(root, data, kind, config.temperature)


def _stored_shape(teacher: Teacher, data: PackedDataset, form: SparseForm | None) -> tuple[int, int, int]:
    width = teacher.shape.last_width if form is None else form.width
    return len(data.train), teacher.covered(data.sequence_length), width


def cache_bytes(teacher: Teacher, data: PackedDataset, form: SparseForm | None = None) -> int:
    """Return the size of all states or records in bytes."""
    return 2 * math.prod(_stored_shape(teacher, data, form))


def cache_name(
    teacher: Teacher | PreTrainedModel, data: PackedDataset, precision: Precision, form: SparseForm | None = None
) -> str:
    """Return a name that depends only on the teacher, the precision, the content of the blocks, and the form."""
    digest = hashlib.sha256(f"{data.content} {precision}".encode())
    parts = list(as_teacher(teacher).identity())
    if form is not None:
        parts += [(repr(form), None), *((f"output {name}", x) for name, x in teacher_output(teacher).items())]
    for name, tensor in parts:
        if tensor is None:
            digest.update(name.encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values: Any = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest.update(memoryview(values))
    return digest.hexdigest()[:16]


def teacher_output(teacher: Teacher | PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of a teacher's output matrix, on which its predictions depend in addition to its states."""
    found: dict[str, Tensor] = as_teacher(teacher).output.state_dict()
    return found


def _checksum(block: Array) -> int:
    return zlib.crc32(np.ascontiguousarray(block).data) or 1  # 0 means that the block is not computed yet


def _allocated(file: int, length: int) -> bool:
    """Reserve the space of a file at once; return False where the system or the file system cannot do that."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(file, 0, length)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


def _reserve(path: Path, length: int) -> None:
    """Make a file and reserve its space: writing to a memory map on a full disk would kill the process."""
    if path.is_file() and path.stat().st_size == length:
        return
    try:
        path.touch()
        with path.open("r+b") as file:
            if not _allocated(file.fileno(), length):
                begun = file.seek(0, os.SEEK_END)  # by a run that was killed
                for start in follow(range(begun, length, 1 << 20), f"reserve {path}", "MiB", announce=False):
                    file.write(bytes(min(1 << 20, length - start)))
    except OSError:
        path.unlink(missing_ok=True)
        raise
