"""Fidelity of models whose tokens are not the reference's, over what both predict.

The reference reads each window in its own tokens, as a teacher does in training. If the model's tokens are the
reference's cut by rank, the reference's predictions are summed to predictions of the model's tokens. Else both models'
predictions are summed over the events of common borders, as with --alignment pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tinygpt2.alignment.blocks import AlignedBlocks, BlockAligner, RankCutAligner
from tinygpt2.alignment.borders import ByteAligner
from tinygpt2.alignment.events import Events, Graph, pairs_of, token_rows
from tinygpt2.alignment.rank_cut import same_cut
from tinygpt2.alignment.redistribution import Redistribution, add_columns
from tinygpt2.data.batches.batch import Batch
from tinygpt2.errors import ModelError
from tinygpt2.evaluation.conventions import ModelTokenizer, TokenizedTask
from tinygpt2.evaluation.fidelity import KEPT, OF_REFERENCE, Fidelity, counted_spans, over_batches, summary
from tinygpt2.evaluation.scoring import Scorer, padded
from tinygpt2.models.lm_head import scoring_chunk, wide
from tinygpt2.utils.files import absolute
from tinygpt2.utils.progress import track
from tinygpt2.utils.types import Array

_MORE = ("known", "lumped", "left_out")  # of each target, beside what is kept of equal tokens


@dataclass(frozen=True)
class Shared:
    """What a reference and a model with other tokens both predict: the model's tokens, or events.

    Attributes:
        align: encodes the model's windows in the reference's tokens.
        moves: makes predictions of the model's tokens or of the events of the reference's last hidden states.
        size: V, the number of the model's tokens.
    """

    align: BlockAligner
    moves: Redistribution | Events
    size: int

    def of_reference(
        self, scorer: Scorer, states: Float[Tensor, "S D"], records: Int[Tensor, "n 3"]
    ) -> tuple[Float[Tensor, "n E"], Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Return the reference's probabilities, those in lumps, and those of its tokens that begin at no border."""
        logits = scorer.head.logits(states[records[:, 0].clamp(min=0)])[:, : scorer.head.size]
        if isinstance(self.moves, Redistribution):
            p = self.moves(logits, records)[:, : self.size].exp()
            return p, p.new_zeros(len(p)), p.new_zeros(len(p))
        p, left_out = self.moves.probabilities(logits)
        return p, p[:, self.moves.lumps].sum(1), left_out

    def of_model(self, logits: Float[Tensor, "n W"]) -> Float[Tensor, "n E"]:
        """Return the model's probabilities of the same."""
        q = logits[:, : self.size].to(wide(logits)).softmax(-1)
        if isinstance(self.moves, Redistribution):
            return q
        sums = q.new_zeros(len(q), self.moves.count + 1)
        add_columns(sums, self.moves.ours[: self.size], q)
        return sums

    def counts(self, tokens: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Return which next tokens are among what is predicted."""
        if isinstance(self.moves, Redistribution):
            return torch.ones_like(tokens, dtype=torch.bool)
        return self.moves.ours[tokens] < self.moves.count

    def targets(self, tokens: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return what the next tokens are among what is predicted."""
        return tokens if isinstance(self.moves, Redistribution) else self.moves.ours[tokens]


def compare_across(
    reference: tuple[ModelTokenizer, Scorer],
    models: Mapping[str, tuple[ModelTokenizer, Scorer]],
    tokenized: TokenizedTask,
    budget: int,
    advance: Callable[[int, str], None] = lambda targets, note: None,
) -> dict[str, Fidelity]:
    """Compare models that read a task as the same windows with a reference that has other tokens.

    Args:
        reference: its tokenizer and its model.
        models: the same, by name.
        budget: tokens of the models in one forward pass.
        advance: called with the number of targets that all processes have just looked at, and a note.

    Raises:
        ModelError: a tokenizer changes the bytes of texts, or the tokens never begin at the same place.
    """
    (reader, teacher), (first, scorer) = reference, next(iter(models.values()))
    spans, device = counted_spans(tokenized), teacher.head.matrix.device
    whole = [tokenized.stride is None or span.stop == len(tokenized.tokens) for span in spans]
    rows = [(tokenized.tokens[span.start : span.stop], complete) for span, complete in zip(spans, whole, strict=True)]
    shared = _shared(reader, first, teacher, scorer, rows)
    scorers, total = [one for _, one in models.values()], sum(span.targets for span in spans)
    theirs, found = np.zeros((len(OF_REFERENCE) + len(_MORE), total)), np.zeros((len(models), len(KEPT), total))

    def measure(batch: list[int], place: Array) -> str:
        read = padded(tokenized.tokens, [spans[index] for index in batch], device)
        lengths, complete = [len(spans[index]) for index in batch], [whole[index] for index in batch]
        blocks = shared.align(Batch(read[0], lengths), complete).to(device)
        theirs[:, place], found[:, :, place] = _statistics(shared, teacher, scorers, read, blocks)
        return f"KL {found[0, 0, place].sum() / max(1.0, theirs[-3, place].sum()):.4f}"

    theirs, found = over_batches(spans, budget, measure, (theirs, found), advance)
    known = theirs[len(OF_REFERENCE)] > 0
    if not known.any():
        raise ModelError(f"the tokens of {reader.name} and {first.name} never begin at the same place in the text")
    means = {key: float(values[known].mean()) for key, values in zip(_MORE, theirs[len(OF_REFERENCE) :], strict=True)}
    means["share"] = float(known.mean())
    compared: Literal["sums", "events"] = "sums" if isinstance(shared.moves, Redistribution) else "events"
    return {
        name: replace(
            summary(absolute(reader.name), dict(zip(KEPT, values, strict=True)),
                    dict(zip(OF_REFERENCE, theirs, strict=False)), spans, known),
            compared=compared, share=means["share"], lumped=means["lumped"], left_out=means["left_out"],
            reverse_kl=None, reverse_kl_stderr=None,
        )
        for name, values in zip(models, found, strict=True)
    }  # fmt: skip


def _shared(
    reader: ModelTokenizer, model: ModelTokenizer, teacher: Scorer, scorer: Scorer, rows: list[tuple[Array, bool]]
) -> Shared:
    """Find out what a reference and a model both predict.

    Args:
        rows: the windows, and whether the last word of each is complete. The events are counted on them, and on the
            text of each token alone.
    """
    whole, small, size = reader.tokenizer, model.tokenizer, scorer.model.vocabulary
    assert whole is not None
    assert small is not None  # as `reads_alike` has checked
    positions, start = teacher.model.shape.positions, teacher.model.reading.start
    limit = None if positions is None else positions - (start is not None)
    device = teacher.head.matrix.device
    if (cut := same_cut(whole, small)) is not None:
        pieces = RankCutAligner(whole, cut, teacher.model.vocabulary, limit)
        return Shared(pieces, Redistribution(pieces.decomposition, size, device), size)
    align = ByteAligner(whole, small, limit)
    with track("count the events", None):
        found = pairs_of(align, chain(rows, token_rows(whole, small)))
    pairs = np.array(sorted(pair for pair in found if pair[0] < teacher.model.vocabulary and pair[1] < size), np.int64)
    if not len(pairs):
        raise ModelError(f"the tokens of {reader.name} and {model.name} never begin at the same place in the text")
    return Shared(align, Events(Graph.of(pairs, size), size, device), size)


@torch.no_grad()
def _statistics(
    shared: Shared,
    teacher: Scorer,
    scorers: Sequence[Scorer],
    read: tuple[Int[Tensor, "B T"], Int[Tensor, " M"]],
    blocks: AlignedBlocks,
) -> tuple[Float[np.ndarray, "R M"], Float[np.ndarray, "K N M"]]:
    """Return what is kept of the reference and of each model for M targets, with zeros where both do not compare.

    Args:
        read: the windows, and the positions that predict their targets.
        blocks: the windows in the reference's tokens.
    """
    input_ids, wanted = read
    records, last = blocks.records.flatten(0, 1)[wanted], teacher.model.shape.layers
    known = (records[:, 0] >= 0) & shared.counts(records[:, 2])
    places = known.nonzero()[:, 0]
    records = records[places]
    states = teacher.model.collect(blocks.ids, [last]).states[last].flatten(0, 1)
    of_models = [scorer.model.predicting(input_ids, wanted[places]) for scorer in scorers]
    theirs = torch.zeros(len(OF_REFERENCE) + len(_MORE), len(wanted), dtype=wide(states), device=states.device)
    ours = torch.zeros(len(scorers), len(KEPT), len(wanted), dtype=theirs.dtype, device=states.device)
    chunk = scoring_chunk(max(teacher.head.size, shared.size), states.device.type)
    for start in range(0, len(records), chunk):
        part = slice(start, min(start + chunk, len(records)))
        p, lumped, left_out = shared.of_reference(teacher, states, records[part])
        targets = shared.targets(records[part, 2])
        log_p, own, top = _own(p, targets)
        theirs[:, places[part]] = torch.stack([*own, torch.ones_like(lumped), lumped, left_out])
        for number, scorer in enumerate(scorers):
            q = shared.of_model(scorer.head.logits(of_models[number][part]))
            log_q, figures, likeliest = _own(q, targets)
            divergence = (p * (log_p - log_q)).sum(-1)
            same, both = (likeliest == top).to(p.dtype), torch.minimum(p, q).sum(-1)
            ours[number][:, places[part]] = torch.stack([divergence, torch.zeros_like(both), same, both, *figures])
    return theirs.cpu().numpy(), ours.cpu().numpy()


def _own(
    p: Float[Tensor, "n E"], targets: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n E"], list[Float[Tensor, " n"]], Int[Tensor, " n"]]:
    """Return the logarithms of probabilities, the numbers `OF_REFERENCE`, and what is the likeliest."""
    logs, top = p.clamp(min=torch.finfo(p.dtype).tiny).log(), p.max(-1)
    loss = -logs.gather(-1, targets[:, None])[:, 0]
    return logs, [loss, top.values, (top.indices == targets).to(p.dtype)], top.indices
