"""`bench`: how fast models decode, beside `transformers` and the machine's memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, GPT2LMHeadModel, PreTrainedModel

from tinygpt2.config.decoding import BenchConfig, DecodingWeights
from tinygpt2.decoding.library import Decoder, make_decoder
from tinygpt2.decoding.loop import decode
from tinygpt2.errors import ConfigError
from tinygpt2.models.compatibility import text_sizes
from tinygpt2.models.loading import load_causal_lm
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.bandwidth import memory_bandwidth
from tinygpt2.runtime.devices import computes_on_device, current_device
from tinygpt2.runtime.threads import enough_threads
from tinygpt2.utils.files import absolute
from tinygpt2.utils.progress import say

SETTINGS: list[tuple[DecodingWeights, int]] = [
    ("fp32", 1), ("fp32", 8), ("bf16", 1), ("bf16", 8), ("int8", 1), ("int8", 8),
]  # fmt: skip
"""Formats of the weights and numbers of texts side by side that are measured."""


@dataclass(frozen=True)
class BenchRow:
    """The speed of a model in one setting.

    Attributes:
        precision: format of the weights.
        batch: number of texts that are decoded side by side.
        first_token_seconds: time for reading the prompts and choosing the first token of each.
        tokens_per_second: tokens of all texts together, divided by the whole time.
        bytes_per_token: what is read from memory for one token of each text: all matrices, but no keys and values.
        bandwidth_share: the rate at which these bytes are read, divided by the memory bandwidth. It can be more than 1
            if the model fits into the CPU's cache.
        transformers_tokens_per_second: the same by `transformers`' generate with float32 weights and as many texts.
    """

    model: str
    precision: str
    batch: int
    first_token_seconds: float
    tokens_per_second: float
    bytes_per_token: int
    bandwidth_share: float
    transformers_tokens_per_second: float


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

    Args:
        config: models, and how much is measured.

    Raises:
        ConfigError: a model has fewer than two positions.
        ModelError: a model was not found or cannot be decoded.
    """
    bandwidth = memory_bandwidth()
    rows: list[BenchRow] = []
    for name in config.model:
        model, _ = load_causal_lm(name, allow_pickle=config.allow_pickle)
        say(f"measuring {name}")
        rows += _rows(name, model.to(current_device()), config, bandwidth)
    return BenchResult(rows, bandwidth)


def _rows(name: str, model: PreTrainedModel, config: BenchConfig, bandwidth: float) -> Iterator[BenchRow]:
    sizes = text_sizes(model)
    if sizes.n_positions < 2:
        raise ConfigError(f"{name} has only {sizes.n_positions} position, so it decodes nothing")
    width = min(config.prompt_tokens, sizes.n_positions - 1)
    count = min(config.new_tokens, sizes.n_positions - width)
    seeded = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, sizes.vocab_size, (max(batch for _, batch in SETTINGS), width), generator=seeded)
    prompts = prompts.to(model.device)
    settings = [one for one in SETTINGS if _possible(one[0], model)]
    decoders = {weights: make_decoder(model, weights, copy_head=True, name=name) for weights, _ in settings}
    jobs: dict[object, Callable[[], None]] = {}
    for weights, batch in settings:
        for length in (1, count):
            jobs[weights, batch, length] = _own(decoders[weights], prompts[:batch], length, name)
        jobs["transformers", batch] = _librarys(model, prompts[:batch], count)
    work = 2.0 * count_parameters(model)
    seconds = dict.fromkeys(jobs, float("inf"))
    for turn in range(config.turns + 1):  # the first turn warms up
        for key, job in jobs.items():
            with enough_threads(work * (key[1] if isinstance(key, tuple) else 1)):
                started = time.perf_counter()
                job()
                took = time.perf_counter() - started
            seconds[key] = min(seconds[key], took) if turn else seconds[key]
    for weights, batch in settings:
        taken, read = seconds[weights, batch, count], decoders[weights].bytes_per_token
        yield BenchRow(
            absolute(name), weights, batch, seconds[weights, batch, 1], batch * count / taken, read,
            read * count / taken / bandwidth, batch * count / seconds["transformers", batch],
        )  # fmt: skip


def _possible(weights: DecodingWeights, model: PreTrainedModel) -> bool:
    """Return whether a model can have such weights here."""
    return weights == "fp32" or (
        isinstance(model, GPT2LMHeadModel) and (weights != "int8" or model.device.type == "cpu")
    )


def _own(decoder: Decoder, prompts: torch.Tensor, count: int, name: str) -> Callable[[], None]:
    return lambda: _wait_for(decode(decoder, prompts, max_new_tokens=count, name=name).tokens)


def _librarys(model: PreTrainedModel, prompts: torch.Tensor, count: int) -> Callable[[], None]:
    how = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(prompts)

    def job() -> None:
        with torch.no_grad():
            _wait_for(model.generate(prompts, attention_mask=mask, generation_config=how))

    return job


def _wait_for(tokens: torch.Tensor) -> None:
    """Wait until tokens are computed."""
    tokens[0, -1].item()
