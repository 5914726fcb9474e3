"""How fast a model in memory decodes, in turns with `transformers`."""

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
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.threads import enough_threads
from tinygpt2.utils.files import absolute

SETTINGS: list[tuple[DecodingWeights, int]] = [
    ("fp32", 1), ("fp32", 8), ("bf16", 1), ("bf16", 8), ("int8", 1), ("int8", 8),
]  # fmt: skip
"""Formats of the weights and numbers of texts side by side that are measured."""

Setting = tuple[str, int] | tuple[str, int, int]
"""The format of the weights or the engine, the number of texts side by side, and the number of tokens."""

Job = Callable[[], None]


@dataclass(frozen=True)
class BenchRow:
    """The speed of a model in one setting.

    Attributes:
        precision: format of the weights.
        batch: number of texts that are decoded side by side.
        first_token_seconds: time for reading the prompts and choosing the first token of each.
        tokens_per_second: tokens of all texts together, divided by the whole time.
        bytes_per_token: what is read from memory for one token of each text: all matrices, but no keys and values. For
            an exported model, the size of its file.
        bandwidth_share: the rate at which these bytes are read, divided by the memory bandwidth. It can be more than 1
            if the model fits into the CPU's cache.
        transformers_tokens_per_second: the same by `transformers`' generate with float32 weights and as many texts.
        engine: what decoded: tinygpt2, or the engine of an exported model.
    """

    model: str
    precision: str
    batch: int
    first_token_seconds: float
    tokens_per_second: float
    bytes_per_token: int
    bandwidth_share: float
    transformers_tokens_per_second: float
    engine: str = "tinygpt2"


def speeds(name: str, model: PreTrainedModel, config: BenchConfig, bandwidth: float) -> Iterator[BenchRow]:
    """Yield the speed of a model in every setting that is possible here.

    Args:
        bandwidth: bytes a second that the device reads from its memory.

    Raises:
        ConfigError: the model has fewer than two positions.
        ModelError: it cannot be decoded.
    """
    prompts, count = bench_prompts(name, model, config, max(batch for _, batch in SETTINGS))
    settings = [one for one in SETTINGS if _possible(one[0], model)]
    decoders = {weights: make_decoder(model, weights, copies=True, name=name) for weights, _ in settings}
    jobs: dict[Setting, Job] = {}
    for weights, batch in settings:
        for length in (1, count):
            jobs[weights, batch, length] = own_job(decoders[weights], prompts[:batch], length, name)
        jobs["transformers", batch] = library_job(model, prompts[:batch], count)
    seconds = best_seconds(jobs, config.turns, 2.0 * count_parameters(model))
    for weights, batch in settings:
        taken, read = seconds[weights, batch, count], decoders[weights].bytes_per_token
        yield BenchRow(
            absolute(name), weights, batch, seconds[weights, batch, 1], batch * count / taken, read,
            read * count / taken / bandwidth, batch * count / seconds["transformers", batch],
        )  # fmt: skip


def bench_prompts(name: str, model: PreTrainedModel, config: BenchConfig, rows: int) -> tuple[torch.Tensor, int]:
    """Return random prompts (rows, T) on the model's device, and how many tokens are decoded after them.

    Raises:
        ConfigError: the model has fewer than two positions.
    """
    sizes = text_sizes(model)
    if sizes.n_positions < 2:
        raise ConfigError(f"{name} has only {sizes.n_positions} position, so it decodes nothing")
    width = min(config.prompt_tokens, sizes.n_positions - 1)
    prompts = torch.randint(0, sizes.vocab_size, (rows, width), generator=torch.Generator().manual_seed(0))
    return prompts.to(model.device), min(config.new_tokens, sizes.n_positions - width)


def best_seconds(jobs: dict[Setting, Job], turns: int, operations: float) -> dict[Setting, float]:
    """Run jobs in turns, and return the shortest time of each.

    Args:
        jobs: by their settings: the first two parts are a name and the number of texts side by side.
        operations: floating-point operations of a forward pass of one token; they decide how many threads compute.
    """
    seconds = dict.fromkeys(jobs, float("inf"))
    for turn in range(turns + 1):  # the first turn warms up
        for setting, job in jobs.items():
            with enough_threads(operations * setting[1]):
                started = time.perf_counter()
                job()
                took = time.perf_counter() - started
            seconds[setting] = min(seconds[setting], took) if turn else seconds[setting]
    return seconds


def _possible(weights: DecodingWeights, model: PreTrainedModel) -> bool:
    """Return whether a model can have such weights here."""
    return weights == "fp32" or (
        isinstance(model, GPT2LMHeadModel) and (weights != "int8" or model.device.type == "cpu")
    )


def own_job(decoder: Decoder, prompts: torch.Tensor, count: int, name: str) -> Job:
    """Return a function that decodes prompts (B, T) with a decoder, greedily."""
    return lambda: _wait_for(decode(decoder, prompts, max_new_tokens=count, name=name).tokens)


def library_job(model: PreTrainedModel, prompts: torch.Tensor, count: int) -> Job:
    """Return a function that decodes prompts (B, T) with `transformers`' generate, greedily."""
    how = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.generation_config = GenerationConfig()  # the model's own would fill in its end of text, and stop there
    mask = torch.ones_like(prompts)

    def job() -> None:
        with torch.no_grad():
            _wait_for(model.generate(prompts, attention_mask=mask, generation_config=how))

    return job


def _wait_for(tokens: torch.Tensor) -> None:
    """Wait until tokens are computed."""
    tokens[0, -1].item()
