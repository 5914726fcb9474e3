"""Fidelity: how close the predictions of models are to those of a reference, over the same targets.

The logits of all tokens (N x V) are never in memory at once: the reference and the models run on one batch of windows,
and their distributions are compared for a few rows of a chunk at a time. Of each target a few numbers are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from tinygpt2.data.tokenizer import fingerprint
from tinygpt2.errors import ModelError
from tinygpt2.evaluation.conventions import ModelTokenizer, TokenizedTask
from tinygpt2.evaluation.scoring import Scorer, Scores, Window, batches, padded
from tinygpt2.models.lm_head import rows_at_once, scoring_chunk, wide
from tinygpt2.runtime.devices import current_device
from tinygpt2.utils.types import Array

CALIBRATION_BINS = 15
"""Equal bins of confidence for the calibration error, as in Guo et al. 2017, arXiv:1706.04599, section 5."""

_CONFIDENCE_BINS, _POSITION_BINS = 10, 16  # of the charts
KEPT = ("kl", "reverse_kl", "same_top", "acceptance", "loss", "confidence", "hit")
"""What is kept of each target for each model."""
OF_REFERENCE = ("loss", "confidence", "hit")
"""What is kept of each target for the reference."""


@dataclass(frozen=True)
class FidelityPart:
    """The targets of a part of the text.

    Attributes:
        low, high: the part: positions in the window from `low` to before `high`, or probabilities that the reference
            gives to its likeliest token.
        tokens: number of targets in it.
        kl: their mean KL(reference || model), in nats.
        same_top: for how many of them both have the same likeliest token, as a share.
    """

    low: float
    high: float
    tokens: int
    kl: float
    same_top: float


@dataclass(frozen=True)
class Fidelity:
    """How close a model's predictions are to those of the reference, over the same targets.

    The standard errors are over windows (ratio estimator), as that of the loss.

    Attributes:
        reference: the model that is compared with.
        tokens: number of targets.
        kl, kl_median, kl_p99: mean, median and 99th percentile of KL(reference || model), in nats.
        stderr: standard error of `kl`; None for a single window.
        reverse_kl: mean KL(model || reference), in nats.
        same_top: share of targets for which both have the same likeliest token.
        acceptance: mean of sum(min(p, q)): the share of the model's sampled tokens that speculative decoding with the
            reference accepts (Leviathan et al. 2023, arXiv:2211.17192, section 3.2).
        loss_difference: mean loss of the model minus that of the reference, in nats per token.
        calibration_error, reference_calibration_error: expected calibration error of the likeliest token's
            probability, in `CALIBRATION_BINS` equal bins.
        by_position: the targets by their position in the window.
        by_confidence: the targets by the probability of the reference's likeliest token.
        compared: what the predictions are of. tokens: both have the same. sums: the model's tokens are the reference's
            cut by rank, and its predictions were summed to theirs. events: the tokens differ, and both predictions were
            summed over the events of common borders. In the last two cases, "token" above means these, and
            `reverse_kl` is None: it can be infinite.
        share: of the model's targets for which both predictions compare. The other figures are over these.
        lumped: mean probability, by the reference, of events with several of the model's tokens.
        left_out: mean probability, by the reference, of its tokens that begin at no common border.
    """

    reference: str
    tokens: int
    kl: float
    stderr: float | None
    kl_median: float
    kl_p99: float
    reverse_kl: float | None
    reverse_kl_stderr: float | None
    same_top: float
    same_top_stderr: float | None
    acceptance: float
    acceptance_stderr: float | None
    loss_difference: float
    loss_difference_stderr: float | None
    calibration_error: float
    reference_calibration_error: float
    by_position: list[FidelityPart]
    by_confidence: list[FidelityPart]
    compared: Literal["tokens", "sums", "events"] = "tokens"
    share: float = 1.0
    lumped: float = 0.0
    left_out: float = 0.0


def reads_alike(
    reference: tuple[ModelTokenizer, TokenizedTask | None],
    model: tuple[ModelTokenizer, TokenizedTask],
    task: str,
    room: int,
) -> bool:
    """Return whether the reference reads a model's targets as the same tokens.

    Args:
        reference: the task is None if it is a dataset in other tokens.
        room: the most tokens that the reference can read.

    Raises:
        ModelError: a tokenizer is missing with which other tokens could be compared, or the tokens are the same and the
            model's windows are longer than the reference's positions.
    """
    (teacher, theirs), (student, ours) = reference, model
    # a model may have rows for which its tokenizer has no token
    equal = teacher.config.vocab_size == student.config.vocab_size or _same_tokenizer(teacher, student)
    if theirs is None or not equal or not np.array_equal(theirs.tokens, ours.tokens):
        if teacher.tokenizer is None or student.tokenizer is None:
            bare = teacher if teacher.tokenizer is None else student
            raise ModelError(
                f"the reference {teacher.name} and model {student.name} read {task} as different tokens, and "
                f"{bare.name} has no tokenizer with which these could be aligned",
                "copy the tokenizer's files into the model's directory",
            )
        return False
    longest = max(span.stop - span.start for span in ours.spans) - 1
    if longest > room:
        raise ModelError(
            f"the windows of model {student.name} on {task} have {longest + 1} tokens, but the reference "
            f"{teacher.name} has positions for {room}",
            "give a reference with at least as many positions",
        )
    return True


def _same_tokenizer(one: ModelTokenizer, other: ModelTokenizer) -> bool:
    if one.tokenizer is None or other.tokenizer is None:
        return False
    return fingerprint(one.tokenizer) == fingerprint(other.tokenizer)


def compare(
    reference: tuple[str, Scorer],
    models: Mapping[str, Scorer],
    tokenized: TokenizedTask,
    budget: int,
    advance: Callable[[int, str], None] = lambda targets, note: None,
) -> dict[str, Fidelity]:
    """Compare models with a reference on a task that all of them read as the same windows.

    The reference runs once for all models. Every process compares its share of the windows.

    Args:
        reference: name and model.
        models: by name.
        budget: tokens in one forward pass.
        advance: called with the number of targets that all processes have just compared, and a note.
    """
    name, teacher = reference
    spans, scorers = counted_spans(tokenized), [teacher, *models.values()]
    total = sum(span.targets for span in spans)
    theirs, found = np.zeros((len(OF_REFERENCE), total)), np.zeros((len(models), len(KEPT), total))

    def measure(batch: list[int], place: Int[np.ndarray, " M"]) -> str:
        input_ids, wanted = padded(tokenized.tokens, [spans[index] for index in batch], teacher.head.matrix.device)
        targets = input_ids[:, 1:].flatten().index_select(0, wanted)
        states = [one.model.predicting(input_ids, wanted) for one in scorers]
        of_reference, of_models = _statistics(scorers, states, targets)
        theirs[:, place], found[:, :, place] = of_reference.cpu().numpy(), of_models.cpu().numpy()
        return f"KL {found[0, 0, place].mean():.4f}"

    theirs, found = over_batches(spans, budget, measure, (theirs, found), advance)
    whole = dict(zip(OF_REFERENCE, theirs, strict=True))
    return {
        model: summary(name, dict(zip(KEPT, values, strict=True)), whole, spans)
        for model, values in zip(models, found, strict=True)
    }


def over_batches(
    spans: Sequence[Window],
    budget: int,
    measure: Callable[[list[int], Int[np.ndarray, " M"]], str],
    arrays: tuple[Array, Array],
    advance: Callable[[int, str], None],
) -> tuple[Array, Array]:
    """Measure windows in batches, of which every process takes its share.

    Args:
        measure: writes the figures of a batch into the arrays, given the windows' numbers and the places of their
            targets among all; returns a note.
        arrays: zeros that `measure` fills.
        advance: called with the number of targets that all processes have just measured, and the note.

    Returns:
        The arrays with what all processes have measured.
    """
    state = PartialState(cpu=current_device().type == "cpu")
    counts = np.array([span.targets for span in spans])
    ends, total, done = np.cumsum(counts), int(counts.sum()), 0
    for batch in list(batches(list(map(len, spans)), budget))[state.process_index :: state.num_processes]:
        place = np.concatenate([np.arange(ends[index] - counts[index], ends[index]) for index in batch])
        note = measure(batch, place)
        just = min(len(place) * state.num_processes, total - done)
        done += just
        advance(just, note)
    if state.num_processes == 1:
        return arrays
    left, right = (reduce(torch.from_numpy(x).to(state.device), "sum").cpu().numpy() for x in arrays)
    return left, right


def counted_spans(tokenized: TokenizedTask) -> list[Window]:
    """Return the windows whose targets count: of a question, that of the right answer."""
    return [tokenized.spans[index] for index in tokenized.answers] if len(tokenized.right) else tokenized.spans


@torch.no_grad()
def _statistics(
    scorers: Sequence[Scorer], states: Sequence[Float[Tensor, "N D"]], targets: Int[Tensor, " N"]
) -> tuple[Float[Tensor, "R N"], Float[Tensor, "M K N"]]:
    """Return the numbers `OF_REFERENCE` and, for each of the M other models, the numbers `KEPT` of N targets.

    Args:
        scorers: the reference and the models, and `states` their last hidden states; their widths may differ. Rows that
            not all of them have are left out: they are no tokens.
    """
    first = scorers[0]
    vocabulary, device = min(scorer.head.size for scorer in scorers), targets.device.type
    chunk, rows = scoring_chunk(vocabulary, device), rows_at_once(vocabulary, device)
    theirs = torch.empty(len(OF_REFERENCE), len(targets), dtype=wide(first.head.matrix), device=targets.device)
    ours = torch.empty(len(scorers) - 1, len(KEPT), len(targets), dtype=theirs.dtype, device=targets.device)
    for start in range(0, len(targets), chunk):
        logits = [scorer.head.logits(one[start : start + chunk]) for one, scorer in zip(states, scorers, strict=True)]
        for inner in range(0, len(logits[0]), rows):
            part = slice(start + inner, min(start + inner + rows, start + len(logits[0])))
            logs = [one[inner : inner + rows, :vocabulary].to(theirs.dtype).log_softmax(-1) for one in logits]
            tops = [one.max(-1) for one in logs]
            for number, (log, top) in enumerate(zip(logs, tops, strict=True)):
                loss = -log.gather(-1, targets[part, None])[:, 0]
                own = [loss, top.values.exp(), top.indices == targets[part]]
                if number:
                    own = [*_divergences(logs[0], log), *own]
                    own.insert(2, top.indices == tops[0].indices)
                (ours[number - 1] if number else theirs)[:, part] = torch.stack([x.to(theirs.dtype) for x in own])
    return theirs, ours


def _divergences(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return KL(teacher || student), KL(student || teacher) and sum(min(p, q)) of log-probabilities, row by row."""
    p, q = teacher.exp(), student.exp()
    return (p * (teacher - student)).sum(-1), (q * (student - teacher)).sum(-1), torch.minimum(p, q).sum(-1)


def summary(
    reference: str,
    ours: Mapping[str, Float[np.ndarray, " N"]],
    theirs: Mapping[str, Float[np.ndarray, " N"]],
    spans: Sequence[Window],
    known: Bool[np.ndarray, " N"] | None = None,
) -> Fidelity:
    """Return the figures of all targets.

    Args:
        ours, theirs: the numbers of each target by their names: `KEPT` of the model, `OF_REFERENCE` of the reference.
        known: which targets count; None if all do.
    """
    owner = np.repeat(np.arange(len(spans)), [span.targets for span in spans])
    position = np.concatenate([np.arange(span.first, span.stop - span.start) for span in spans])
    if known is not None:
        owner, position = owner[known], position[known]
        ours, theirs = ({key: values[known] for key, values in one.items()} for one in (ours, theirs))
    counts = np.bincount(owner, minlength=len(spans))

    def mean(values: Float[np.ndarray, " N"]) -> tuple[float, float | None]:
        scores = Scores(np.bincount(owner, values, len(spans)), counts)
        return scores.loss, scores.stderr

    means = {key: mean(ours[key]) for key in ("kl", "reverse_kl", "same_top", "acceptance")}
    means["loss_difference"] = mean(ours["loss"] - theirs["loss"])
    values = {key: value for key, (value, _) in means.items()}
    errors = {"stderr" if key == "kl" else f"{key}_stderr": error for key, (_, error) in means.items()}
    length = int(position.max()) + 1
    edges = np.unique(np.linspace(1, length, min(_POSITION_BINS, length - 1) + 1).round())
    return Fidelity(
        reference=reference,
        tokens=int(counts.sum()),
        kl_median=float(np.median(ours["kl"])),
        kl_p99=float(np.percentile(ours["kl"], 99)),
        calibration_error=calibration_error(ours["confidence"], ours["hit"]),
        reference_calibration_error=calibration_error(theirs["confidence"], theirs["hit"]),
        by_position=_parts(position, edges, ours["kl"], ours["same_top"]),
        by_confidence=_parts(
            theirs["confidence"], np.linspace(0, 1, _CONFIDENCE_BINS + 1), ours["kl"], ours["same_top"]
        ),
        **{**values, **errors},  # type: ignore[arg-type]
    )


def calibration_error(confidence: Float[np.ndarray, " N"], hit: Float[np.ndarray, " N"]) -> float:
    """Return the expected calibration error: the mean over targets of |share of hits - mean confidence| of their bin.

    Args:
        confidence: the probability of the likeliest token.
        hit: whether it is the target, 0 or 1.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    number = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    return float(np.abs(np.bincount(number, hit - confidence)).sum() / len(hit))


def _parts(
    values: Integer[np.ndarray, " N"] | Float[np.ndarray, " N"],
    edges: Float[np.ndarray, " E"],
    kl: Float[np.ndarray, " N"],
    same: Bool[np.ndarray, " N"] | Float[np.ndarray, " N"],
) -> list[FidelityPart]:
    """Return the targets whose value is in each of the intervals between the edges; empty ones are left out."""
    number = np.clip(np.searchsorted(edges, values, "right") - 1, 0, len(edges) - 2)
    counts, *sums = (np.bincount(number, weights, len(edges) - 1) for weights in (None, kl, same))
    return [
        FidelityPart(float(low), float(high), int(count), float(divergence / count), float(agreed / count))
        for low, high, count, divergence, agreed in zip(edges, edges[1:], counts, *sums, strict=False)
        if count
    ]
