"""One training step's gradients, and evaluation: what the loop does with batches."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from tinygpt2.config.training import TrainOptions
from tinygpt2.data.dataset import Blocks
from tinygpt2.errors import ConfigError
from tinygpt2.evaluation.scoring import perplexity_of
from tinygpt2.models.activations import Activations, collect_activations
from tinygpt2.models.lm_head import head_operand, target_losses
from tinygpt2.objectives.combined import Counts, LossWeights, Objectives
from tinygpt2.training.teacher_cache import TeacherCache


@dataclass(frozen=True)
class Evaluation:
    """Cross-entropy on the held-out blocks, in nats per token, and its exponential."""

    loss: float
    perplexity: float


class Step(nn.Module):
    """One micro-batch to one loss. The student and the learned map are its parameters, the teacher is not.

    Everything goes through `forward`, so that a wrapper which shards parameters has them whole meanwhile.

    Args:
        student, teacher: the teacher may be None where no objective looks at one.
        weights: the objectives.
        config: how to run: compiled, with gradient checkpointing, with which chunk of logits.
        cache: of the teacher's last hidden states, where nothing else of it is looked at.
    """

    def __init__(
        self,
        student: GPT2LMHeadModel,
        teacher: GPT2LMHeadModel | None,
        weights: LossWeights,
        config: TrainOptions,
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = Objectives(weights, student.config, teacher.config if teacher else None, config.logit_chunk)
        # in a tuple and a list: not registered, so never trained, wrapped or saved
        self._teacher = (teacher,)
        self._teacher_head: list[Tensor] = []
        self._cache = cache
        self._capture = (
            torch.compile(collect_activations) if config.compile or config.compile_only else collect_activations
        )
        self._checkpointing = config.gradient_checkpointing

    def tie_weights(self) -> None:
        """Make embeddings and output matrix one again, as FSDP asks for after sharding."""
        self.student.tie_weights()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        lengths: Int[Tensor, " B"] | None = None,
        share: Counts | None = None,
        rows: Sequence[int] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and the detached terms; see `Objectives` for the arguments.

        `rows` are the blocks' numbers in the data set, for the cache.

        In evaluation mode: the cross-entropy of every token but the first, (B, T - 1), in float32, and no terms.
        """
        if not self.training:
            with torch.autocast(input_ids.device.type, enabled=False):
                every = torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
                head = head_operand(self.student.lm_head.weight)  # in 16 bits under DeepSpeed
                losses, _ = target_losses(self.student, head, input_ids, every)
                return losses.view(every.shape), {}
        wanted = self.objectives
        student = self._capture(
            self.student,
            input_ids,
            wanted.student_states,
            wanted.student_attention,
            checkpointing=self._checkpointing,
        )
        head = self.student.lm_head.weight
        (teacher,) = self._teacher
        if teacher is None:
            loss, terms = wanted(input_ids, student, head, lengths=lengths, share=share)
        else:
            with torch.no_grad():
                seen = self._teacher_activations(teacher, input_ids, rows)
                if wanted.weights.prediction and not self._teacher_head:
                    self._teacher_head = [head_operand(teacher.lm_head.weight)]
            loss, terms = wanted(input_ids, student, head, seen, *self._teacher_head, lengths=lengths, share=share)
        if not loss.requires_grad:
            raise ConfigError("no objective reaches a parameter that is trained", "name fewer with --freeze")
        return loss, terms

    def _teacher_activations(
        self, teacher: GPT2LMHeadModel, input_ids: Tensor, rows: Sequence[int] | None
    ) -> Activations:
        """Run the teacher, as deep as anything looks at it, or read what it returned before."""
        wanted = self.objectives
        if self._cache is None or rows is None:
            return self._capture(teacher, input_ids, wanted.teacher_states, wanted.teacher_attention)
        (last,) = wanted.teacher_states
        states = self._cache.states(rows, input_ids, lambda ids: self._capture(teacher, ids, [last]).states[last])
        return Activations({last: states.to(teacher.dtype)})


def seed_step(seed: int, step: int, process: int) -> None:
    """Make the random numbers of a step, dropout's, a function of seed, step and process: nothing to save."""
    number = int.from_bytes(hashlib.blake2b(f"{seed} {step} {process}".encode(), digest_size=7).digest())
    # torch.manual_seed would ask for every kind of device there might be, which takes a millisecond
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(number)


def gradients(
    accelerator: Accelerator, module: nn.Module, blocks: Blocks, indices: list[int], size: int
) -> dict[str, Tensor]:
    """Accumulate the gradients of one global batch.

    Args:
        module: a `Step`, as Accelerate prepared it.
        indices: of the global batch's blocks: the same for any number of processes, each takes its slice of it.
        size: blocks in a process's micro-batch.

    Returns:
        This process's share of the loss and its parts: the mean over processes is the mean over the batch.
    """
    count = len(indices) // size  # micro-batches, on all processes
    turns = range(accelerator.process_index, count, accelerator.num_processes)
    share = None
    if blocks.padded:  # a mean over the global batch, whatever padding falls into which micro-batch
        share = Counts.of(blocks.lengths(indices)).over(count)
    names: list[str] = []
    means = torch.zeros((), device=accelerator.device)
    for turn in turns:
        rows = indices[turn * size : (turn + 1) * size]
        batch = blocks.batch(rows).to(accelerator.device)
        with accelerator.accumulate(module):  # divides by their number, and waits with the other processes' gradients
            with accelerator.autocast():  # which Accelerate itself sees to, but not where it shards
                loss, terms = module(*batch, share, rows)
            accelerator.backward(loss)
        names = ["loss", *(f"loss/{name}" for name in terms)]
        means = means + torch.stack([loss.detach(), *terms.values()]).float() / len(turns)
    return dict(zip(names, means, strict=True))


def step_seconds(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    blocks: Blocks,
    sequences: int,
    size: int,
    steps: int,
) -> list[float]:
    """Take some steps, and return the seconds of each: the first ones warm up.

    Args:
        module, optimizer: as Accelerate prepared them; without an optimizer no weight changes.
        sequences: of a global batch; the blocks are taken in their order, and again from the first one.
        size: blocks in a process's micro-batch.
    """
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        rows = [index % len(blocks) for index in range(step * sequences, (step + 1) * sequences)]
        gradients(accelerator, module, blocks, rows, size)
        if optimizer is not None:
            optimizer.step()
        module.zero_grad(set_to_none=True)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


@torch.no_grad()
def evaluate(accelerator: Accelerator, module: nn.Module, blocks: Blocks, size: int) -> Evaluation:
    """Measure cross-entropy on held-out blocks, in float32, each process on its share.

    Args:
        module: a `Step`, as Accelerate prepared it.
        size: blocks in a batch.
    """
    module.eval()
    rank, world = accelerator.process_index, accelerator.num_processes
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    # every process makes as many forward passes, which those that share parameters need: the last block again
    for start in range(0, math.ceil(len(blocks) / world), size):
        mine = range(start * world + rank, min(start + size, math.ceil(len(blocks) / world)) * world, world)
        batch = blocks.batch([min(index, len(blocks) - 1) for index in mine]).to(accelerator.device)
        losses, _ = module(batch.input_ids)  # (B, T - 1)
        counted = torch.tensor([[index < len(blocks)] for index in mine], device=losses.device).expand_as(losses)
        if batch.lengths is not None:
            counted = counted & (torch.arange(1, losses.shape[1] + 1, device=losses.device) < batch.lengths[:, None])
        sums += torch.stack([losses[counted].double().sum(), counted.sum().double()])
    total, targets = accelerator.reduce(sums, "sum").tolist()
    module.train()
    loss = total / max(targets, 1)
    return Evaluation(loss, perplexity_of(loss))
