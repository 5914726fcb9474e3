"""Cut a student from a teacher: choose blocks, heads, inner units, dimensions and positions, and copy the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.alignment.rank_cut import RankCut, cut_by_rank, cut_vocabulary
from tinygpt2.alignment.translation import Translation, translate
from tinygpt2.alignment.used_tokens import cut_by_use
from tinygpt2.compression.calibration import Batches, calibration_batches, held_out_batches, mean_loss, tokens_of
from tinygpt2.compression.conversion import Conversion, LoadedTeacher, load_as_gpt2, measured
from tinygpt2.compression.cut import KeptParts, choose_layers, cut_model, require_cuttable
from tinygpt2.compression.heads import head_moments, narrow_heads
from tinygpt2.compression.importance import (
    DepthImportance,
    active_dimensions,
    depth_importance,
    important_dimensions,
    plot_importance,
)
from tinygpt2.compression.least_squares import refit
from tinygpt2.compression.measurements import Measurements
from tinygpt2.compression.rotation import Rotation, principal_rotation
from tinygpt2.compression.selection import least_missed
from tinygpt2.compression.sizes import check_sizes, position_count, sizes_of
from tinygpt2.config.common import OTHER_OUT
from tinygpt2.config.compression import Position, TruncateStudentConfig
from tinygpt2.data.dataset import PackedDataset, load_packed_dataset
from tinygpt2.data.tokenizer import fingerprint, load_tokenizer
from tinygpt2.errors import ConfigError, DataError, ModelError
from tinygpt2.evaluation.scoring import perplexity_of
from tinygpt2.models.card import cut_metadata, model_card
from tinygpt2.models.compatibility import check_fits
from tinygpt2.models.loading import model_tokenizer
from tinygpt2.models.parameters import count_parameters
from tinygpt2.models.saving import save_model
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.runtime.devices import computes_on_device, current_device
from tinygpt2.runtime.threads import tell_machine
from tinygpt2.utils.files import require_free, shared_name
from tinygpt2.utils.hub import at_commit, hub_revision
from tinygpt2.utils.locks import writes_out
from tinygpt2.utils.progress import track

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

PICTURE = "importance.png"


@dataclass(frozen=True)
class CutPerplexity:
    """Held-out perplexity per token of the student right after the cut and of the teacher.

    Both are measured on the same blocks; `sequences` is their number. Tokens are cut or replaced afterwards, because
    perplexities per token need equal tokens.
    """

    student: float
    teacher: float
    sequences: int

    def described(self, config: TruncateStudentConfig) -> str:
        """Return on what both were measured, for the model card."""
        tokens = ", in the teacher's tokens" if config.changes_tokens else ""
        return f"{self.sequences} blocks of the test split of {shared_name(config.data or '')}{tokens}"


@dataclass(frozen=True)
class TruncateStudentResult:
    """The result of `truncate-student`.

    Attributes:
        layers: the teacher's blocks that were kept, counted from 0.
        importance: the measurements of --strategy importance; None for other strategies.
        perplexity: None without --data, or if the test split of --data is empty.
        conversion: how a teacher of another architecture became a GPT-2 before the cut; None for a GPT-2.
    """

    model: str
    layers: list[int]
    parameters: int
    teacher_parameters: int
    importance: DepthImportance | None = None
    perplexity: CutPerplexity | None = None
    conversion: Conversion | None = None


@computes_on_device
@writes_out
@fast_products()
def truncate_student(config: TruncateStudentConfig) -> TruncateStudentResult:
    """Cut a student's starting weights from a teacher and save them as a plain GPT-2 with its tokenizer.

    Raises:
        ConfigError: chosen parts do not exist or do not fit together, or the output directory is not empty.
        DataError: the calibration data is missing or empty, or was made with another tokenizer.
        ModelError: the teacher cannot be loaded, or GPT-2 does not have its parts.
    """
    if config.target is not None:
        raise ConfigError(
            f"truncate_student makes a student of given sizes, and {config.target.option} asks for a search",
            "call tinygpt2.cut_to_target instead",
        )
    subject = load_subject(config)
    teacher, positions, batches = subject.loaded.model, subject.positions, subject.batches
    kept, importance = choose_parts(config, Measurements(teacher, batches), positions)
    student = cut_model(teacher.cpu(), kept)
    if config.refit:
        device = current_device()
        short = [ids[:, : positions[0]] for ids in batches]
        refit(student.to(device), teacher.to(device), kept, short)
    perplexity = held_out_perplexity(config, subject, student)
    student = subject.finished(student)
    out = Path(config.out)
    result = TruncateStudentResult(
        str(out.resolve()),
        kept.layers,
        count_parameters(student),
        subject.loaded.parameters,
        importance,
        perplexity,
        subject.conversion,
    )
    save_student(config, subject, student, _card(config, kept, result, subject))
    if importance is not None:
        plot_importance(importance, out / PICTURE)
    return result


@dataclass(frozen=True)
class Subject:
    """A teacher that is loaded and fits the options, and what it is measured on.

    Attributes:
        data: the dataset of --data, if it is given.
        batches: calibration texts on the device; empty if nothing has to be measured.
        positions: number of the student's positions, and how their embeddings are chosen.
        conversion: how a teacher of another architecture became a GPT-2.
        commit: of a teacher from the Hub.
        vocabulary: the student's tokens, if they are others. All that is measured is in the teacher's.
    """

    loaded: LoadedTeacher
    tokenizer: Tokenizer | None
    data: PackedDataset | None
    batches: Batches
    positions: tuple[int, Position]
    conversion: Conversion | None
    commit: str | None
    vocabulary: RankCut | Translation | None = None

    def finished(self, student: GPT2LMHeadModel) -> GPT2LMHeadModel:
        """Return a student with its own vocabulary, which is cut or replaced last."""
        if isinstance(self.vocabulary, Translation):
            return translate(student, self.vocabulary)
        return student if self.vocabulary is None else cut_vocabulary(student, self.vocabulary)


def load_subject(config: TruncateStudentConfig) -> Subject:
    """Check `config.out`, load the teacher and the data, and check that they fit the options and each other.

    Raises:
        As `truncate_student`.
    """
    require_free(Path(config.out), OTHER_OUT)
    loaded = load_as_gpt2(config.teacher, allow_pickle=config.allow_pickle)
    teacher, directory = loaded.model, loaded.directory
    require_cuttable(teacher, config.teacher)
    tokenizer = model_tokenizer(directory)
    check_sizes(config, teacher.config)  # before anything is measured
    positions = position_count(config, teacher.config.n_positions)
    data = None
    if config.data is not None:
        data = load_packed_dataset(config.data)
        check_fits(data, teacher.config, tokenizer and fingerprint(tokenizer), f"teacher {config.teacher}")
    vocabulary = _vocabulary(config, tokenizer, teacher.config.vocab_size, data)
    conversion = measured(loaded, config.teacher, data, config.calibration_sequences, positions[0])
    batches: Batches = []
    if data is not None and config.measures:
        if not len(data.train):
            raise DataError(f"the training split of {config.data} is empty: there is nothing to measure on")
        teacher.to(current_device())
        tell_machine(current_device(), "fp32")
        batches = calibration_batches(data.train, config.calibration_sequences, teacher.lm_head.weight.device)
    commit = hub_revision(config.teacher, directory)
    return Subject(loaded, tokenizer, data, batches, positions, conversion, commit, vocabulary)


def _vocabulary(
    config: TruncateStudentConfig, tokenizer: Tokenizer | None, rows: int, data: PackedDataset | None
) -> RankCut | Translation | None:
    """Return the student's tokens, if they are not the teacher's; the teacher has a number of rows."""
    if not config.changes_tokens:
        return None
    if tokenizer is None:
        what = "which --vocab-size cuts" if config.tokenizer is None else "so --tokenizer cannot compare tokens"
        raise ModelError(f"teacher {config.teacher} has no tokenizer, {what}")
    if config.tokenizer is not None:
        return Translation.of(tokenizer, load_tokenizer(config.tokenizer), rows)
    size = config.vocab_size or 0
    if config.vocab_choice == "used" and data is not None:
        return cut_by_use(tokenizer, size, rows, data.train)
    return cut_by_rank(tokenizer, size, rows)


def save_student(config: TruncateStudentConfig, subject: Subject, student: GPT2LMHeadModel, card: str) -> None:
    """Save a student in `config.out`, with its tokenizer and the options that made it."""
    pinned = {} if subject.commit is None else {"teacher": at_commit(config.teacher, subject.commit)}
    run = config.model_copy(update=pinned).to_yaml()
    tokenizer = subject.tokenizer if subject.vocabulary is None else subject.vocabulary.tokenizer
    save_model(student.cpu(), Path(config.out), tokenizer, card, run=run)


def choose_parts(
    config: TruncateStudentConfig, measurements: Measurements, positions: tuple[int, Position], *, quick: bool = False
) -> tuple[KeptParts, DepthImportance | None]:
    """Return the parts to keep, and the importance of the blocks if --strategy importance measured it.

    Args:
        quick: take the inner units from an order that is found once for all students (`Measurements.unit_order`).
    """
    teacher = measurements.teacher
    shape, importance = teacher.config, None
    if config.layers is not None:
        layers = [int(number) for number in config.layers.split(",")]
    elif config.strategy == "importance":
        importance = depth_importance(teacher, measurements.batches, config.num_layers or shape.n_layer)
        layers = importance.kept
    else:
        layers = choose_layers(shape.n_layer, config.num_layers or shape.n_layer, config.strategy or "uniform")
    width, heads, inner = sizes_of(config, shape)
    if not config.cuts_width:
        whole = [torch.arange(size) for size in (width, heads, inner)]
        kept = KeptParts(layers, whole[0], [whole[1]] * len(layers), [whole[2]] * len(layers), positions)
        return dataclasses.replace(kept, untied=config.untie_head), importance
    dimensions = _dimensions(config, measurements, layers)
    kept = KeptParts(layers, dimensions, [], [], positions, untied=config.untie_head)
    encode, head_width = kept.encode(shape.n_embd), shape.n_embd // shape.n_head
    narrowed = []
    for layer, (read, mixed, units) in zip(layers, measurements.projections(layers), strict=True):
        block = teacher.transformer.h[layer]
        attention, mlp = (
            projection.weight.cpu().double() @ encode for projection in (block.attn.c_proj, block.mlp.c_proj)
        )
        kept.heads.append(least_missed(mixed.covariance, attention, heads, head_width))
        if quick:
            kept.inner.append(measurements.unit_order(layer)[-inner:].sort().values)
        else:
            kept.inner.append(least_missed(units.covariance, mlp, inner))
        if width // heads != head_width:
            narrowed.append(narrow_heads(head_moments(block, read, mixed), attention, kept.heads[-1], width // heads))
    return dataclasses.replace(kept, narrowed=narrowed or None), importance


def _dimensions(
    config: TruncateStudentConfig, measurements: Measurements, layers: list[int]
) -> Int[Tensor, " Ds"] | Rotation:
    """Return what a student keeps of its teacher's residual stream."""
    teacher, batches = measurements.teacher, measurements.batches
    width = sizes_of(config, teacher.config)[0]
    if width == teacher.config.n_embd:
        return torch.arange(width)
    if not config.rotated:
        return (active_dimensions if config.refit else important_dimensions)(teacher, batches, width)
    tied = teacher.config.tie_word_embeddings and not config.untie_head
    return principal_rotation(teacher, measurements.stream(tied=tied), layers, width, tied=tied)


def held_out_perplexity(
    config: TruncateStudentConfig, subject: Subject, student: GPT2LMHeadModel
) -> CutPerplexity | None:
    """Measure student and teacher on blocks of the test split, shortened to the student's positions.

    Returns:
        None without data, or if its test split is empty.
    """
    if subject.data is None or not len(subject.data.test):
        return None
    before = None if subject.conversion is None else subject.conversion.original_loss
    device = current_device()
    blocks = held_out_batches(subject.data.test, config.calibration_sequences, device)
    batches = [ids[:, : student.config.n_positions] for ids in blocks]
    models = [model.to(device) for model in ([student, subject.loaded.model] if before is None else [student])]
    with track("measure student and teacher", len(models) * tokens_of(batches), "tokens") as stage:
        losses = [mean_loss(model, batches, stage) for model in models]
    after, before = losses[0], losses[-1] if before is None else before
    return CutPerplexity(perplexity_of(after), perplexity_of(before), sum(len(ids) for ids in batches))


def _card(config: TruncateStudentConfig, kept: KeptParts, result: TruncateStudentResult, subject: Subject) -> str:
    figures = {"parameters": f"{result.parameters:,}", "teacher's parameters": f"{result.teacher_parameters:,}"}
    if (commit := subject.commit) is not None:
        figures["revision of the teacher"] = commit
    if result.conversion is not None:
        figures["made a GPT-2 from"] = result.conversion.described()
    figures |= dict(_reasons(config, kept, result, subject.batches))
    if (perplexity := result.perplexity) is not None:
        figures["perplexity before any training"] = f"{perplexity.student:,.2f} (teacher {perplexity.teacher:,.2f})"
        figures["measured on"] = perplexity.described(config)
    plural = "" if len(kept.layers) == 1 else "s"
    how = (
        f"A GPT-2 with {len(kept.layers)} layer{plural} and hidden size {kept.width}, cut from "
        f"{shared_name(config.teacher)} and not trained since. It consists of the teacher's block{plural} "
        f"{', '.join(map(str, kept.layers))}"
        + (" in the main directions of its residual stream" if isinstance(kept.dimensions, Rotation) else "")
        + (", with refitted projections." if config.refit else ".")
    )
    metadata = cut_metadata(config, commit, None if perplexity is None else perplexity.student)
    return model_card(Path(config.out).name, how, figures, f"truncate-student {config.flags(shared=True)}", metadata)


def _reasons(
    config: TruncateStudentConfig, kept: KeptParts, result: TruncateStudentResult, batches: Batches
) -> Iterator[tuple[str, str]]:
    """Yield rows for the model card: which parts were kept, and why."""
    why = "chosen with --layers" if config.layers is not None else f"strategy {config.strategy or 'uniform'}"
    if result.importance is not None:
        removed = ", ".join(f"{one.removed} (+{one.costs[one.removed]:.4f})" for one in result.importance.rounds)
        why += f"; removed in this order, with the rise of the loss in nats per token: {removed}"
    yield "blocks kept (counted from 0)", f"{', '.join(map(str, kept.layers))} ({why})"
    if config.cuts_width:
        where = f"{tokens_of(batches):,} tokens of {shared_name(config.data or '')}"
        sizes = f"{kept.width}, {len(kept.heads[0])}, {len(kept.inner[0])}"
        yield "hidden size, heads, inner units", f"{sizes}: the ones that matter most on {where}"
        if isinstance(kept.dimensions, Rotation):
            shares = [kept.dimensions.share(norm) for norm in range(len(kept.dimensions.moments.norms))]
            yield "share of the norms' inputs kept", f"{min(shares):.1%} to {max(shares):.1%}"
        else:
            yield "dimensions kept", ", ".join(map(str, kept.dimensions.tolist()))
        for new, heads in enumerate(kept.heads):
            yield f"heads kept in block {new}", ", ".join(map(str, heads.tolist()))
    if config.vocab_size is not None:
        used = f"those that {shared_name(config.data or '')} uses most"
        which = used if config.vocab_choice == "used" else "the first ones of the teacher's by merge rank"
        yield "tokens", f"{config.vocab_size:,}: {which}"
    if config.tokenizer is not None:
        yield "tokens", f"those of {shared_name(config.tokenizer)}: means of the teacher's embeddings"
    if config.n_positions is not None:
        yield "positions", f"{kept.positions[0]} ({kept.positions[1]})"
