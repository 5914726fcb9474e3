"""`bench`: how fast models decode, exported ones too, beside `transformers` and the memory's bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinygpt2.config.decoding import BenchConfig
from tinygpt2.decoding.speed import BenchRow, Job, Setting, bench_prompts, best_seconds, library_job, speeds
from tinygpt2.exporting.outputs import exported_format, require_engine
from tinygpt2.exporting.reading import engine_of, read_exported
from tinygpt2.models.loading import load_causal_lm
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.bandwidth import memory_bandwidth
from tinygpt2.runtime.devices import computes_on_device, current_device
from tinygpt2.utils.files import absolute
from tinygpt2.utils.progress import say


@dataclass(frozen=True)
class BenchResult:
    """The speed of every model in every setting.

    Attributes:
        bandwidth: bytes a second that the device reads from its memory.
    """

    results: list[BenchRow]
    bandwidth: float


@computes_on_device
def bench(config: BenchConfig) -> BenchResult:
    """Measure how fast models decode greedily, in turns with `transformers`.

    Exported models (a GGUF file, or the folder of an export to ONNX) are decoded by their own engine, on the CPU.

    Args:
        config: models, and how much is measured.

    Raises:
        ConfigError: a model has fewer than two positions, or the engine of an exported one is not installed.
        ModelError: a model was not found, cannot be read, or cannot be decoded.
    """
    bandwidth = memory_bandwidth()
    return BenchResult([row for name in config.model for row in _rows(name, config, bandwidth)], bandwidth)


def _rows(name: str, config: BenchConfig, bandwidth: float) -> Iterator[BenchRow]:
    to = exported_format(Path(name))
    if to is not None:
        say(f"measuring {name}")
        yield exported_speed(Path(name), to, config, bandwidth)
        return
    model, _ = load_causal_lm(name, allow_pickle=config.allow_pickle)
    say(f"measuring {name}")
    yield from speeds(name, model.to(current_device()), config, bandwidth)


def exported_speed(path: Path, to: Literal["gguf", "onnx"], config: BenchConfig, bandwidth: float) -> BenchRow:
    """Return the speed of an exported model, decoded by its own engine, one text at a time.

    Args:
        path: see `exported_format`.
        bandwidth: bytes a second that the machine reads from its memory.

    Raises:
        ConfigError: the engine is not installed, or the model has fewer than two positions.
        ModelError: the file cannot be read, or the engine cannot load it.
    """
    require_engine(to)
    found = read_exported(path)
    engine = engine_of(to, found.file, found.model)
    prompts, count = bench_prompts(str(path), found.model, config, 1)
    prompt: list[int] = prompts[0].tolist()
    first: list[float] = []
    rates: list[float] = []
    jobs: dict[Setting, Job] = {
        (engine.name, 1, 1): lambda: first.append(engine.greedy(prompt, 1)[1]),
        (engine.name, 1, count): lambda: rates.append(engine.greedy(prompt, count)[1]),
        ("transformers", 1): library_job(found.model, prompts, count),
    }
    seconds = best_seconds(jobs, config.turns, 2.0 * count_parameters(found.model))
    engine.close()
    rate = max(rates)
    return BenchRow(
        absolute(str(path)), found.type, 1, seconds[engine.name, 1, 1], rate, found.bytes,
        found.bytes * rate / bandwidth, count / seconds["transformers", 1], engine.name,
    )  # fmt: skip
