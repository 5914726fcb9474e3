"""`generate`: text from one or several models, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GPT2LMHeadModel, TextStreamer

from tinygpt2.config.decoding import GenerateConfig
from tinygpt2.data.encoding import encode
from tinygpt2.errors import ConfigError
from tinygpt2.models.compatibility import require_tokenizer
from tinygpt2.models.loading import load_model, model_tokenizer
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.runtime.devices import default_device
from tinygpt2.utils.files import absolute, read_text

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

DEFAULT_NEW_TOKENS = 100


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt by a model.

    Attributes:
        text: the text that the model added to the prompt.
        tokens: the number of tokens of `text`.
        seconds: time of generation, divided by the number of samples of the prompt.
    """

    model: str
    prompt: str
    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class GenerateResult:
    """The texts of every model for every prompt, prompt by prompt."""

    results: list[Generation]


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model with its tokenizer."""

    name: str
    model: GPT2LMHeadModel
    tokenizer: Tokenizer


OnText = Callable[[LoadedModel, str], TextStreamer | None]
"""Called with the model and the prompt before a text is generated. It may return a streamer for the text's tokens."""


def load_with_tokenizer(name: str, *, allow_pickle: bool = False) -> LoadedModel:
    """Load a model and its tokenizer.

    Raises:
        ModelError: the model or its tokenizer was not found, or they do not fit each other.
    """
    model, directory = load_model(name, allow_pickle=allow_pickle)
    tokenizer = require_tokenizer(model_tokenizer(directory), model.config, name)
    model.generation_config = GenerationConfig()  # do not use the directory's generation_config.json
    return LoadedModel(name, model.to(default_device()), tokenizer)


def continue_prompt(
    loaded: LoadedModel, prompt: str, config: GenerateConfig, streamer: Any = None
) -> Iterator[Generation]:
    """Yield `config.num_samples` continuations of a prompt. The same seed gives the same texts.

    Raises:
        ConfigError: the prompt and the new tokens together exceed the model's positions.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = encode(tokenizer, [prompt])[0] or _start(model, tokenizer)
    room = model.config.n_positions - len(ids)
    count = config.max_new_tokens or min(DEFAULT_NEW_TOKENS, room)
    if room < 1 or count > room:
        raise ConfigError(
            f"{loaded.name} has {model.config.n_positions} positions: "
            f"{len(ids)} prompt tokens leave no room for {max(count, 1)} more",
            "shorten the prompt" if room < 1 else f"use --max-new-tokens {room} or fewer",
        )
    torch.manual_seed(config.seed)
    started = time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids], device=model.device),
            generation_config=_decoding(config, model, tokenizer, count),
            streamer=streamer,
        )
    seconds = (time.perf_counter() - started) / len(out)
    for row in out.tolist():
        added = row[len(ids) :]
        if tokenizer.eos_token_id in added:
            added = added[: added.index(tokenizer.eos_token_id)]
        text = tokenizer.decode(added, clean_up_tokenization_spaces=False)
        yield Generation(absolute(loaded.name), prompt, text, len(added), seconds)


def _start(model: GPT2LMHeadModel, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of an empty prompt: the token that separates documents."""
    start = next(
        (i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id) if i is not None),
        None,
    )
    if start is None:
        raise ConfigError("an empty prompt needs a tokenizer with a start or end-of-text token", "give --prompt")
    return [start]


def _decoding(config: GenerateConfig, model: GPT2LMHeadModel, tokenizer: Tokenizer, count: int) -> GenerationConfig:
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else model.config.eos_token_id
    sampling: dict[str, Any] = {"do_sample": False}
    if config.samples:
        # 0 keeps the whole vocabulary; without top_k, transformers would keep only the 50 likeliest tokens
        sampling = {
            "do_sample": True,
            "temperature": config.temperature or 1.0,
            "top_k": config.top_k or 0,
            "top_p": config.top_p or 1.0,
        }
    return GenerationConfig(
        max_new_tokens=count,
        num_beams=config.num_beams,
        num_return_sequences=config.num_samples,
        eos_token_id=eos,
        pad_token_id=eos,
        **sampling,
    )


def read_prompts(config: GenerateConfig) -> list[str]:
    """Return the prompts of --prompt or --prompt-file, or one empty prompt.

    Raises:
        DataError: the prompt file is missing or not UTF-8.
    """
    if config.prompt_file is None:
        return config.prompt or [""]
    return [read_text(Path(config.prompt_file))]


@fast_products()
def generate(config: GenerateConfig, on_text: OnText = lambda loaded, prompt: None) -> GenerateResult:
    """Continue every prompt with every model.

    Args:
        config: models, prompts and decoding.
        on_text: called before each text; see `OnText`.

    Raises:
        ConfigError: a prompt does not fit the model, or --interactive is set, which only the command line supports.
        DataError: the prompt file cannot be read.
        ModelError: a model or its tokenizer was not found.
    """
    if config.interactive:
        raise ConfigError("--interactive works only on the command line")
    prompts = read_prompts(config)
    models = [load_with_tokenizer(name, allow_pickle=config.allow_pickle) for name in config.model]
    texts = [
        text
        for prompt in prompts
        for loaded in models
        for text in continue_prompt(loaded, prompt, config, on_text(loaded, prompt))
    ]
    return GenerateResult(texts)
