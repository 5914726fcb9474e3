"""The vocabularies that a search for a target looks through: what students cost with each of them, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.alignment.rank_cut import RankCut, cut_by_rank, cut_vocabulary
from tinygpt2.compression.calibration import Batches, held_out_batches
from tinygpt2.compression.sizes import Shape, Space, shapes_by_vocabulary, spaces_of, spread
from tinygpt2.compression.truncate import Subject
from tinygpt2.config.compression import Target, TruncateStudentConfig
from tinygpt2.data.dataset import PackedDataset
from tinygpt2.errors import ConfigError, DataError, ModelError
from tinygpt2.runtime.devices import current_device
from tinygpt2.utils.progress import follow, say
from tinygpt2.workflows.cuts.results import CutBits, CutVocabulary
from tinygpt2.workflows.cuts.scoring import ByteJudge, Judge
from tinygpt2.workflows.cuts.texts import Pieces, SharedText, sizes_in_bytes, spelled_dataset
from tinygpt2.workflows.cuts.timing import predicted_milliseconds, shape_milliseconds, to_time, token_milliseconds

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """One of the vocabularies that the search looks through, or the only one.

    Attributes:
        space: the students with it.
        judge: scores them.
        shape_milliseconds: the time of a shape for a token, measured with random weights.
        length: how many tokens the text of one of the teacher's tokens has, mean; 1 without --vocab-sizes.
        cut: the teacher's tokenizer as it was cut; None for the teacher's own tokens, and for those of --vocab-size,
            which the search cuts when it has found a student.
        pieces: what the teacher's tokens are in the cut one.
        tokens_per_byte: of text; None without --vocab-sizes.
    """

    space: Space
    judge: Judge | ByteJudge
    shape_milliseconds: Callable[[Shape], float]
    length: float = 1.0
    cut: RankCut | None = None
    pieces: Pieces | None = None
    tokens_per_byte: float | None = None

    @property
    def size(self) -> int:
        """The number of tokens."""
        return self.space.vocab_size

    def own(self, student: GPT2LMHeadModel) -> GPT2LMHeadModel:
        """Return a student with this vocabulary, in whose tokens it then learns and is scored."""
        return student if self.cut is None else cut_vocabulary(student, self.cut)

    def milliseconds(self, student: GPT2LMHeadModel) -> float:
        """Return the time in which a student decodes as much text as one of the teacher's tokens has."""
        return self.length * token_milliseconds(student)

    def measure(self, shape: Shape) -> float:
        """Return the same for a shape, measured with random weights."""
        return self.length * self.shape_milliseconds(shape)

    def tokenizer(self, subject: Subject) -> Tokenizer | None:
        """Return the tokenizer of students that learn."""
        return subject.tokenizer if self.cut is None else self.cut.tokenizer

    def data(self, subject: Subject, count: int, seed: int) -> PackedDataset | None:
        """Return what students learn from: so many blocks in their own tokens, or None for the dataset itself.

        The blocks begin with the same text as those of a run in the teacher's tokens with the same seed.
        """
        if self.cut is None or self.pieces is None:
            return None
        assert subject.data is not None
        return spelled_dataset(subject.data, self.pieces, self.cut.tokenizer, count, seed)


def vocabularies_of(
    config: TruncateStudentConfig, subject: Subject, judged: Batches, teacher_milliseconds: float
) -> list[Vocabulary]:
    """Return what the search looks through: the vocabularies of --vocab-sizes, the largest first, or the only one.

    Args:
        judged: texts to score on.
        teacher_milliseconds: the teacher's time for a token.

    Raises:
        ConfigError: a size of --vocab-sizes is not possible, or all are the teacher's own.
        DataError: the blocks of --data mark which tokens count.
        ModelError: the teacher has no tokenizer, or one that cannot be cut by rank.
    """
    teacher = subject.loaded.model
    spaces = spaces_of(config, teacher.config)
    times = [shape_milliseconds(_with_tokens(teacher.config, subject.positions[0], one.vocab_size)) for one in spaces]
    if not config.vocabularies:
        judge = Judge(teacher, judged, config.purpose, teacher_milliseconds)
        return [Vocabulary(spaces[0], judge, times[0])]
    whole, rows = _cuttable(config, subject), teacher.config.vocab_size
    cuts = [
        cut_by_rank(whole, one.vocab_size, rows, option="--vocab-sizes") if one.fewer_tokens else None for one in spaces
    ]
    if not any(cuts):
        raise ConfigError(
            f"--vocab-sizes {config.vocab_sizes}: these are all of the teacher's tokens",
            "list smaller vocabularies, too, or leave it out",
        )
    pieces = [Pieces.of(whole, cut, rows) for cut in cuts]
    usual, sizes = Pieces.of(whole, None, rows), sizes_in_bytes(whole, rows)
    text = SharedText(judged, sizes, [usual, *pieces], subject.positions[0])
    in_bytes, usual_tokens = text.size, text.tokens(usual)
    found = []
    for space, time, cut, own in zip(spaces, times, cuts, pieces, strict=True):
        tokens = text.tokens(own)
        judge_of_bytes = ByteJudge(text, teacher, usual, own)
        found.append(Vocabulary(space, judge_of_bytes, time, tokens / usual_tokens, cut, own, tokens / in_bytes))
    return found


def _with_tokens(config: GPT2Config, positions: int, tokens: int) -> GPT2Config:
    return type(config).from_dict({**config.to_dict(), "n_positions": positions, "vocab_size": tokens})


def _cuttable(config: TruncateStudentConfig, subject: Subject) -> Tokenizer:
    """Return the teacher's tokenizer, if it can be cut and texts can be spelled in what results.

    Raises:
        As `vocabularies_of`.
    """
    if subject.tokenizer is None:
        raise ModelError(f"teacher {config.teacher} has no tokenizer, which --vocab-sizes cuts")
    assert subject.data is not None
    if subject.data.train.marked:
        raise DataError(
            f"{config.data}: its blocks mark which tokens count, and --vocab-sizes cannot move marks to other tokens",
            "give a dataset without marks, or leave out --vocab-sizes",
        )
    return subject.tokenizer


def shapes_to_try(target: Target, vocabularies: Sequence[Vocabulary], most: int) -> list[tuple[Vocabulary, Shape]]:
    """Return at most about `most` students that meet a target, equally many of each vocabulary.

    Raises:
        ConfigError: no vocabulary has any.
    """
    timed = target.measure == "milliseconds"
    predicted = {one.space: predicted_milliseconds(one.space, one.measure) for one in vocabularies} if timed else {}
    costs = predicted or {one.space: getattr(one.space, target.measure) for one in vocabularies}
    within, found = shapes_by_vocabulary(target, costs), []
    for one in vocabularies:
        shapes = spread(within.get(one.space, []), max(1, most // len(within)))
        if timed:
            measured = (
                to_time(shape, one.measure, predicted[one.space], target.limit)
                for shape in follow(shapes, "time the shapes", "shapes")
            )
            shapes = list(dict.fromkeys(shape for shape in measured if shape is not None))
        if not shapes and len(vocabularies) > 1:
            say(f"no student with {one.size:,} tokens meets {target.option}")
        found += [(one, shape) for shape in shapes]
    if not found:
        raise none_is_fast_enough(target)
    return found


def none_is_fast_enough(target: Target) -> ConfigError:
    """Return the error that no student decodes in the time of --target-ms."""
    return ConfigError(
        f"{target.option}: no shape that was tried is fast enough",
        "times vary while other programs run: try again, or give a larger --target-ms",
    )


def seen(vocabularies: Sequence[Vocabulary]) -> list[CutVocabulary] | None:
    """Return what the result says of the vocabularies; None without --vocab-sizes."""
    found = [
        CutVocabulary(one.size, one.tokens_per_byte, one.length)
        for one in vocabularies if one.tokens_per_byte is not None
    ]  # fmt: skip
    return found or None


def held_out_bits(
    config: TruncateStudentConfig, subject: Subject, vocabulary: Vocabulary, student: GPT2LMHeadModel
) -> CutBits | None:
    """Measure student and teacher on the same bytes of the test split.

    Returns:
        None if the split is empty, or without --vocab-sizes.
    """
    data, whole, own = subject.data, subject.tokenizer, vocabulary.pieces
    if own is None or whole is None or data is None or not len(data.test):
        return None
    teacher = subject.loaded.model
    usual = Pieces.of(whole, None, teacher.config.vocab_size)
    blocks = held_out_batches(data.test, config.calibration_sequences, current_device())
    sizes = sizes_in_bytes(whole, teacher.config.vocab_size)
    text = SharedText(blocks, sizes, [usual, own], subject.positions[0])
    return CutBits(text.bits_per_byte(student, own), text.bits_per_byte(teacher, usual), text.blocks)
