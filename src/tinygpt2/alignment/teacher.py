"""A teacher with a larger vocabulary, from which the student's tokenizer was cut by rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tinygpt2.alignment.blocks import AlignedBlocks, Aligner
from tinygpt2.alignment.rank_cut import RankCut, same_cut
from tinygpt2.alignment.redistribution import AlignedHead, Redistribution
from tinygpt2.config.base import flag_name
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.data.batches.batch import Batch
from tinygpt2.data.dataset import PackedDataset
from tinygpt2.data.tokenizer import fingerprint
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.models.activations import Activations
from tinygpt2.models.configuration import is_model_config
from tinygpt2.models.directory import read_config_json
from tinygpt2.models.documents import Documents
from tinygpt2.models.lm_head import Head, wide
from tinygpt2.models.loading import model_tokenizer, tokenizer_fingerprint
from tinygpt2.models.teachers.teacher import Teacher
from tinygpt2.models.teachers.vocabularies import Reading, start_token
from tinygpt2.utils.hub import local_directory
from tinygpt2.utils.progress import say

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer


class AlignedTeacher(Teacher):
    """A teacher that reads a student's blocks in its own tokens, and predicts the student's.

    It has no state of the last position of a block: what follows there is not known to be a beginning of its tokens.

    Args:
        teacher: predicts its own tokens.
        tokenizer: the teacher's.
        cut: what the student's tokenizer is of it.
        vocabulary: number of tokens of the student.
    """

    def __init__(self, teacher: Teacher, tokenizer: Tokenizer, cut: RankCut, vocabulary: int) -> None:
        super().__init__(teacher.model, replace(teacher.shape, vocabulary=vocabulary))
        start, positions = start_token(tokenizer), teacher.shape.positions
        teacher.read_as(Reading(start=start))
        limit = None if positions is None else positions - (start is not None)
        self.align = Aligner(tokenizer, cut, teacher.shape.vocabulary, limit)
        self._teacher = (teacher,)  # in a tuple, because its weights are this module's already
        self._redistribution: Redistribution | None = None

    def covered(self, length: int) -> int:
        """Return for how many positions of a block there is a prediction: all but the last one."""
        return length - 1

    def align_now(self, input_ids: Int[Tensor, "B T"], lengths: Sequence[int] | None = None) -> AlignedBlocks:
        """Return blocks in the teacher's tokens that nobody has aligned before."""
        known = None if lengths is None else list(lengths)
        return self.align(Batch(input_ids, known)).to(input_ids.device)

    def read(self, blocks: AlignedBlocks, head: Any) -> tuple[Activations, AlignedHead]:
        """Return records in the place of the last hidden states, and what makes logits of them.

        Args:
            head: the teacher's own.
        """
        (teacher,), last = self._teacher, self.shape.layers
        states = teacher.collect(blocks.ids, [last]).states[last].flatten(0, 1)
        if self._redistribution is None:
            self._redistribution = Redistribution(self.align.decomposition, self.shape.vocabulary, states.device)
        return Activations({last: blocks.records}), AlignedHead(self._redistribution, head, states)

    @torch.no_grad()
    def losses(
        self,
        head: Head,
        input_ids: Int[Tensor, "B T"],
        wanted: Int[Tensor, " N"] | None = None,
        ruled_out: Bool[Tensor, " V"] | None = None,
        documents: Documents | None = None,
    ) -> tuple[Float[Tensor, " N"], None]:
        """Return the losses of next tokens. Where the teacher predicts nothing, the block's other losses' mean stands.

        Raises:
            ValueError: only some losses, or hits, are wanted, or documents see only themselves.
        """
        if wanted is not None or ruled_out is not None or documents is not None:
            raise ValueError("a teacher with other tokens is measured on whole blocks")
        blocks = self.align_now(input_ids)
        records = blocks.records.flatten(0, 1)
        _, aligned = self.read(blocks, head)
        logits = [aligned.logits(part).gather(1, part[:, 2:])[:, 0] for part in records.split(256)]  # type: ignore[no-untyped-call]
        found = -torch.cat(logits).view(len(input_ids), -1)
        known = blocks.records[..., 0] >= 0
        means = (found * known).sum(1) / known.sum(1).clamp(min=1)
        return found.where(known, means[:, None]).to(wide(found)).flatten(), None

    def head(self) -> Head:
        """Return the head of the teacher's own tokens."""
        return self._teacher[0].head()

    def compile_passes(self) -> None:
        """See `Teacher`."""
        self._teacher[0].compile_passes()

    def cast(self, dtype: torch.dtype) -> None:
        """See `Teacher`."""
        self._teacher[0].cast(dtype)

    def cast_weights(self) -> int:
        """See `Teacher`."""
        return self._teacher[0].cast_weights()

    def identity(self) -> Iterator[tuple[str, Tensor | None]]:
        """See `Teacher`."""
        return self._teacher[0].identity()

    def collect(
        self,
        input_ids: Int[Tensor, "B T"],
        states: Iterable[int],
        attention: Iterable[int] = (),
        documents: Documents | None = None,
    ) -> Activations:
        """Not possible: the teacher has other positions; see `read`."""
        raise NotImplementedError


def cut_of_teacher(config: DistillConfig, data: PackedDataset) -> tuple[Tokenizer, RankCut] | None:
    """Return a teacher's tokenizer and the cut of it with which a dataset was made; None if there is no such cut.

    Raises:
        ModelError: the teacher is a GPT-2, and has other tokens than the student and the data, which are no cut of its.
    """
    if not config.needs_teacher or len(config.teachers) != 1:  # several teachers have the student's tokens
        return None
    (teacher,) = config.teachers
    directory, small = local_directory(teacher, "teacher"), data.tokenizer()
    whole, ours = model_tokenizer(directory), fingerprint(small)
    if whole is None or fingerprint(whole) == ours:
        return None
    if (cut := same_cut(whole, small)) is not None:
        return whole, cut
    kind = read_config_json(directory, "teacher").get("model_type", "gpt2")  # others may have the same pieces
    if kind == "gpt2" and _reads(config.student, ours):
        raise ModelError(
            f"teacher {teacher} has other tokens than dataset {data.name} and student {config.student}, and "
            "they are not the first ones of its tokens by merge rank",
            "tokenize the data with the teacher's tokenizer (tinygpt2 pregenerate --tokenizer), or make a student with "
            "fewer of its tokens (truncate-student --vocab-size)",
        )
    return None


def _reads(student: str | None, ours: str) -> bool:
    """Return whether a student's own tokenizer has a fingerprint."""
    if student is None or is_model_config(student):
        return False
    return tokenizer_fingerprint(local_directory(student, "student")) == ours


def aligned_teacher(
    config: DistillConfig, teacher: Teacher, found: tuple[Tokenizer, RankCut], vocabulary: int
) -> AlignedTeacher:
    """Return a teacher that predicts the tokens of a student whose tokenizer is a cut of its own.

    Args:
        found: see `cut_of_teacher`.
        vocabulary: number of tokens of the student.

    Raises:
        ConfigError: an option compares what the two do not share.
    """
    tokenizer, cut = found
    what = f"{config.teachers[0]} has {len(tokenizer):,} tokens, the data {len(cut.tokenizer):,} of them"
    names = ("attention_weight", "relation_weight", "hidden_weight", "cosine_weight")
    if inside := [flag_name(name) for name in names if getattr(config, name)]:
        raise ConfigError(
            f"{inside[0]} compares positions, which teacher and student do not share: teacher {what}",
            f"use {inside[0]} 0: predictions can be learned",
        )
    if "reverse_kl" in config.losses:
        raise ConfigError(
            f"--prediction-loss reverse_kl is infinite for tokens that cannot come next: teacher {what}",
            "use another --prediction-loss",
        )
    if config.on_policy_fraction:
        raise ConfigError(
            f"--on-policy-fraction needs the teacher's tokens: teacher {what}", "leave out --on-policy-fraction"
        )
    if config.teacher_cache is not None:
        raise ConfigError(f"--teacher-cache needs the teacher's tokens: teacher {what}", "leave out --teacher-cache")
    say(f"teacher {what}: it reads the texts in its own, and its predictions are summed")
    return AlignedTeacher(teacher, tokenizer, cut, vocabulary)
