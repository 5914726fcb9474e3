"""`generate`: text from one or several models, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from tinygpt2.config.decoding import GenerateConfig
from tinygpt2.data.tokenizer import fingerprint
from tinygpt2.decoding.drafts import Drafting, decode_with_draft
from tinygpt2.decoding.library import Decoder, best_beams, make_decoder
from tinygpt2.decoding.loop import decode
from tinygpt2.decoding.prompts import Continuation, LiveText, prompt_tokens, require_utf8
from tinygpt2.decoding.sampling import Sampling
from tinygpt2.decoding.text_statistics import TextStatistics, Written, text_statistics
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.models.compatibility import first_token, require_tokenizer, text_sizes
from tinygpt2.models.loading import load_causal_lm, model_tokenizer
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.devices import computes_on_device, current_device
from tinygpt2.runtime.threads import enough_threads, tell_machine
from tinygpt2.utils.files import absolute, read_text
from tinygpt2.utils.progress import say

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

DEFAULT_NEW_TOKENS = 100


@dataclass(frozen=True)
class DraftFigures:
    """What a draft model was worth.

    Attributes:
        acceptance: the share of its tokens that the teacher accepted; None if it proposed none.
        speedup: the time that the teacher alone would have taken, divided by the time taken. The first is that of
            reading the prompt, and for each token the median time of some single steps at the end of the text.
    """

    acceptance: float | None
    speedup: float


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
class ModelStatistics:
    """How varied, repetitive and long the texts of a model are."""

    model: str
    statistics: TextStatistics


@dataclass(frozen=True)
class GenerateResult:
    """The texts of every model for every prompt, prompt by prompt.

    Attributes:
        draft: figures of --draft over all texts; None without it.
        statistics: of the texts of each model; None without --stats.
    """

    results: list[Generation]
    draft: DraftFigures | None = None
    statistics: list[ModelStatistics] | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model with its tokenizer.

    Attributes:
        decoder: reads its tokens; see `make_decoder`.
        draft: the decoder of the model that drafts for it, if there is one.
        drafting: what drafting each text took, so far.
        written: the texts so far.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    decoder: Decoder
    draft: Decoder | None
    drafting: list[Drafting]
    written: list[Written]


OnText = Callable[[LoadedModel, str], Callable[[str], None] | None]
"""Called with the model and the prompt before a text is generated.

It may return a function that shows the text while it is generated: it is called with one piece of the text after
another, and with a line end after the last.
"""


def load_models(config: GenerateConfig) -> list[LoadedModel]:
    """Load every model of a configuration, each once, with its tokenizer, and the model that drafts for them.

    Raises:
        ConfigError: a model cannot have such weights here.
        ModelError: a model or its tokenizer was not found, they do not fit each other, a weight is not finite, or the
            draft model has another tokenizer.
    """
    draft = _load(config.draft, config) if config.draft is not None else None
    models = []
    for name in dict.fromkeys(config.model):
        model, tokenizer, decoder = _load(name, config)
        if draft is not None:
            _check_draft((config.draft or "", draft[0], draft[1]), (name, model, tokenizer))
        models.append(LoadedModel(name, model, tokenizer, decoder, draft and draft[2], [], []))
    tell_machine(current_device(), config.weights)
    return models


def _load(name: str, config: GenerateConfig) -> tuple[PreTrainedModel, Tokenizer, Decoder]:
    model, directory = load_causal_lm(name, allow_pickle=config.allow_pickle)
    tokenizer = require_tokenizer(model_tokenizer(directory), text_sizes(model), name)
    model.generation_config = GenerationConfig()  # do not use the directory's generation_config.json
    model.to(current_device())
    return model, tokenizer, make_decoder(model, config.weights, copies=True, name=name)


def _check_draft(
    draft: tuple[str, PreTrainedModel, Tokenizer], teacher: tuple[str, PreTrainedModel, Tokenizer]
) -> None:
    """Check that a model can draft for another one.

    Raises:
        ModelError: their tokens differ.
    """
    same = fingerprint(draft[2]) == fingerprint(teacher[2])
    if not same or text_sizes(draft[1]).vocab_size != text_sizes(teacher[1]).vocab_size:
        how = "another vocabulary size" if same else "another tokenizer"
        raise ModelError(
            f"--draft {draft[0]} has {how} than {teacher[0]}",
            "a student that was distilled from the model has the same",
        )


def continue_prompt(
    loaded: LoadedModel, prompt: str, config: GenerateConfig, show: Callable[[str], None] | None = None
) -> Iterator[Generation]:
    """Yield `config.num_samples` continuations of a prompt.

    The same seed gives the same texts. On a CPU, without a draft, they are also those that `transformers` samples after
    torch.manual_seed with that seed.

    Args:
        show: shows the text while it is generated; see `OnText`.

    Raises:
        ConfigError: the prompt is not valid UTF-8, has a token that the model does not know, or exceeds the model's
            positions together with the new tokens.
        ModelError: the model's logits are NaN or infinite.
    """
    ids = _prompt_ids(loaded, prompt)
    room = loaded.decoder.positions - len(ids)
    count = config.max_new_tokens or min(DEFAULT_NEW_TOKENS, room)
    if room < 1 or count > room:
        raise ConfigError(
            f"{loaded.name} has {loaded.decoder.positions} positions: "
            f"{len(ids)} prompt tokens leave no room for {max(count, 1)} more",
            "shorten the prompt" if room < 1 else f"use --max-new-tokens {room} or fewer",
        )
    ends = text_ends(loaded.model, loaded.tokenizer)
    continuation = Continuation(loaded.tokenizer, ids, ends)
    live = LiveText(continuation, show) if show else None
    rows = (config.draft_tokens + 1) if loaded.draft is not None else config.num_samples * config.num_beams
    started = time.perf_counter()
    with enough_threads(2 * count_parameters(loaded.model) * rows):
        texts = _new_tokens(loaded, ids, count, ends, config, live)
    seconds = (time.perf_counter() - started) / len(texts)
    if live is not None:
        live.end()
    for row in texts:
        added = continuation.until_end(row)
        loaded.written.append(Written(added, len(added) < len(row)))
        yield Generation(absolute(loaded.name), prompt, continuation.text(added), len(added), seconds)


def _new_tokens(
    loaded: LoadedModel, ids: list[int], count: int, ends: list[int], config: GenerateConfig, live: LiveText | None
) -> list[list[int]]:
    """Return the tokens that follow a prompt, in each of the texts that the configuration asks for."""
    if config.num_beams > 1:
        return best_beams(
            loaded.model, ids, max_new_tokens=count, beams=config.num_beams, ends=ends, count=config.num_samples,
            name=loaded.name,
        )  # fmt: skip
    sampling = Sampling(config.temperature or 1.0, config.top_k or 0, config.top_p or 1.0) if config.samples else None
    how: dict[str, Any] = {
        "max_new_tokens": count, "ends": ends, "sampling": sampling, "name": loaded.name,
        "generator": torch.Generator(loaded.decoder.device).manual_seed(config.seed),
        "on_tokens": live.add if live is not None else None,
    }  # fmt: skip
    if loaded.draft is None:
        out = decode(loaded.decoder, torch.tensor([ids] * config.num_samples), **how)
        return [row[:length] for row, length in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)]
    texts = []
    for _ in range(config.num_samples):
        out, drafting = decode_with_draft(loaded.decoder, loaded.draft, ids, ahead=config.draft_tokens, **how)
        loaded.drafting.append(drafting)
        texts += out.tokens.tolist()
    return texts


def draft_figures(models: list[LoadedModel]) -> DraftFigures | None:
    """Return what the draft model was worth in all texts so far; None if there is none."""
    texts = [drafting for loaded in models for drafting in loaded.drafting]
    if not texts:
        return None
    proposed = sum(text.proposed for text in texts)
    return DraftFigures(
        sum(text.accepted for text in texts) / proposed if proposed else None,
        sum(text.alone_seconds for text in texts) / sum(text.seconds for text in texts),
    )


def _prompt_ids(loaded: LoadedModel, prompt: str) -> list[int]:
    """Return the token ids of a prompt; those of an empty one are the token that separates documents."""
    config, tokenizer, sizes = loaded.model.config, loaded.tokenizer, text_sizes(loaded.model)
    ids = prompt_tokens(tokenizer, prompt)
    if not ids:
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, config.bos_token_id)
        start = first_token([*candidates, config.eos_token_id], sizes)
        if start is None:
            what = "an empty prompt" if not prompt else "the prompt has no tokens: it"
            raise ConfigError(f"{what} needs a start or end-of-text token that {loaded.name} knows", "give a --prompt")
        return [start]
    unknown = next((index for index in ids if index >= sizes.vocab_size), None)
    if unknown is not None:
        raise ConfigError(
            f"model {loaded.name} has {sizes.vocab_size} tokens, so it does not know the prompt's token "
            f"{tokenizer.convert_ids_to_tokens(unknown)!r} (id {unknown})",
            "leave it out of the prompt; if the tokenizer adds it, use the tokenizer that the model was trained with",
        )
    return ids


def text_ends(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end a text: the tokenizer's or, if the model does not have it, those of config.json."""
    sizes = text_sizes(model)
    end = first_token([tokenizer.eos_token_id], sizes)
    named = model.config.eos_token_id
    every = [end] if end is not None else named if isinstance(named, list) else [named]
    return [one for one in every if first_token([one], sizes) is not None]


def read_prompts(config: GenerateConfig) -> list[str]:
    """Return the prompts of --prompt or --prompt-file, or one empty prompt.

    Raises:
        DataError: the prompt file is missing or not UTF-8.
    """
    if config.prompt_file is None:
        return config.prompt or [""]
    return [read_text(Path(config.prompt_file))]


@computes_on_device
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
    loaded_once = load_models(config)
    models = [next(one for one in loaded_once if one.name == name) for name in config.model]
    texts = []
    for prompt in prompts:
        for loaded in models:
            for text in continue_prompt(loaded, prompt, config, on_text(loaded, prompt)):
                texts.append(text)
                on_end(text)
    statistics = None
    if config.stats:
        statistics = [ModelStatistics(absolute(one.name), text_statistics(one.written)) for one in loaded_once]
    return GenerateResult(texts, draft_figures(loaded_once), statistics)
