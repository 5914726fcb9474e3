"""Measure on calibration texts which blocks and dimensions of a model matter.

All measurements use blocks from the training split of a pregenerated dataset, so that its test split stays unseen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from tinygpt2.compression.calibration import Batches, mean_loss, tokens_of
from tinygpt2.compression.taps import removed, tap
from tinygpt2.models.activations import collect_activations
from tinygpt2.objectives.divergences import IGNORED
from tinygpt2.objectives.logits import PredictionObjective, prediction_loss
from tinygpt2.utils.plotting import paint
from tinygpt2.utils.progress import ProgressStage, follow, track

_ROUNDS = 16  # number of rounds in which dimensions are removed


@contextmanager
def run_blocks(model: GPT2LMHeadModel, layers: Sequence[int]) -> Iterator[None]:
    """Let a model run with only some of its blocks. Afterwards it has all of its blocks again."""
    every = model.transformer.h
    model.transformer.h = nn.ModuleList([every[layer] for layer in layers])
    try:
        yield
    finally:
        model.transformer.h = every


@dataclass(frozen=True)
class RemovalRound:
    """One round of greedy removal.

    Attributes:
        costs: for each block that is left, by how many nats per token the loss rises without it.
        removed: the block with the lowest cost, which is removed.
    """

    costs: dict[int, float]
    removed: int


@dataclass(frozen=True)
class DepthImportance:
    """How much each block matters.

    Attributes:
        loss: loss of the whole model in nats per token.
        influence: block influence: for each block, the mean over tokens of 1 - cos(input, output).
        rounds: the rounds of greedy removal. Each round measures all blocks that are left.
        kept: the blocks that are left after the last round.
    """

    loss: float
    influence: list[float]
    rounds: list[RemovalRound]
    kept: list[int]


def depth_importance(model: GPT2LMHeadModel, batches: Batches, keep: int) -> DepthImportance:
    """Remove one block at a time, always the one whose removal raises the loss least, until `keep` blocks are left.

    Source: for block influence, ShortGPT, Men et al. 2024, arXiv:2403.03853, section 2.2.
    """
    present = list(range(model.config.n_layer))
    rounds = []
    passes = sum(range(keep + 1, len(present) + 1)) + 1
    with track("measure the loss without each block", passes * tokens_of(batches), "tokens") as stage:
        whole = current = mean_loss(model, batches, stage)
        while len(present) > keep:
            losses = {}
            for block in present:
                with run_blocks(model, [other for other in present if other != block]):
                    losses[block] = mean_loss(model, batches, stage)
            removed = min(losses, key=lambda block: losses[block])
            rounds.append(RemovalRound({block: loss - current for block, loss in losses.items()}, removed))
            present.remove(removed)
            current = losses[removed]
    return DepthImportance(whole, block_influence(model, batches), rounds, present)


@torch.no_grad()
def block_influence(model: GPT2LMHeadModel, batches: Batches) -> list[float]:
    """Return for each block the mean over tokens of 1 - cos(input, output)."""
    sums, tokens = torch.zeros(model.config.n_layer, dtype=torch.float64), 0
    for ids in follow(batches, "measure what each block changes", "batches"):
        entries: list[Tensor] = []
        tap(
            model,
            ids,
            {block.ln_1: entries.append for block in model.transformer.h} | {model.transformer.ln_f: entries.append},
        )
        for layer, (before, after) in enumerate(pairwise(entries)):
            sums[layer] += float((1 - F.cosine_similarity(before, after, dim=-1)).cpu().double().sum())
        tokens += ids.numel()
    return [float(value) for value in sums / tokens]


@torch.no_grad()
def active_dimensions(model: GPT2LMHeadModel, batches: Batches, keep: int) -> Int[Tensor, " Ds"]:
    """Return the residual stream's dimensions with the largest mean absolute values after the layer norms, ascending.

    These dimensions hold most of the layer norms' output. That is what matters if the projections are refitted.

    Source: Minitron, Muralidharan et al. 2024, arXiv:2407.14679, section 2.2.
    """
    scores = torch.zeros(model.config.n_embd, device=model.lm_head.weight.device)
    blocks = model.transformer.h

    def see(x: Float[Tensor, "B T D"]) -> None:
        scores.add_(x.abs().sum((0, 1)))

    for ids in follow(batches, "measure the residual dimensions", "batches"):
        last = tap(model, ids, {reader: see for block in blocks for reader in _readers(block)})
        see(last)  # the output matrix reads the last state
    return scores.topk(keep).indices.sort().values.cpu()


def _readers(block: GPT2Block) -> tuple[nn.Module, nn.Module]:
    """Return the modules that read the outputs of a block's layer norms."""
    return block.attn.c_attn, block.mlp.c_fc


def important_dimensions(model: GPT2LMHeadModel, batches: Batches, keep: int) -> Int[Tensor, " Ds"]:
    """Return the residual stream's dimensions whose removal would raise the loss most, ascending.

    A dimension's score is a first-order estimate of how the loss changes if the dimension is removed from the outputs
    of all layer norms: minus the sum over tokens of activation times gradient. In each of several rounds, the
    dimensions with the lowest scores are removed, and the others are measured again. If the projections are not
    refitted, this loses less than `active_dimensions`: see docs/students.md.

    Source: Molchanov et al. 2019, arXiv:1906.10771, section 3.1, on activations.
    """
    total = model.config.n_embd
    kept, narrow = torch.arange(total), model
    with track("measure the residual dimensions", _ROUNDS * tokens_of(batches), "tokens") as stage:
        for number in range(1, _ROUNDS + 1):
            scores = _first_order(narrow, batches, stage)
            size = total - (total - keep) * number // _ROUNDS
            kept = kept[scores.topk(size).indices.sort().values.cpu()]
            if number < _ROUNDS:
                narrow = _narrowed(model, kept)
    return kept


def _first_order(model: GPT2LMHeadModel, batches: Batches, stage: ProgressStage | None = None) -> Float[Tensor, " D"]:
    head = model.lm_head.weight
    scores = torch.zeros(head.shape[1], device=head.device)
    for ids in batches:
        for output, gradient in norm_gradients(model, ids):
            # The loss is a mean over the batch: weight it by the batch's size.
            scores -= len(ids) * (output * gradient).sum((0, 1))
        if stage is not None:
            stage.advance(ids.numel())
    return scores


def norm_gradients(
    model: GPT2LMHeadModel, ids: Int[Tensor, "B T"]
) -> list[tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]]:
    """Return the output of every layer norm and the gradient of the mean loss for it: two of each block, and the last.

    The loss is the cross-entropy of the next tokens.
    """
    transformer, head = model.transformer, model.lm_head.weight.detach()
    norms = [norm for block in transformer.h for norm in (block.ln_1, block.ln_2)] + [transformer.ln_f]
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_() if not seen else output)
        return seen[-1]

    with ExitStack() as hooks, torch.enable_grad():
        for norm in norms:
            hooks.enter_context(removed(norm.register_forward_hook(keep)))
        last = collect_activations(model, ids, states=[len(transformer.h)]).states[len(transformer.h)]
        targets = F.pad(ids[:, 1:], (0, 1), value=IGNORED).flatten()
        loss, _ = prediction_loss(last.flatten(0, 1), head, targets, None, PredictionObjective(0.0, 1.0))
        gradients = torch.autograd.grad(loss, seen)
    return [(output.detach(), gradient) for output, gradient in zip(seen, gradients, strict=True)]


@torch.no_grad()
def _narrowed(model: GPT2LMHeadModel, dims: Int[Tensor, " Ds"]) -> GPT2LMHeadModel:
    """Return a copy of a model with only some of its residual dimensions. Heads and inner units stay as they are."""
    narrow, dims = copy.deepcopy(model), dims.to(model.lm_head.weight.device)
    transformer = narrow.transformer
    tied = narrow.lm_head.weight is transformer.wte.weight
    rows: list[Any] = [reader for block in transformer.h for reader in _readers(block)]
    for module in narrow.modules():
        if module in rows:
            module.weight = nn.Parameter(module.weight[dims])
        elif isinstance(module, nn.LayerNorm):
            module.weight, module.bias = nn.Parameter(module.weight[dims]), nn.Parameter(module.bias[dims])
            module.normalized_shape = (len(dims),)
        elif isinstance(module, Conv1D):  # projections back to the residual stream
            module.weight, module.bias = nn.Parameter(module.weight[:, dims]), nn.Parameter(module.bias[dims])
            module.nf = len(dims)
        elif isinstance(module, nn.Embedding | nn.Linear):
            module.weight = nn.Parameter(module.weight[:, dims])
    if tied:
        narrow.lm_head.weight = transformer.wte.weight
    return narrow


def plot_importance(importance: DepthImportance, path: Path) -> None:
    """Draw how much the loss rises without each block, round by round, and the block influence."""

    def fill(figure: Any) -> None:
        costs, influence = figure.subplots(1, 2)
        for number, one in enumerate(importance.rounds, 1):
            label = f"round {number}: removes {one.removed}"
            costs.plot(list(one.costs), list(one.costs.values()), marker=".", label=label)
        costs.set(xlabel="block", ylabel="rise of the loss without the block (nats per token)", yscale="symlog")
        if importance.rounds:
            costs.legend(fontsize=7)
        influence.bar(range(len(importance.influence)), importance.influence)
        influence.set(xlabel="block", ylabel="block influence, 1 - cos(input, output)")

    paint(path, (12.8, 4.4), fill)
