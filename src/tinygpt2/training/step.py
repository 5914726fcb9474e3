"""Gradients of one training step, and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel

from tinygpt2.alignment.blocks import AlignedBlocks
from tinygpt2.alignment.redistribution import AlignedHead
from tinygpt2.alignment.teacher import AlignedTeacher
from tinygpt2.config.training import TrainOptions
from tinygpt2.data.batches.batch import Batch, to_device
from tinygpt2.data.dataset import Blocks
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.evaluation.scoring import perplexity_of
from tinygpt2.models.activations import Activations, collect_activations
from tinygpt2.models.documents import Documents, without_last
from tinygpt2.models.lm_head import Head, head_operand, target_losses
from tinygpt2.models.teachers.loading import as_teacher
from tinygpt2.models.teachers.teacher import Shape, Teacher
from tinygpt2.objectives.combined import Objectives
from tinygpt2.objectives.sparse import SparseForm
from tinygpt2.objectives.weights import Counts, LossWeights
from tinygpt2.runtime.devices import float32_products, float64_device
from tinygpt2.training.teacher_cache import CachedStates, TeacherCache
from tinygpt2.utils.progress import follow
from tinygpt2.utils.types import Array

Read = CachedStates | AlignedBlocks  # what is read for the teacher besides the blocks


@dataclass(frozen=True)
class Evaluation:
    """Cross-entropy on the held-out blocks, in nats per token, and its exponential.

    Attributes:
        stderr: standard error of the loss over blocks; None for a single block.
    """

    loss: float
    perplexity: float
    stderr: float | None = None


class Step(nn.Module):
    """Computes the loss of one micro-batch.

    The student and the learned map between hidden sizes are its parameters; the teacher is not. All computations go
    through `forward`, because wrappers that shard parameters gather them only there.

    Args:
        student, teacher: the teacher, or the model that is one, may be None if no objective needs one.
        weights: the objectives and their weights.
        config: for compilation, gradient checkpointing and the size of a chunk of logits.
        cache: of the teacher's last hidden states, for objectives that need no other states of the teacher; or of its
            predictions, which need no teacher.
    """

    def __init__(
        self,
        student: GPT2LMHeadModel,
        teacher: Teacher | PreTrainedModel | None,
        weights: LossWeights,
        config: TrainOptions,
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        teacher = None if teacher is None else as_teacher(teacher)
        # of a teacher that is not here, no objective reads the sizes
        alone = None if cache is None or cache.form is None else Shape.of_gpt2(student.config)
        shape = alone if teacher is None else teacher.shape
        self.objectives = Objectives(weights, student.config, shape, config.logit_chunk)
        # in a tuple and a list, so that nn.Module does not register them: they are not trained, wrapped or saved
        self._teacher = (teacher,)
        self._teacher_head: list[Head | SparseForm] = []
        self.cache = cache
        self._collect: Callable[..., Activations] = collect_activations
        if config.compile or config.compile_only:
            self._collect = torch.compile(collect_activations)
            if teacher is not None:
                teacher.compile_passes()
        self._checkpointing = config.gradient_checkpointing

    def tie_weights(self) -> None:
        """Tie embeddings and output matrix again; FSDP calls this after sharding."""
        self.student.tie_weights()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        lengths: Sequence[int] | None = None,
        share: Counts | None = None,
        read: Read | None = None,
        counted: Array | None = None,
        documents: list[list[int]] | None = None,
        own_text: Array | None = None,
        drawn: Array | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and the detached terms; see `Objectives` for the arguments.

        In evaluation mode, return the cross-entropy of every token but the first, (B, T - 1), in float32, and no terms.

        Args:
            read: what the teacher's cache holds of these blocks, or the blocks in the teacher's tokens.
            documents: the lengths of the documents in each block: see `Batch`.
        """
        if not self.training:
            with torch.autocast(input_ids.device.type, enabled=False), float32_products(tf32=False):
                head = head_operand(self.student.lm_head.weight)  # the weight is in 16 bits under DeepSpeed
                inside = _documents(documents and without_last(documents), input_ids.device)
                losses, _ = target_losses(self.student, head, input_ids, documents=inside)
                return losses.view(len(input_ids), -1), {}
        wanted, inside = self.objectives, _documents(documents, input_ids.device)
        student = self._collect(
            self.student,
            input_ids,
            wanted.student_states,
            wanted.student_attention,
            checkpointing=self._checkpointing,
            documents=inside,
        )
        head, (teacher,) = self.student.lm_head.weight, self._teacher
        known: Any = {"lengths": lengths, "share": share, "counted": counted, "own_text": own_text, "drawn": drawn}
        if not (wanted.teacher_states or wanted.teacher_attention):  # there is no teacher, or it only writes text
            loss, terms = wanted(input_ids, student, head, **known)
        else:
            with torch.no_grad():
                if wanted.weights.compares and not self._teacher_head:
                    form = None if self.cache is None else self.cache.form
                    self._teacher_head = [_some(teacher).head() if form is None else form]
                heads: list[Head | SparseForm | AlignedHead] = [*self._teacher_head]
                if isinstance(teacher, AlignedTeacher):
                    read = read if isinstance(read, AlignedBlocks) else teacher.align_now(input_ids, lengths)
                    activations, heads[0] = teacher.read(read, self._teacher_head[0])
                else:
                    activations = self._teacher_activations(teacher, input_ids, read, inside)
            loss, terms = wanted(input_ids, student, head, activations, *heads, **known)
            if isinstance(read, AlignedBlocks) and isinstance(heads[0], AlignedHead):
                terms |= heads[0].figures(read)
        if not loss.requires_grad:
            raise ConfigError("no objective depends on a trainable parameter", "freeze fewer parameters (--freeze)")
        return loss, terms

    def _teacher_activations(
        self, teacher: Teacher | None, input_ids: Tensor, cached: Read | None, documents: Documents | None
    ) -> Activations:
        """Run the teacher up to the last layer that an objective needs, or take its states from the cache."""
        wanted = self.objectives
        if self.cache is None or not isinstance(cached, CachedStates):
            return _some(teacher).collect(input_ids, wanted.teacher_states, wanted.teacher_attention, documents)
        (last,), cache = wanted.teacher_states, self.cache
        if cached.states is not None:
            return Activations({last: cached.states})

        def compute(ids: Tensor, inside: Documents | None) -> Tensor:
            return cache.computed(_some(teacher), ids, inside)

        return Activations({last: cache.states(cached.rows, input_ids, compute, documents)})

    def read_for_teacher(self, batch: Batch, rows: list[int], device: torch.device) -> Read | None:
        """Read what the teacher needs of a micro-batch besides its tokens; this runs beside the training.

        Args:
            batch: the blocks, on the host.
            rows: their numbers in the dataset.
            device: of the training.
        """
        if self.cache is not None:
            return self.cache.read(rows, device)
        (teacher,) = self._teacher
        return teacher.align(batch) if isinstance(teacher, AlignedTeacher) else None

    def place_teacher(self, device: torch.device) -> None:
        """Leave on a GPU what the steps need of the teacher: with a full cache, only its output matrix, or nothing."""
        (teacher,) = self._teacher
        if teacher is None or self.cache is None or self.cache.filled < 1:
            return
        if self.cache.form is None:
            teacher.place_head(device)
        else:
            teacher.to("cpu")

    def covered(self, length: int) -> int:
        """Return for how many positions of a block there is a teacher: see `Teacher.covered`."""
        (teacher,) = self._teacher
        if teacher is None:
            return length if self.cache is None else self.cache.covered
        return teacher.covered(length)


def _documents(lengths: list[list[int]] | None, device: torch.device) -> Documents | None:
    return None if lengths is None else Documents(lengths, device)


def _some(teacher: Teacher | None) -> Teacher:
    """Return the teacher of a run that needs it now."""
    if teacher is None:
        raise DataError(
            "a block in --teacher-cache is missing or damaged, and there is no --teacher to compute it",
            "run tinygpt2 teach again: it makes only such blocks",
        )
    return teacher


class TeacherEvaluation(nn.Module):
    """Computes a teacher's cross-entropy of every token but the first, as `Step` does for the student."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher, self._head = teacher, list[Head]()

    @torch.no_grad()
    def forward(
        self, input_ids: Int[Tensor, "B T"], *, documents: list[list[int]] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of every token but the first, (B, T - 1), in float32, and no terms."""
        with torch.autocast(input_ids.device.type, enabled=False), float32_products(tf32=False):
            self._head = self._head or [self.teacher.head()]
            inside = _documents(documents and without_last(documents), input_ids.device)
            losses, _ = self.teacher.losses(self._head[0], input_ids, documents=inside)
            return losses.view(len(input_ids), -1), {}


class StepData(NamedTuple):
    """What a process reads for one optimizer step.

    Attributes:
        batch: the blocks of its micro-batches, one after another, on the host.
        rows: their numbers in the dataset.
        share: the counts that means divide by, if blocks may be padded or not all targets count.
        read: of each micro-batch, what the teacher's cache holds, or the blocks in the teacher's tokens.
    """

    batch: Batch
    rows: list[int]
    share: Counts | None
    read: list[Read | None]


def read_step(accelerator: Accelerator, module: nn.Module, blocks: Blocks, indices: list[int], size: int) -> StepData:
    """Read this process's share of a global batch; the arguments are those of `gradients`."""
    count = len(indices) // size  # micro-batches of all processes
    turns = range(accelerator.process_index, count, accelerator.num_processes)
    rows = [row for turn in turns for row in indices[turn * size : (turn + 1) * size]]
    # micro-batches have different numbers of tokens, and the mean is over the global batch
    step: Any = getattr(module, "module", module)  # DDP and DeepSpeed wrap it
    covered = step.covered(blocks.sequence_length)
    share = None
    if blocks.padded or blocks.marked:
        targets = blocks.targets(indices) if blocks.marked else None
        share = Counts.of(blocks.lengths(indices), covered, targets).over(count)
    batch, device = blocks.batch(rows), accelerator.device
    read = [
        step.read_for_teacher(batch.part(start, start + size), rows[start : start + size], device)
        for start in range(0, len(rows), size)
    ]
    return StepData(batch, rows, share, read)


def gradients(
    accelerator: Accelerator,
    module: nn.Module,
    blocks: Blocks,
    indices: list[int],
    size: int,
    data: StepData | None = None,
) -> dict[str, Tensor]:
    """Accumulate the gradients of one global batch.

    Args:
        module: a `Step`, as Accelerate prepared it.
        indices: of the global batch's blocks, which do not depend on the number of processes; each process uses a
            share of them.
        size: blocks in a process's micro-batch.
        data: what `read_step` has read; None reads it now.

    Returns:
        Loss and parts over this process's micro-batches; their mean over processes is the mean over the batch.
    """
    data = read_step(accelerator, module, blocks, indices, size) if data is None else data
    whole = data.batch.to(accelerator.device)
    starts = range(0, len(data.rows), size)
    names, means = list[str](), torch.zeros((), device=accelerator.device)
    for turn, start in enumerate(starts):
        batch = whole.part(start, start + size)
        read = (known := data.read[turn]) and known.to(accelerator.device)
        # divides the loss by the number of micro-batches, and averages over processes only after the last one
        with accelerator.accumulate(module):
            with accelerator.autocast():  # Accelerate does this itself, but not if it shards the model
                loss, terms = module(**batch._asdict(), share=data.share, read=read)
            accelerator.backward(loss)
        names = ["loss", *(name if "/" in name else f"loss/{name}" for name in terms)]
        means = means + torch.stack([loss.detach(), *terms.values()]).float() / len(starts)
    return dict(zip(names, means, strict=True))


@torch.no_grad()
def evaluate(accelerator: Accelerator, module: nn.Module, blocks: Blocks, size: int) -> Evaluation:
    """Measure the cross-entropy on held-out blocks in float32; each process evaluates a share of them.

    Args:
        module: a `Step`, as Accelerate prepared it.
        size: blocks in a batch.
    """
    was_training = module.training
    module.eval()
    rank, world = accelerator.process_index, accelerator.num_processes
    sums = torch.zeros(6, dtype=torch.float64, device=float64_device(accelerator.device))
    # processes that share a sharded model must make equally many forward passes: some repeat the last block,
    # which then does not count
    for start in follow(range(0, math.ceil(len(blocks) / world), size), "evaluate", "batches", announce=False):
        numbers = range(start * world + rank, min(start + size, math.ceil(len(blocks) / world)) * world, world)
        batch = blocks.batch([min(index, len(blocks) - 1) for index in numbers]).to(accelerator.device)
        losses, _ = module(batch.input_ids, documents=batch.documents)  # (B, T - 1)
        sized = zip(numbers, batch.real_lengths, strict=True)
        real = [length if index < len(blocks) else 0 for index, length in sized]
        positions = torch.arange(1, losses.shape[1] + 1, device=losses.device)
        counted = positions < to_device(torch.tensor(real), losses.device)[:, None]
        if batch.counted is not None:
            counted &= to_device(torch.from_numpy(batch.counted[:, 1:]), losses.device)
        kept = torch.where(counted, losses, 0.0).to(sums.device).double()
        each, n = kept.sum(1), counted.to(sums.device).sum(1).double()  # of a block
        moments = [(each * each).sum(), (each * n).sum(), (n * n).sum(), (n > 0).sum()]
        sums += torch.stack([each.sum(), n.sum(), *moments])
    total, targets, squares, products, sizes, used = accelerator.reduce(sums, "sum").cpu().tolist()
    module.train(was_training)
    loss = total / max(targets, 1)
    # the loss is a ratio of two sums over blocks: the error follows from each block's total minus loss times targets
    spread = max(0.0, squares - 2 * loss * products + loss * loss * sizes)
    error = math.sqrt(spread * used / (used - 1)) / targets if used > 1 else math.nan
    return Evaluation(loss, perplexity_of(loss), error if math.isfinite(error) else None)


def joined(by_data: Mapping[str, Evaluation], blocks: Mapping[str, Blocks]) -> Evaluation:
    """Return the evaluation on the blocks of several datasets together, from those on each."""
    targets = {name: sum(one.targets(range(len(one)))) for name, one in blocks.items()}
    whole = max(1, sum(targets.values()))
    loss = sum(one.loss * targets[name] for name, one in by_data.items()) / whole
    errors = [(one.stderr, targets[name] / whole) for name, one in by_data.items()]
    known = [error * share for error, share in errors if error is not None]
    return Evaluation(loss, perplexity_of(loss), math.hypot(*known) if len(known) == len(errors) else None)
