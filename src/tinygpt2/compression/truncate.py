"""A student cut from a teacher: chosen blocks, heads, inner units, dimensions and positions, weights copied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel

from tinygpt2.compression.importance import (
    Batches,
    DepthImportance,
    active_dimensions,
    depth_importance,
    important_dimensions,
    mean_loss,
    sample,
    width_importance,
)
from tinygpt2.compression.least_squares import refit
from tinygpt2.config.models import Position, Strategy, TruncateStudentConfig
from tinygpt2.data.dataset import Packed, load_packed
from tinygpt2.data.tokenizer import fingerprint
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.evaluation.conventions import check_fits
from tinygpt2.evaluation.scoring import exponential
from tinygpt2.models.loading import count_parameters, default_device, load_model, model_tokenizer, save_model
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.training.metrics import figure_of, model_card, save_figure
from tinygpt2.utils.files import require_free

PICTURE = "importance.png"


@dataclass(frozen=True)
class Perplexity:
    """Held-out perplexity per token right after the cut, and the teacher's, on the same `sequences` blocks."""

    student: float
    teacher: float
    sequences: int


@dataclass(frozen=True)
class TruncateStudentResult:
    """What was cut.

    Attributes:
        layers: the teacher's blocks that were kept, counted from 0.
        importance: what --strategy importance measured; None without it.
        perplexity: None without --data.
    """

    model: str
    layers: list[int]
    parameters: int
    teacher_parameters: int
    importance: DepthImportance | None = None
    perplexity: Perplexity | None = None


@dataclass(frozen=True)
class Kept:
    """Which parts of a teacher a student is made of.

    Attributes:
        layers: blocks, rising.
        dimensions: of the residual stream, the same everywhere, rising.
        heads, inner: for each kept block its heads and inner units, rising.
        positions: how many, and how they are taken.
    """

    layers: list[int]
    dimensions: Int[Tensor, " Ds"]
    heads: list[Int[Tensor, " Hs"]]
    inner: list[Int[Tensor, " Fs"]]
    positions: tuple[int, Position]


def choose_layers(total: int, keep: int, strategy: Strategy) -> list[int]:
    """Return which of `total` blocks to keep, counted from 0.

    `uniform` keeps both ends, evenly spaced. `alternate` takes floor(i * total / keep): 0,2,4,6,8,10 of 12, as Li et
    al. 2021, arXiv:2110.08460. `distilgpt2` takes that for the lower half and its mirror image for the upper:
    0,2,4,7,9,11 of 12, as Hugging Face's DistilGPT2. `first`, `middle` and `last` are blocks in a row.

    Raises:
        ConfigError: more layers than there are.
        ValueError: `importance`, which has to be measured.
    """
    if keep > total:
        raise ConfigError(f"--num-layers {keep}: the teacher has only {total}")
    alternate = [i * total // keep for i in range(keep)]
    if strategy == "alternate":
        return alternate
    if strategy == "distilgpt2":
        lower = alternate[: (keep + 1) // 2]
        return lower + [total - 1 - layer for layer in reversed(alternate[: keep // 2])]
    if strategy == "uniform":
        return [round(i * (total - 1) / (keep - 1)) for i in range(keep)] if keep > 1 else [0]
    starts = {"first": 0, "middle": (total - keep) // 2, "last": total - keep}
    if strategy not in starts:
        raise ValueError(f"{strategy} is measured, see calibration.depth_importance")
    return list(range(starts[strategy], starts[strategy] + keep))


def cut(teacher: GPT2LMHeadModel, kept: Kept) -> GPT2LMHeadModel:
    """Return a new model of a teacher's parts, all weights copied, in evaluation mode."""
    config, width = teacher.config, len(kept.dimensions)
    head_width = config.n_embd // config.n_head
    inner = len(kept.inner[0])
    same_ratio = config.n_inner is None and inner == 4 * width
    sizes = {
        "n_layer": len(kept.layers), "n_embd": width, "n_head": len(kept.heads[0]), "n_positions": kept.positions[0],
        "n_inner": None if same_ratio else inner,
    }  # fmt: skip
    student = GPT2LMHeadModel(config.__class__.from_dict({**config.to_dict(), **sizes}))
    dims, weights = kept.dimensions, {}
    for name, tensor in teacher.state_dict().items():
        if ".h." not in name:
            weights[name] = _positions(tensor, *kept.positions) if name.endswith("wpe.weight") else tensor
            weights[name] = weights[name][..., dims]
    for new, (layer, heads, units) in enumerate(zip(kept.layers, kept.heads, kept.inner, strict=True)):
        columns = (heads[:, None] * head_width + torch.arange(head_width)).flatten()
        fused = torch.cat([columns + part * config.n_embd for part in range(3)])  # queries, keys, values
        for name, tensor in teacher.transformer.h[layer].state_dict().items():
            part = _part(name, tensor, dims, columns, fused, units)
            if config.scale_attn_by_inverse_layer_idx and name.startswith("attn.c_attn."):
                scale = torch.ones(len(fused))  # the queries', because the block's number has changed
                scale[: len(columns)] = (new + 1) / (layer + 1)
                part = part * scale
            weights[f"transformer.h.{new}.{name}"] = part
    student.load_state_dict(weights)
    return student.eval()


def _part(
    name: str, tensor: Tensor, dims: Int[Tensor, " Ds"], heads: Tensor, fused: Tensor, units: Int[Tensor, " Fs"]
) -> Tensor:
    """Return the kept rows and columns of one of a block's tensors; Conv1D's matrices are (in, out)."""
    inputs = {
        "attn.c_attn.weight": dims,
        "attn.c_proj.weight": heads,
        "mlp.c_fc.weight": dims,
        "mlp.c_proj.weight": units,
    }
    outputs = {"attn.c_attn": fused, "mlp.c_fc": units}
    if name in inputs:
        tensor = tensor[inputs[name]]
    return tensor[..., outputs.get(name.rsplit(".", 1)[0], dims)]


def _positions(table: Float[Tensor, "P D"], count: int, how: Position) -> Float[Tensor, "Ps D"]:
    """Return fewer position embeddings: the first ones, or as many evenly between the first and the last."""
    if how == "first" or count == len(table):
        return table[:count]
    return F.interpolate(table.T[None], size=count, mode="linear", align_corners=True)[0].T


def sizes_of(config: TruncateStudentConfig, teacher: Any) -> tuple[int, int, int]:
    """Return the student's width, heads and inner units.

    Args:
        teacher: its configuration.

    Raises:
        ConfigError: wider than the teacher, or heads that would not stay whole.
    """
    head_width = teacher.n_embd // teacher.n_head
    heads = config.n_head or (config.n_embd or teacher.n_embd) // head_width
    width = config.n_embd or heads * head_width
    if width != heads * head_width or not 0 < heads <= teacher.n_head:
        pairs = ", ".join(f"{count * head_width}/{count}" for count in range(1, teacher.n_head + 1))
        raise ConfigError(
            f"--n-embd {width} with --n-head {heads}: the teacher's heads are {head_width} wide and are kept whole",
            f"valid pairs of width and heads: {pairs}",
        )
    whole = teacher.n_inner or 4 * teacher.n_embd
    inner = config.n_inner or max(1, whole * width // teacher.n_embd)
    if inner > whole:
        raise ConfigError(f"--n-inner {inner}: the teacher has only {whole}")
    return width, heads, inner


@fast_products()
def truncate_student(config: TruncateStudentConfig) -> TruncateStudentResult:
    """Cut a student's starting weights from a teacher and save them as a plain GPT-2 with its tokenizer.

    Raises:
        ConfigError: parts that do not exist or do not fit, or an output directory that is not empty.
        DataError: the calibration data is missing or another tokenizer's.
        ModelError: the teacher cannot be loaded.
    """
    out = Path(config.out)
    require_free(out, "give another --out")
    teacher, directory = load_model(config.teacher, "teacher", allow_pickle=config.allow_pickle)
    tokenizer = model_tokenizer(directory)
    sizes_of(config, teacher.config)  # before anything is measured
    _check_depth(config, teacher.config.n_layer)
    positions = _position_count(config, teacher.config.n_positions)
    data = None
    if config.data is not None:
        data = load_packed(config.data)
        check_fits(data, teacher.config, tokenizer and fingerprint(tokenizer), f"teacher {config.teacher}")
    batches: Batches = []
    if data is not None and config.measures:
        if not len(data.train):
            raise DataError(f"the training split of {config.data} is empty: there is nothing to measure on")
        teacher.to(default_device())
        batches = sample(data.train, config.calibration_sequences, teacher.lm_head.weight.device)
    kept, importance = _choose(config, teacher, batches, positions)
    student = cut(teacher.cpu(), kept)
    if config.refit:
        device = default_device()
        short = [ids[:, : positions[0]] for ids in batches]
        refit(student.to(device), teacher.to(device), kept.layers, kept.dimensions.to(device), short)
    perplexity = None if data is None else _perplexity(student, teacher, data, config.calibration_sequences)
    result = TruncateStudentResult(
        str(out.resolve()), kept.layers, count_parameters(student), count_parameters(teacher), importance, perplexity
    )
    save_model(student.cpu(), out, tokenizer, _card(config, kept, result), run=config.to_yaml())
    if importance is not None:
        _plot(importance, out / PICTURE)
    return result


def _check_depth(config: TruncateStudentConfig, total: int) -> None:
    """Check the layers asked for.

    Raises:
        ConfigError: a block that does not exist, a repeated one, or an order that is not the teacher's.
    """
    if config.num_layers is not None and config.num_layers > total:
        raise ConfigError(f"--num-layers {config.num_layers}: the teacher has only {total}")
    if config.layers is None:
        return
    layers = [int(number) for number in config.layers.split(",")]
    if bad := [layer for layer in layers if layer >= total]:
        raise ConfigError(f"--layers: block {bad[0]} does not exist, the teacher has blocks 0 to {total - 1}")
    if sorted(set(layers)) != layers:
        raise ConfigError(f"--layers {config.layers}: blocks must rise, without repetition")


def _position_count(config: TruncateStudentConfig, total: int) -> tuple[int, Position]:
    if (config.n_positions or 0) > total:
        raise ConfigError(f"--n-positions {config.n_positions}: the teacher has only {total}")
    return config.n_positions or total, config.position or "first"


def _choose(
    config: TruncateStudentConfig, teacher: GPT2LMHeadModel, batches: Batches, positions: tuple[int, Position]
) -> tuple[Kept, DepthImportance | None]:
    """Return the parts to keep; what is not measured is chosen by rule."""
    total, importance = teacher.config.n_layer, None
    if config.layers is not None:
        layers = [int(number) for number in config.layers.split(",")]
    elif config.strategy == "importance":
        importance = depth_importance(teacher, batches, config.num_layers or total)
        layers = importance.kept
    else:
        layers = choose_layers(total, config.num_layers or total, config.strategy or "uniform")
    width, heads, inner = sizes_of(config, teacher.config)
    if not config.cuts_width:
        whole = [torch.arange(size) for size in (width, heads, inner)]
        return Kept(layers, whole[0], [whole[1]] * len(layers), [whole[2]] * len(layers), positions), importance
    found = width_importance(teacher, batches)
    dimensions = torch.arange(width)
    if width < teacher.config.n_embd:
        dimensions = (active_dimensions if config.refit else important_dimensions)(teacher, batches, width)
    return Kept(
        layers, dimensions, [_top(found.heads[layer], heads) for layer in layers],
        [_top(found.inner[layer], inner) for layer in layers], positions,
    ), importance  # fmt: skip


def _top(scores: Float[Tensor, " N"], count: int) -> Int[Tensor, " n"]:
    """Return the indices of the largest scores, rising."""
    return scores.topk(count).indices.sort().values.cpu()


def _perplexity(student: GPT2LMHeadModel, teacher: GPT2LMHeadModel, data: Packed, count: int) -> Perplexity | None:
    """Measure both models on blocks of the test split, as long as the student's positions."""
    if not len(data.test):
        return None
    device = default_device()
    batches = [ids[:, : student.config.n_positions] for ids in sample(data.test, count, device)]
    student, teacher = student.to(device), teacher.to(device)
    after, before = (exponential(mean_loss(model, batches)) for model in (student, teacher))
    return Perplexity(after, before, sum(len(ids) for ids in batches))


def _card(config: TruncateStudentConfig, kept: Kept, result: TruncateStudentResult) -> str:
    figures = {"parameters": f"{result.parameters:,}", "teacher's parameters": f"{result.teacher_parameters:,}"}
    figures |= dict(_reasons(config, kept, result))
    if (found := result.perplexity) is not None:
        figures["perplexity before any training"] = f"{found.student:,.2f} (teacher {found.teacher:,.2f})"
        figures["measured on"] = f"{found.sequences} blocks of the test split of {config.data}"
    how = (
        f"A GPT-2 of {len(kept.layers)} layers of {len(kept.dimensions)}, cut from {config.teacher} and not trained "
        f"since: its blocks {', '.join(map(str, kept.layers))}, weights copied"
        + (", output projections fitted again." if config.refit else ".")
    )
    return model_card(Path(config.out).name, how, figures, f"truncate-student {config.flags()}")


def _reasons(config: TruncateStudentConfig, kept: Kept, result: TruncateStudentResult) -> Iterator[tuple[str, str]]:
    """Yield what was kept, and why."""
    why = "as asked for" if config.layers is not None else f"strategy {config.strategy or 'uniform'}"
    if result.importance is not None:
        removed = ", ".join(f"{one.removed} (+{one.costs[one.removed]:.4f})" for one in result.importance.rounds)
        why += f": removed in this order, loss in nats per token: {removed}"
    yield "blocks kept, from 0", f"{', '.join(map(str, kept.layers))} ({why})"
    if config.cuts_width:
        yield (
            "width, heads, inner units",
            (
                f"{len(kept.dimensions)}, {len(kept.heads[0])}, {len(kept.inner[0])}: "
                f"those that matter most on up to {config.calibration_sequences} blocks of {config.data}"
            ),
        )
        yield "dimensions kept", ", ".join(map(str, kept.dimensions.tolist()))
        for new, heads in enumerate(kept.heads):
            yield f"heads kept in block {new}", ", ".join(map(str, heads.tolist()))
    if config.n_positions is not None:
        yield "positions", f"{kept.positions[0]} ({kept.positions[1]})"


def _plot(importance: DepthImportance, path: Path) -> None:
    """Draw what removing each block costs, round by round, and block influence."""
    figure, axes = figure_of(2)
    for number, one in enumerate(importance.rounds, 1):
        axes[0].plot(list(one.costs), list(one.costs.values()), marker=".", label=f"round {number}: {one.removed} goes")
    axes[0].set(xlabel="block", ylabel="loss without it - with it (nats per token)", yscale="symlog")
    if importance.rounds:
        axes[0].legend(fontsize=7)
    axes[1].bar(range(len(importance.influence)), importance.influence)
    axes[1].set(xlabel="block", ylabel="block influence, 1 - cos(input, output)")
    save_figure(figure, path)
