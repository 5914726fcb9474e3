"""The time that models of a shape take to decode a token: measured, and predicted for shapes that were not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.compression.sizes import Shape, Space
from tinygpt2.config.decoding import BenchConfig
from tinygpt2.decoding.library import make_decoder
from tinygpt2.decoding.speed import bench_prompts, best_seconds, own_job
from tinygpt2.models.loading import random_model
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.devices import current_device
from tinygpt2.utils.progress import follow


def token_milliseconds(model: GPT2LMHeadModel) -> float:
    """Return the time for each token that a model decodes greedily, one text at a time and with float32 weights.

    It is measured as by `bench`, and includes the prompt: the inverse of its tokens per second.
    """
    usual = BenchConfig(model=[])
    prompt, count = bench_prompts("student", model.to(current_device()), usual, 1)
    job = own_job(make_decoder(model, copies=True), prompt, count, "student")
    (seconds,) = best_seconds({("fp32", 1): job}, usual.turns, 2.0 * count_parameters(model)).values()
    return 1000 * seconds / count


def shape_milliseconds(config: GPT2Config) -> Callable[[Shape], float]:
    """Return a function that measures models of a shape, with random weights: the time does not depend on them.

    Args:
        config: of the teacher, with the number of positions of the students.
    """
    known: dict[Shape, float] = {}

    def measure(shape: Shape) -> float:
        if shape not in known:
            known[shape] = token_milliseconds(random_model(shaped(config, shape), 0).eval())
        return known[shape]

    return measure


def shaped(config: GPT2Config, shape: Shape) -> GPT2Config:
    """Return a configuration with other sizes."""
    sizes = {"n_layer": shape.n_layer, "n_embd": shape.n_embd, "n_head": shape.n_head, "n_inner": shape.n_inner}
    return GPT2Config.from_dict({**config.to_dict(), **sizes})


def predicted_milliseconds(space: Space, measure: Callable[[Shape], float]) -> Callable[[Shape], float]:
    """Measure some shapes, and return a function that predicts the time of any other.

    It is a fixed time, one for each layer, and one for each weight of the layers and of the output matrix; none of them
    is negative. So the time grows with every size.
    """
    shapes = list(dict.fromkeys(_corners(space)))
    times = [measure(shape) for shape in follow(shapes, "time some shapes", "shapes")]
    rows = torch.tensor([_features(space, shape) for shape in shapes], dtype=torch.float64)
    weights = _not_negative(rows, torch.tensor(times, dtype=torch.float64)).tolist()
    return lambda shape: float(sum(w * x for w, x in zip(weights, _features(space, shape), strict=True)))


def to_time(
    shape: Shape, measure: Callable[[Shape], float], predict: Callable[[Shape], float], limit: float
) -> Shape | None:
    """Change the inner units until the measured time meets a limit; None if it cannot."""
    for _ in range(3):
        ratio = measure(shape) / predict(shape)
        if measure(shape) <= limit:
            return shape
        shape = replace(shape, n_inner=max(1, int(shape.n_inner * 0.97 / ratio)))
    return shape if measure(shape) <= limit else None


def _corners(space: Space) -> Iterable[Shape]:
    """Yield shapes of few and many layers, dimensions and inner units."""
    whole, shapes = space.teacher, list(space.grid())
    widths = sorted({shape.n_embd for shape in shapes if shape.n_head == whole.n_head})
    for layers in sorted({1, (whole.n_layer + 1) // 2, whole.n_layer}):
        for width in sorted({widths[0], widths[len(widths) // 2], widths[-1]}):
            for inner in (max(1, min(width // 2, whole.n_inner)), whole.n_inner):
                yield Shape(layers, width, whole.n_head, inner)


def _features(space: Space, shape: Shape) -> list[float]:
    inside = shape.n_layer * shape.n_embd * (4 * shape.n_embd + 2 * shape.n_inner)
    return [1.0, float(shape.n_layer), inside / 1e6, space.vocab_size * shape.n_embd / 1e6]


def _not_negative(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Solve least squares, relative to the values, with solutions that are not negative."""
    kept = list(range(rows.shape[1]))
    while True:
        scaled = rows[:, kept] / values[:, None]
        found = torch.linalg.lstsq(scaled, torch.ones_like(values)[:, None]).solution[:, 0]
        if bool((found >= 0).all()):
            solution = torch.zeros(rows.shape[1], dtype=rows.dtype)
            solution[kept] = found
            return solution
        kept.pop(int(found.argmin()))
