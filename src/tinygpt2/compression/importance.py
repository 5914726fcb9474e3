"""Measure on calibration texts which blocks, heads, inner units and dimensions of a model matter.

All measurements use blocks from the training split of a pregenerated dataset, so that its test split stays unseen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from tinygpt2.compression.calibration import Batches, mean_loss, tokens_of
from tinygpt2.models.activations import by_head, collect_activations
from tinygpt2.objectives.divergences import IGNORED
from tinygpt2.objectives.logits import PredictionObjective, prediction_loss
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
        _tap(
            model,
            ids,
            {block.ln_1: entries.append for block in model.transformer.h} | {model.transformer.ln_f: entries.append},
        )
        for layer, (before, after) in enumerate(pairwise(entries)):
            sums[layer] += float((1 - F.cosine_similarity(before, after, dim=-1)).cpu().double().sum())
        tokens += ids.numel()
    return [float(value) for value in sums / tokens]


@dataclass(frozen=True)
class WidthImportance:
    """How much the heads and inner units of each layer matter. Larger numbers mean more.

    Attributes:
        heads: for each head, the norm of the vector that it adds to the residual stream, summed over tokens.
        inner: for each inner unit, its absolute activation, summed over tokens.
    """

    heads: list[Float[Tensor, " H"]]
    inner: list[Float[Tensor, " F"]]


@torch.no_grad()
def width_importance(model: GPT2LMHeadModel, batches: Batches) -> WidthImportance:
    """Measure how active the heads and inner units are.

    Source: Minitron, Muralidharan et al. 2024, arXiv:2407.14679, section 2.2.
    """
    blocks, config = model.transformer.h, model.config
    device = model.lm_head.weight.device
    heads = [torch.zeros(config.n_head, device=device) for _ in blocks]
    inner = [torch.zeros(block.mlp.c_fc.weight.shape[1], device=device) for block in blocks]
    # A head adds m_h W_h to the stream. Its squared norm is m_h (W_h W_h^T) m_h^T, and W_h W_h^T is only K x K.
    outputs = [block.attn.c_proj.weight.view(config.n_head, -1, config.n_embd) for block in blocks]
    gram = [output @ output.mT for output in outputs]  # (H, K, K)

    def see_head(mixed: Float[Tensor, "B T D"], layer: int) -> None:
        part = by_head(mixed, config.n_head)  # (B, H, T, K)
        squares = ((part @ gram[layer]) * part).sum(-1)
        heads[layer] += squares.clamp_min(0).sqrt().sum((0, 2))

    def see_units(x: Float[Tensor, "B T F"], layer: int) -> None:
        inner[layer] += x.abs().sum((0, 1))

    taps: dict[nn.Module, Callable[[Tensor], object]] = {}
    for layer, block in enumerate(blocks):
        taps[block.attn.c_proj] = partial(see_head, layer=layer)
        taps[block.mlp.c_proj] = partial(see_units, layer=layer)
    for ids in follow(batches, "measure heads and inner units", "batches"):
        _tap(model, ids, taps)
    return WidthImportance(heads, inner)


@torch.no_grad()
def active_dimensions(model: GPT2LMHeadModel, batches: Batches, keep: int) -> Int[Tensor, " Ds"]:
    """Return the residual stream's dimensions with the largest mean absolute values after the layer norms, ascending.

    These dimensions hold most of the layer norms' output. That is what matters if the projections are refitted.

    Source: as for `width_importance`.
    """
    scores = torch.zeros(model.config.n_embd, device=model.lm_head.weight.device)
    blocks = model.transformer.h

    def see(x: Float[Tensor, "B T D"]) -> None:
        scores.add_(x.abs().sum((0, 1)))

    for ids in follow(batches, "measure the residual dimensions", "batches"):
        last = _tap(model, ids, {reader: see for block in blocks for reader in _readers(block)})
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
    transformer, head = model.transformer, model.lm_head.weight.detach()
    norms = [norm for block in transformer.h for norm in (block.ln_1, block.ln_2)] + [transformer.ln_f]
    scores = torch.zeros(head.shape[1], device=head.device)
    for ids in batches:
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(output.detach().requires_grad_() if not seen else output)
            return seen[-1]

        with ExitStack() as hooks, torch.enable_grad():
            for norm in norms:
                hooks.enter_context(_removed(norm.register_forward_hook(keep)))
            last = collect_activations(model, ids, states=[len(transformer.h)]).states[len(transformer.h)]
            targets = F.pad(ids[:, 1:], (0, 1), value=IGNORED).flatten()
            loss, _ = prediction_loss(last.flatten(0, 1), head, targets, None, PredictionObjective(0.0, 1.0))
            for output, gradient in zip(seen, torch.autograd.grad(loss, seen), strict=True):
                # The loss is a mean over the batch: weight it by the batch's size.
                scores -= len(ids) * (output.detach() * gradient).sum((0, 1))
        if stage is not None:
            stage.advance(ids.numel())
    return scores


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


def _tap(
    model: GPT2LMHeadModel, ids: Int[Tensor, "B T"], inputs: dict[nn.Module, Callable[[Tensor], object]]
) -> Float[Tensor, "B T D"]:
    """Run the transformer once, pass the input of each given module to its function, and return the last state."""
    with ExitStack() as hooks:
        for module, see in inputs.items():
            hooks.enter_context(_removed(module.register_forward_pre_hook(lambda _, x, see=see: _shown(see, x[0]))))
        layers = len(model.transformer.h)
        return collect_activations(model, ids, states=[layers]).states[layers]


def _shown(see: Callable[[Tensor], object], x: Tensor) -> None:
    see(x)  # return nothing, because a hook's return value would replace the module's input


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
