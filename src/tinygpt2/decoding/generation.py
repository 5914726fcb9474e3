"""`generate`: text from one or several models, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from tinygpt2.config.decoding import GenerateConfig
from tinygpt2.decoding.prompts import Continuation, LiveText, prompt_tokens, require_finite_logits, require_utf8
from tinygpt2.errors import ConfigError
from tinygpt2.models.compatibility import first_token, require_tokenizer, text_sizes
from tinygpt2.models.loading import load_causal_lm, model_tokenizer
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.runtime.devices import computes_on_device, current_device
from tinygpt2.runtime.threads import enough_threads, tell_machine
from tinygpt2.utils.files import absolute, read_text
from tinygpt2.utils.progress import say

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

DEFAULT_NEW_TOKENS = 100


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt by a model.

    Attributes:
        text: the text that the model added to the prompt, without special tokens.
        tokens: the number of tokens that the model added.
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
    """A loaded model of any architecture, with its tokenizer and its sizes: see `text_sizes`."""

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    sizes: Any


OnText = Callable[[LoadedModel, str], Callable[[str], None] | None]
"""Called with the model and the prompt before a text is generated.

It may return a function that shows the text while it is generated: it is called with one piece of the text after
another, and with a line end after the last.
"""


def load_with_tokenizer(name: str, *, allow_pickle: bool = False) -> LoadedModel:
    """Load a model and its tokenizer.

    Raises:
        ModelError: the model or its tokenizer was not found, they do not fit each other, or a weight is not finite.
    """
    model, directory = load_causal_lm(name, allow_pickle=allow_pickle)
    sizes = text_sizes(model)
    tokenizer = require_tokenizer(model_tokenizer(directory), sizes, name)
    model.generation_config = GenerationConfig()  # do not use the directory's generation_config.json
    tell_machine(current_device(), "fp32")
    on_device: Any = model.to(current_device())
    return LoadedModel(name, on_device, tokenizer, sizes)


def continue_prompt(
    loaded: LoadedModel, prompt: str, config: GenerateConfig, show: Callable[[str], None] | None = None
) -> Iterator[Generation]:
    """Yield `config.num_samples` continuations of a prompt. The same seed gives the same texts.

    Args:
        show: shows the text while it is generated; see `OnText`.

    Raises:
        ConfigError: the prompt is not valid UTF-8, has a token that the model does not know, or exceeds the model's
            positions together with the new tokens.
        ModelError: the model's logits are NaN or infinite.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = _prompt_ids(loaded, prompt)
    room = loaded.sizes.n_positions - len(ids)
    count = config.max_new_tokens or min(DEFAULT_NEW_TOKENS, room)
    if room < 1 or count > room:
        raise ConfigError(
            f"{loaded.name} has {loaded.sizes.n_positions} positions: "
            f"{len(ids)} prompt tokens leave no room for {max(count, 1)} more",
            "shorten the prompt" if room < 1 else f"use --max-new-tokens {room} or fewer",
        )
    ends = _ends(loaded)
    continuation = Continuation(tokenizer, ids, ends)
    torch.manual_seed(config.seed)
    started = time.perf_counter()
    prompts = torch.tensor([ids], device=model.device)
    rows = config.num_samples * config.num_beams
    with torch.no_grad(), enough_threads(2 * count_parameters(model) * rows):
        out: Any = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=_decoding(config, ends, count),
            logits_processor=LogitsProcessorList([require_finite_logits(loaded.name)]),
            streamer=LiveText(continuation, show) if show else None,
        )
    seconds = (time.perf_counter() - started) / len(out)
    for row in out.tolist():
        added = continuation.until_end(row[len(ids) :])
        yield Generation(absolute(loaded.name), prompt, continuation.text(added), len(added), seconds)


def _prompt_ids(loaded: LoadedModel, prompt: str) -> list[int]:
    """Return the token ids of a prompt; those of an empty one are the token that separates documents."""
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = prompt_tokens(tokenizer, prompt)
    if not ids:
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id)
        start = first_token([*candidates, model.config.eos_token_id], loaded.sizes)
        if start is None:
            what = "an empty prompt" if not prompt else "the prompt has no tokens: it"
            raise ConfigError(f"{what} needs a start or end-of-text token that {loaded.name} knows", "give a --prompt")
        return [start]
    unknown = next((index for index in ids if index >= loaded.sizes.vocab_size), None)
    if unknown is not None:
        raise ConfigError(
            f"model {loaded.name} has {loaded.sizes.vocab_size} tokens, so it does not know the prompt's token "
            f"{tokenizer.convert_ids_to_tokens(unknown)!r} (id {unknown})",
            "leave it out of the prompt; if the tokenizer adds it, use the tokenizer that the model was trained with",
        )
    return ids


def _ends(loaded: LoadedModel) -> list[int]:
    """Return the tokens that end a text: the tokenizer's or, if the model does not have it, those of config.json."""
    end = first_token([loaded.tokenizer.eos_token_id], loaded.sizes)
    named = loaded.model.config.eos_token_id
    every = [end] if end is not None else named if isinstance(named, list) else [named]
    return [one for one in every if first_token([one], loaded.sizes) is not None]


def _decoding(config: GenerateConfig, ends: list[int], count: int) -> GenerationConfig:
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
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # without an end, all texts have the same length: nothing is padded
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


@computes_on_device
@fast_products()
def generate(
    config: GenerateConfig,
    on_text: OnText = lambda loaded, prompt: None,
    on_end: Callable[[Generation], None] = lambda text: None,
) -> GenerateResult:
    """Continue every prompt with every model.

    Args:
        config: models, prompts and decoding.
        on_text: called before each text; see `OnText`.
        on_end: called with each text when it is complete.

    Raises:
        ConfigError: a prompt does not fit the model, or --interactive is set, which only the command line supports.
        DataError: the prompt file cannot be read.
        ModelError: a model or its tokenizer was not found, or its weights or logits are not finite.
    """
    if config.interactive:
        raise ConfigError("--interactive works only on the command line")
    if config.without_effect:
        say(f"{' and '.join(config.without_effect)} without effect: --temperature 0 is greedy")
    prompts = read_prompts(config)
    for prompt in prompts:
        require_utf8(prompt)
    models = [load_with_tokenizer(name, allow_pickle=config.allow_pickle) for name in config.model]
    texts = []
    for prompt in prompts:
        for loaded in models:
            for text in continue_prompt(loaded, prompt, config, on_text(loaded, prompt)):
                texts.append(text)
                on_end(text)
    return GenerateResult(texts)
