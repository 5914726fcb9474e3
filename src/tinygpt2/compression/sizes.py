"""Which sizes a student of a teacher can have, from the teacher's configuration alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinygpt2.config.compression import Position, Target, TruncateStudentConfig
from tinygpt2.errors import ConfigError

TOLERANCE = 0.02  # a student is at most this share smaller than its target, and never larger
_WIDTHS = 16  # hidden sizes to look at, up to the teacher's
_MULTIPLES = (32, 16, 8, 4, 2)  # of inner units, in this order; blocks of 32 fit every number format of an export


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2, by the names of its configuration; `n_inner` counts the inner units of each MLP."""

    n_layer: int
    n_embd: int
    n_head: int
    n_inner: int


@dataclass(frozen=True)
class Space:
    """The students that the search for a target looks at.

    They have up to as many layers as the teacher, a hidden size in 16 steps up to the teacher's, all of the teacher's
    heads or as many of the old width as fill the hidden size, and at least half as many inner units as dimensions.

    Attributes:
        teacher: its sizes.
        vocab_size, n_positions: of the student.
        tied: whether the student's output matrix is its embedding.
        fewer_tokens: whether the student has fewer tokens than the teacher, so that nothing else needs to be cut.
    """

    teacher: Shape
    vocab_size: int
    n_positions: int
    tied: bool
    fewer_tokens: bool = False

    def embeddings(self, width: int) -> int:
        """Return the number of weights of the embeddings and the output matrix."""
        return width * (self.vocab_size * (1 if self.tied else 2) + self.n_positions)

    def parameters(self, shape: Shape) -> int:
        """Return the number of parameters of a student."""
        width, inner = shape.n_embd, shape.n_inner
        block = 4 * width * width + 2 * width * inner + inner + 9 * width  # matrices, biases and two norms
        return self.embeddings(width) + shape.n_layer * block + 2 * width

    def bytes(self, shape: Shape) -> int:
        """Return the size of model.safetensors with float32 weights; the file can be a few bytes smaller.

        The file begins with the length of a header (8 bytes) and the header itself: JSON with the name, the type, the
        shape and the place of each tensor, filled up to a multiple of 8.
        """
        weights = 4 * self.parameters(shape)
        place = [weights, weights]  # no number has more digits
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, size in self._tensors(shape):
            header[name] = {"dtype": "F32", "shape": size, "data_offsets": place}
        return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8 + weights

    def _tensors(self, shape: Shape) -> Iterator[tuple[str, list[int]]]:
        """Yield the names and shapes of the tensors that are stored."""
        width, inner = shape.n_embd, shape.n_inner
        yield "transformer.wte.weight", [self.vocab_size, width]
        yield "transformer.wpe.weight", [self.n_positions, width]
        if not self.tied:
            yield "lm_head.weight", [self.vocab_size, width]
        products = {
            "attn.c_attn": [width, 3 * width], "attn.c_proj": [width, width], "mlp.c_fc": [width, inner],
            "mlp.c_proj": [inner, width],
        }  # fmt: skip
        blocks = [f"transformer.h.{layer}" for layer in range(shape.n_layer)]
        for norm in ["transformer.ln_f", *(f"{block}.{name}" for block in blocks for name in ("ln_1", "ln_2"))]:
            yield from ((f"{norm}.{kind}", [width]) for kind in ("weight", "bias"))
        for block in blocks:
            for name, size in products.items():
                yield f"{block}.{name}.weight", size
                yield f"{block}.{name}.bias", size[1:]

    def grid(self) -> Iterator[Shape]:
        """Yield every depth, width and number of heads, each with all of the teacher's inner units."""
        whole = self.teacher
        old = whole.n_embd // whole.n_head
        step = whole.n_head * max(1, round(old / _WIDTHS))
        widths = sorted({*range(step, whole.n_embd, step), whole.n_embd})
        for layers in range(1, whole.n_layer + 1):
            for width in widths:
                for heads in sorted({whole.n_head, width // old if width % old == 0 else whole.n_head}):
                    yield Shape(layers, width, heads, whole.n_inner)

    def smallest(self, cost: Callable[[Shape], float]) -> Shape:
        """Return the student that costs least."""
        return min((replace(shape, n_inner=_least_inner(shape)) for shape in self.grid()), key=cost)

    def fitting(self, cost: Callable[[Shape], float], limit: float) -> list[Shape]:
        """Return the students that cost at most `limit`, and at most 2 % less.

        Args:
            cost: of a student; it must grow with the inner units.
        """
        found = []
        for shape in self.grid():
            inner = _most_inner(shape, cost, limit)
            fits = replace(shape, n_inner=inner)
            if inner and (fits != self.teacher or self.fewer_tokens) and cost(fits) >= (1 - TOLERANCE) * limit:
                found.append(fits)
        return found


def _least_inner(shape: Shape) -> int:
    return max(1, min(shape.n_inner, shape.n_embd // 2))


def _most_inner(shape: Shape, cost: Callable[[Shape], float], limit: float) -> int:
    """Return the largest number of inner units with which a student costs at most `limit`; 0 if there is none.

    It is a multiple of 32 or of a smaller power of two if that is within the tolerance.
    """

    def with_units(units: int) -> float:
        return cost(replace(shape, n_inner=units))

    low, high = _least_inner(shape), shape.n_inner
    if with_units(low) > limit:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if with_units(middle) <= limit else (low, middle - 1)
    rounded = (low // multiple * multiple for multiple in _MULTIPLES)
    return next((units for units in rounded if units and with_units(units) >= (1 - TOLERANCE) * limit), low)


def spread(shapes: Sequence[Shape], most: int) -> list[Shape]:
    """Return at most about `most` of the shapes: evenly spaced depths, and of each depth evenly spaced shapes."""
    depths = sorted({shape.n_layer for shape in shapes})
    depths = _spaced(depths, max(1, most // 4))
    each = max(1, most // len(depths)) if depths else 0
    return [shape for depth in depths for shape in _spaced([shape for shape in shapes if shape.n_layer == depth], each)]


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[len(items) // 2]]
    return [items[round(number * (len(items) - 1) / (count - 1))] for number in range(count)]


def space_of(config: TruncateStudentConfig, teacher: Any) -> Space:
    """Return the students that the search looks at.

    Args:
        teacher: the teacher's configuration, or an object with the same sizes.
    """
    whole = Shape(teacher.n_layer, teacher.n_embd, teacher.n_head, teacher.n_inner or 4 * teacher.n_embd)
    tied = getattr(teacher, "tie_word_embeddings", True) and not config.untie_head
    size = config.vocab_size or teacher.vocab_size
    return Space(whole, size, config.n_positions or teacher.n_positions, tied, size < teacher.vocab_size)


def spaces_of(config: TruncateStudentConfig, teacher: Any) -> list[Space]:
    """Return the students that the search looks at, by their vocabulary, the largest one first; see `space_of`."""
    one = space_of(config, teacher)
    sizes = config.vocabularies or [one.vocab_size]
    return [replace(one, vocab_size=size, fewer_tokens=size < teacher.vocab_size) for size in sizes]


def shapes_by_vocabulary(target: Target, costs: Mapping[Space, Callable[[Shape], float]]) -> dict[Space, list[Shape]]:
    """Return the students within a target for each vocabulary that has some, from the largest vocabulary on.

    Raises:
        ConfigError: as `shapes_within`, if no vocabulary has any.
    """
    found, problems = {}, []
    for space, cost in costs.items():
        try:
            found[space] = shapes_within(target, space, cost)
        except ConfigError as problem:
            problems.append(problem)
    if not found:
        last, cost = list(costs.items())[-1]
        raise problems[-1 if cost(last.smallest(cost)) > target.limit else 0]
    return found


def shapes_within(target: Target, space: Space, cost: Callable[[Shape], float]) -> list[Shape]:
    """Return the students whose cost is within 2 % below the target.

    Raises:
        ConfigError: there is none; the message says what the smallest student costs, and what the teacher does.
    """
    smallest, teacher = space.smallest(cost), cost(space.teacher)
    if (least := cost(smallest)) > target.limit:
        whole = space.embeddings(smallest.n_embd)
        part = f", {whole:,} of them in the embeddings" if target.measure == "parameters" else ""
        raise ConfigError(
            f"{target.option} is too small: the smallest student of this teacher has {said(target, least)}{part}",
            f"that is 1 layer with a hidden size of {smallest.n_embd}; a smaller vocabulary makes smaller students",
        )
    if target.limit >= teacher and not (space.fewer_tokens and teacher >= (1 - TOLERANCE) * target.limit):
        raise ConfigError(
            f"{target.option} is not smaller than the teacher, which has {said(target, teacher)}",
            "give a smaller target",
        )
    if found := space.fitting(cost, target.limit):
        return found
    ends = (replace(one, n_inner=inner) for one in space.grid() for inner in (_least_inner(one), one.n_inner))
    near = max((one for one in map(cost, ends) if one <= target.limit), default=least)
    raise ConfigError(
        f"{target.option}: no student has between {1 - TOLERANCE:.0%} and 100 % of it", f"one has {said(target, near)}"
    )


def said(target: Target, cost: float) -> str:
    """Return a cost in the unit of a target."""
    if target.measure == "bytes":
        return f"{cost / 1e6:,.4g} MB"
    return f"{cost:,.3g} milliseconds" if target.measure == "milliseconds" else f"{cost:,.0f} parameters"


def check_sizes(config: TruncateStudentConfig, teacher: Any) -> None:
    """Check the layers, the width, the positions and the vocabulary that the options ask for.

    Args:
        teacher: the teacher's configuration, or an object with the same sizes.

    Raises:
        ConfigError: the teacher has no such parts, or they do not fit together, or an option has no effect.
    """
    sizes_of(config, teacher)
    if config.untie_head and not getattr(teacher, "tie_word_embeddings", True):
        raise ConfigError("--untie-head has no effect: the teacher has an output matrix of its own already")
    most = max([config.vocab_size or 0, *config.vocabularies])
    if most > teacher.vocab_size:
        name = "--vocab-sizes" if config.vocabularies else "--vocab-size"
        raise ConfigError(f"{name} {most}: the teacher has only {teacher.vocab_size} tokens")
    target = config.target
    if target is not None and target.measure != "milliseconds":
        shapes_by_vocabulary(target, {space: getattr(space, target.measure) for space in spaces_of(config, teacher)})
    _check_depth(config, teacher.n_layer)
    position_count(config, teacher.n_positions)


def sizes_of(config: TruncateStudentConfig, teacher: Any) -> tuple[int, int, int]:
    """Return the student's width, heads and inner units.

    Args:
        teacher: the teacher's configuration.

    Raises:
        ConfigError: the student would be wider than the teacher, or have more heads, or its heads do not divide its
            width.
    """
    head_width = teacher.n_embd // teacher.n_head
    if (config.n_head or 0) > teacher.n_head:
        raise ConfigError(f"--n-head {config.n_head}: the teacher has only {teacher.n_head} heads")
    width = config.n_embd or (config.n_head or teacher.n_head) * head_width
    if width > teacher.n_embd:
        raise ConfigError(f"--n-embd {width}: the teacher's hidden size is only {teacher.n_embd}")
    possible = [count for count in range(1, teacher.n_head + 1) if width % count == 0]
    heads = config.n_head or max(possible)  # narrower heads lose less than fewer heads: see docs/students.md
    if heads not in possible:
        raise ConfigError(
            f"--n-embd {width} with --n-head {heads}: the heads share the hidden size equally",
            f"for --n-embd {width}, --n-head can be {', '.join(map(str, possible))}",
        )
    whole = teacher.n_inner or 4 * teacher.n_embd
    inner = config.n_inner or max(1, whole * width // teacher.n_embd)
    if inner > whole:
        raise ConfigError(f"--n-inner {inner}: the teacher has only {whole} inner units")
    return width, heads, inner


def _check_depth(config: TruncateStudentConfig, total: int) -> None:
    """Check the layers that the options ask for.

    Raises:
        ConfigError: a layer does not exist, is repeated, or is not in ascending order.
    """
    if config.num_layers is not None and config.num_layers > total:
        raise ConfigError(f"--num-layers {config.num_layers}: the teacher has only {total} layers")
    if config.layers is None:
        return
    layers = [int(number) for number in config.layers.split(",")]
    if bad := [layer for layer in layers if layer >= total]:
        raise ConfigError(f"--layers: layer {bad[0]} does not exist, the teacher has layers 0 to {total - 1}")
    if sorted(set(layers)) != layers:
        raise ConfigError(f"--layers {config.layers}: list the layers in ascending order, each of them once")


def position_count(config: TruncateStudentConfig, total: int) -> tuple[int, Position]:
    """Return how many positions the student has, and how they are chosen.

    Raises:
        ConfigError: the teacher has fewer.
    """
    if (config.n_positions or 0) > total:
        raise ConfigError(f"--n-positions {config.n_positions}: the teacher has only {total} positions")
    return config.n_positions or total, config.position or "first"
