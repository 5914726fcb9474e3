"""`teach`: fill a cache of what a teacher says, ahead of the runs that learn from it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2Config

from tinygpt2.config.common import Precision
from tinygpt2.config.workflows import TeachConfig
from tinygpt2.data.dataset import PackedDataset
from tinygpt2.data.mixture import load_datasets
from tinygpt2.errors import ConfigError, InterruptedRunError
from tinygpt2.models.documents import Documents
from tinygpt2.models.loading import model_tokenizer
from tinygpt2.models.teachers.loading import load_teacher, read_as_student
from tinygpt2.models.teachers.teacher import GPT2Teacher, Teacher
from tinygpt2.objectives.sparse import SparseForm
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.runtime.devices import DTYPES, chosen_precision, computes_on_device, current_device, on_cuda
from tinygpt2.training.teacher_cache import TeacherCache
from tinygpt2.utils.progress import follow, say, track
from tinygpt2.utils.units import size


@dataclass(frozen=True)
class TeachResult:
    """The cache that `teach` filled.

    Attributes:
        cache: the path of its directory.
        kind: what it holds: `samples`, `top` or `states`.
        sequences: number of training blocks in the dataset; `computed` of them were computed now.
        filled: the share of the blocks that the cache holds. It is less than 1 if other parts are missing.
        bytes: the size of its files.
        tokens_per_second: of the blocks that were computed now; None if there were none.
    """

    cache: str
    kind: str
    sequences: int
    computed: int
    filled: float
    bytes: int
    bytes_per_token: float
    seconds: float
    tokens_per_second: float | None


@computes_on_device
def teach(config: TeachConfig) -> TeachResult:
    """Compute what a teacher says of each training block of a dataset, and keep it in a cache.

    Blocks that are in the cache and undamaged are not computed again. So an interrupted call continues, and several
    parts (`config.part`) fill one cache, one after another or at the same time.

    Raises:
        ConfigError, DataError, ModelError: an option, the dataset or the teacher is wrong, or they do not fit.
        MachineError: there is too little space for the whole cache, or memory ran out.
        InterruptedRunError: a signal stopped it; the finished blocks are kept.
    """
    precision = chosen_precision(config.precision)
    if precision == "fp16" and not on_cuda():
        raise ConfigError("--precision fp16 needs a CUDA GPU", "use --precision bf16 or fp32 elsewhere")
    data = load_datasets(config.data)
    with fast_products(tf32=precision == "fp32"), torch.no_grad():
        teacher, vocabulary = _teacher(config, data)
        form = SparseForm.of(config.teacher_cache_kind, vocabulary, config.temperature)
        cache = TeacherCache(Path(config.out), teacher, data, precision, form, config.teacher)
        needed, began = cache.bytes, time.perf_counter()
        say(f"{cache.path}: {size(needed)} for {len(data.train):,} blocks")
        try:
            computed = _fill(cache, teacher, data, config, precision)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"interrupted; {cache.path} holds {cache.filled:.1%} of the blocks",
                "run the same command again to continue",
            ) from None
    seconds, tokens = time.perf_counter() - began, len(data.train) * data.sequence_length
    speed = computed * data.sequence_length / seconds if computed else None
    count = len(data.train)
    return TeachResult(
        str(cache.path.resolve()), cache.kind, count, computed, cache.filled, needed, needed / tokens, seconds, speed
    )


def _teacher(config: TeachConfig, data: PackedDataset) -> tuple[Teacher, int]:
    """Load the teacher and return it with the number of tokens that it predicts.

    These are the tokens of a student that a preset makes for this teacher and dataset.
    """
    dtype = DTYPES[config.teacher_dtype]
    teacher, directory = load_teacher(config.teacher, data, dtype, allow_pickle=config.allow_pickle)
    vocabulary = teacher.shape.vocabulary if isinstance(teacher, GPT2Teacher) else data.vocab_size
    names = config.teacher, f"with the tokenizer of {data.name}"
    read_as_student(teacher, data, GPT2Config(vocab_size=vocabulary), model_tokenizer(directory), names)
    return teacher, vocabulary


def _fill(cache: TeacherCache, teacher: Teacher, data: PackedDataset, config: TeachConfig, precision: Precision) -> int:
    """Compute the blocks of this part that the cache lacks, and return how many they were."""
    (number, parts), count, device = config.part_numbers, len(data.train), current_device()
    own = range((number - 1) * count // parts, number * count // parts)
    lost = [row for row in follow(own, "check what is there", "blocks", announce=False) if not cache.holds(row)]
    with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
        if precision != "fp32":
            teacher.cast(DTYPES[precision])
        teacher.to(device)
        with track("teach", len(own), "blocks", done=len(own) - len(lost)) as stage:
            for start in range(0, len(lost), config.micro_batch_size):
                rows = lost[start : start + config.micro_batch_size]
                batch = data.train.batch(rows).to(device)
                inside = None if batch.documents is None else Documents(batch.documents, device)
                cache.states(rows, batch.input_ids, lambda *some: cache.computed(teacher, *some), inside)
                stage.advance(len(rows))
    return len(lost)
