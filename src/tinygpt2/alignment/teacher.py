"""A teacher with other tokens than its student, which may be a cut of them by rank, or any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tinygpt2.alignment.blocks import AlignedBlocks, BlockAligner, RankCutAligner
from tinygpt2.alignment.borders import ByteAligner
from tinygpt2.alignment.events import Events, Graph, counted_pairs
from tinygpt2.alignment.rank_cut import RankCut, same_cut
from tinygpt2.alignment.redistribution import AlignedHead, Redistribution
from tinygpt2.alignment.spans import SpanAligner, SpanHead
from tinygpt2.config.base import flag_name
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.data.batches.batch import Batch
from tinygpt2.data.dataset import Blocks, PackedDataset
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
        align: encodes a student's blocks in these.
        vocabulary: number of tokens of the student.
        make: makes, on a device, what moves the predictions; None if nothing does.
    """

    def __init__(
        self,
        teacher: Teacher,
        align: BlockAligner,
        vocabulary: int,
        make: Callable[[torch.device], Redistribution | Events] | None,
    ) -> None:
        super().__init__(teacher.model, replace(teacher.shape, vocabulary=vocabulary))
        self.align, self._make = align, make
        self._teacher = (teacher,)  # in a tuple, because its weights are this module's already
        self._moves: Redistribution | Events | None = None

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
        return Activations({last: blocks.records}), self._aligned(blocks, head, states)

    def _aligned(self, blocks: AlignedBlocks, head: Head, states: Float[Tensor, "S D"]) -> AlignedHead:
        """Return what makes the student's logits of the records of a batch."""
        if self._moves is None:
            assert self._make is not None
            self._moves = self._make(states.device)
        return self._moves.head(head, states)

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
        _, aligned = self.read(blocks, head)
        found = aligned.losses(blocks.records.flatten(0, 1)).view(len(input_ids), -1)
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


class SpanTeacher(AlignedTeacher):
    """A teacher with any other tokenizer, whose likelihoods of spans the student learns.

    Args:
        teacher, vocabulary: see `AlignedTeacher`.
        align: finds the spans in a student's blocks.
        graph: the events, if their predictions are learned, too.
        temperatures: see `tinygpt2.objectives.span_losses`.
    """

    def __init__(
        self, teacher: Teacher, align: SpanAligner, vocabulary: int, graph: Graph | None, temperatures: list[float]
    ) -> None:
        super().__init__(teacher, align, vocabulary, None if graph is None else partial(Events, graph, vocabulary))
        self._temperatures = temperatures

    def _aligned(self, blocks: AlignedBlocks, head: Head, states: Float[Tensor, "S D"]) -> AlignedHead:
        """See `AlignedTeacher`."""
        events = None if self._make is None else super()._aligned(blocks, head, states)
        return SpanHead(blocks, head, states, self._temperatures, events)


def other_tokens(config: DistillConfig, data: PackedDataset) -> tuple[Tokenizer, RankCut | None] | None:
    """Return the tokenizer of a teacher with other tokens than a dataset, and the cut of it that the dataset's is.

    Returns:
        None if it is no cut and there is no --alignment: the teacher then has to have the dataset's pieces of text.

    Raises:
        ConfigError: --alignment has no effect.
        ModelError: the teacher is a GPT-2, and has other tokens than the student and the data, which are no cut of its.
    """
    if not config.needs_teacher or len(config.teachers) != 1:  # several teachers have the student's tokens
        if config.alignment is not None:
            raise ConfigError(f"--alignment {config.alignment} needs one --teacher, and an objective that uses it")
        return None
    (teacher,) = config.teachers
    directory, small = local_directory(teacher, "teacher"), data.tokenizer()
    whole, ours = model_tokenizer(directory), fingerprint(small)
    same = whole is None or fingerprint(whole) == ours
    cut = None if whole is None or same else same_cut(whole, small)
    if config.alignment is not None and (same or cut is not None):
        why = "has no tokenizer" if whole is None else f"has the tokens of {data.name}, or those are a cut of them"
        raise ConfigError(f"--alignment {config.alignment} has no effect: {teacher} {why}", "leave it out")
    if whole is None or same:
        return None
    if cut is not None or config.alignment is not None:
        return whole, cut
    kind = read_config_json(directory, "teacher").get("model_type", "gpt2")  # others may have the same pieces
    if kind == "gpt2" and _reads(config.student, ours):
        raise ModelError(
            f"teacher {teacher} has other tokens than dataset {data.name} and student {config.student}, and "
            "they are not the first ones of its tokens by merge rank",
            "give --alignment pieces or --alignment spans, tokenize the data with the teacher's tokenizer (tinygpt2 "
            "pregenerate --tokenizer), or make a student with fewer of its tokens (truncate-student --vocab-size)",
        )
    return None


def _reads(student: str | None, ours: str) -> bool:
    """Return whether a student's own tokenizer has a fingerprint."""
    if student is None or is_model_config(student):
        return False
    return tokenizer_fingerprint(local_directory(student, "student")) == ours


def aligned_teacher(
    config: DistillConfig,
    teacher: Teacher,
    found: tuple[Tokenizer, RankCut | None],
    data: PackedDataset,
    vocabulary: int,
    evaluated: Blocks,
) -> AlignedTeacher:
    """Return a teacher that predicts the tokens of a student with other tokens.

    Args:
        found: see `other_tokens`.
        vocabulary: number of tokens of the student.
        evaluated: the held-out blocks.

    Raises:
        ConfigError: an option compares what the two do not share.
        ModelError: their tokens cannot be aligned.
    """
    tokenizer, cut = found
    small = len(data.tokenizer())
    counts = f"{small:,} others" if cut is None else f"{small:,} of them"
    what = f"{config.teachers[0]} has {len(tokenizer):,} tokens, the data {counts}"
    _check(config, what, lumps=cut is None)
    if config.document_mask or data.train.divided or evaluated.divided:
        raise ConfigError(
            f"teacher {what}. Documents that do not see those before them (--document-mask, pairs) cannot be aligned",
            "use a teacher with the student's tokens, or plain texts without --document-mask",
        )
    start, positions = start_token(tokenizer), teacher.shape.positions
    teacher.read_as(Reading(start=start))
    limit = None if positions is None else positions - (start is not None)
    if cut is not None:
        say(f"teacher {what}: it reads the texts in its own, and its predictions are summed")
        align = RankCutAligner(tokenizer, cut, teacher.shape.vocabulary, limit)
        make = partial(Redistribution, align.decomposition, vocabulary)
        return AlignedTeacher(teacher, align, vocabulary, make)
    return _by_bytes(config, teacher, f"teacher {what}: it reads the texts in its own", tokenizer, data, vocabulary)


def _by_bytes(
    config: DistillConfig, teacher: Teacher, what: str, tokenizer: Tokenizer, data: PackedDataset, vocabulary: int
) -> AlignedTeacher:
    """Return a teacher with any other tokenizer; the arguments are those of `aligned_teacher`.

    Args:
        what: says how the tokens differ.
    """
    small, positions = data.tokenizer(), teacher.shape.positions
    limit = None if positions is None else positions - (start_token(tokenizer) is not None)
    temperatures = config.temperatures_of_spans
    if config.alignment == "spans":
        say(f"{what}. The likelihoods of the texts between common borders are compared")
        spans = SpanAligner(tokenizer, small, limit, events=False)
        return SpanTeacher(teacher, spans, vocabulary, None, temperatures)
    align = (ByteAligner if config.alignment == "pieces" else partial(SpanAligner, events=True))(
        tokenizer, small, limit
    )
    graph = Graph.of(counted_pairs(align, data.train), vocabulary)
    say(
        f"{what}. {graph.count:,} events, counted on the data, are predicted where tokens of both begin; "
        f"{len(graph.lumped):,} of the data's tokens share one with others"
    )
    if isinstance(align, SpanAligner):
        return SpanTeacher(teacher, align, vocabulary, graph, temperatures)
    return AlignedTeacher(teacher, align, vocabulary, partial(Events, graph, vocabulary))


def _check(config: DistillConfig, what: str, *, lumps: bool) -> None:
    """Check that no option compares what a teacher and a student with other tokens do not share.

    Args:
        what: how their tokens differ.
        lumps: whether the teacher predicts events of several of the student's tokens.
    """
    names = ("attention_weight", "relation_weight", "hidden_weight", "cosine_weight")
    if inside := [flag_name(name) for name in names if getattr(config, name)]:
        raise ConfigError(
            f"{inside[0]} compares positions, which teacher and student do not share: teacher {what}",
            f"use {inside[0]} 0: predictions can be learned",
        )
    if lumps and (others := config.losses - {"forward_kl"}):
        raise ConfigError(
            f"--alignment {config.alignment} does not know the probabilities of all tokens, which {min(others)} needs",
            "use --prediction-loss forward_kl",
        )
    if lumps and config.temperature != 1:
        raise ConfigError(
            f"--temperature {config.temperature:g} changes tokens before they are summed: --alignment "
            f"{config.alignment} needs 1",
            "leave out --temperature",
        )
    if config.has_reverse_kl:
        raise ConfigError(
            f"reverse KL is infinite for tokens that cannot come next: teacher {what}",
            "use another --prediction-loss",
        )
    if config.samples_text:  # now, or once the share has grown
        raise ConfigError(
            f"--on-policy-fraction needs the teacher's tokens: teacher {what}", "leave out --on-policy-fraction"
        )
    if config.teacher_cache is not None:
        raise ConfigError(f"--teacher-cache needs the teacher's tokens: teacher {what}", "leave out --teacher-cache")
