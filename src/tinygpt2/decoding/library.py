"""Models of other architectures, and beam search: decoded by `transformers`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GPT2LMHeadModel, LogitsProcessorList, PreTrainedModel

from tinygpt2.config.decoding import DecodingWeights
from tinygpt2.decoding.gpt2 import GPT2Decoder
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.models.compatibility import positions_of


class Kept(Protocol):
    """What a decoder keeps of the texts that it read."""

    length: int
    """The number of tokens that were read. To forget the last ones, set a smaller number."""


class Decoder(Protocol):
    """Reads tokens and returns the logits of the next ones; see `GPT2Decoder` for its attributes and methods."""

    positions: int
    vocabulary: int
    device: torch.device
    bytes_per_token: int

    def cache(self, rows: int, columns: int, pads: Tensor | None = None) -> Kept:
        """Return an empty cache for `rows` texts of up to `columns` tokens each."""

    def read(self, cache: Any, tokens: Tensor, *, every: bool = False) -> Tensor:
        """Read the next tokens of each text, and return the logits of the tokens after them.

        Args:
            cache: from this decoder's `cache`.
        """


class LibraryDecoder:
    """A model of any architecture behind the interface of `GPT2Decoder`: its own forward pass, and the library's cache.

    Args:
        model: a causal language model that keeps keys and values in `past_key_values`.
        name: what error messages call it.

    Raises:
        ModelError: it does not.
    """

    def __init__(self, model: PreTrainedModel, name: str = "model") -> None:
        taken = inspect.signature(model.forward).parameters
        if "past_key_values" not in taken:
            raise ModelError(f"{name}: {type(model).__name__} keeps no keys and values, so it cannot be decoded here")
        self._model, self._places = model, "position_ids" in taken
        self.positions = positions_of(model.config.get_text_config()) or 2**31
        self.vocabulary = len(model.get_output_embeddings().weight)
        self.device: torch.device = model.device
        embeddings = model.get_input_embeddings().weight
        tied = model.get_output_embeddings().weight is embeddings
        total = sum(weight.nbytes for weight in model.parameters())
        self.bytes_per_token = total if tied else total - embeddings.nbytes

    def cache(self, rows: int, columns: int, pads: Tensor | None = None) -> LibraryCache:
        """See `GPT2Decoder.cache`."""
        return LibraryCache(self._model, pads)

    def read(self, cache: LibraryCache, tokens: Tensor, *, every: bool = False) -> Tensor:
        """See `GPT2Decoder.read`."""
        start, stop = cache.length, cache.length + tokens.shape[1]
        columns = torch.arange(stop, device=tokens.device).expand(len(tokens), -1)
        pads = 0 if cache.pads is None else cache.pads[:, None]
        given = {"position_ids": (columns - pads).clamp_min(0)[:, start:]} if self._places else {}
        mask = (columns >= pads).long()
        out = self._model(
            input_ids=tokens, attention_mask=mask, past_key_values=cache.kept, use_cache=True,
            logits_to_keep=0 if every else 1, **given,
        )  # fmt: skip
        logits: Tensor = out.logits
        return logits if every else logits[:, -1]


class LibraryCache:
    """The library's cache of keys and values; see `Cache`.

    It keeps those of all tokens, also of layers whose attention reaches only some tokens back: such layers' own kind of
    cache cannot forget the last tokens.
    """

    def __init__(self, model: PreTrainedModel, pads: Tensor | None) -> None:
        layers = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
        whole = layers <= {"full_attention", "sliding_attention", "chunked_attention"}
        self.kept, self.pads = DynamicCache() if whole else DynamicCache(config=model.config), pads

    @property
    def length(self) -> int:
        """The number of tokens that were read. To forget the last ones, set a smaller number."""
        return int(self.kept.get_seq_length())

    @length.setter
    def length(self, value: int) -> None:
        if value >= self.length:
            return
        try:
            self.kept.crop(value - self.length)  # negative: how many to remove
        except RuntimeError as error:
            raise ModelError(
                f"a layer of the model cannot forget tokens, which drafted ones may have to be: {error}",
                "leave --draft out",
            ) from error


def make_decoder(
    model: PreTrainedModel, weights: DecodingWeights = "fp32", *, copies: bool = False, name: str = "model"
) -> Decoder:
    """Return what decodes a model: our own loop for GPT-2, else the model's own forward pass.

    Args:
        model: in memory, on any device. With fp32 weights nothing is copied, unless `copies` is set.
        weights: the format of the matrices; int8 needs a CPU, and both other formats need a GPT-2.
        copies: with fp32 on a CPU, copy a GPT-2's matrices into the layouts that are faster for few rows.
        name: what error messages call it.

    Raises:
        ConfigError: the format is not possible here.
        ModelError: the model cannot be decoded.
    """
    if weights == "int8" and model.device.type != "cpu":
        raise ConfigError(f"--weights int8 needs a CPU, but {name} is on {model.device.type}", "use --weights bf16")
    if isinstance(model, GPT2LMHeadModel):
        return GPT2Decoder(model, weights, copies=copies)
    if weights != "fp32":
        raise ConfigError(f"--weights {weights} is for GPT-2, and {name} is a {type(model).__name__}")
    return LibraryDecoder(model, name)


def best_beams(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    beams: int,
    ends: Sequence[int],
    count: int,
    name: str,
) -> list[list[int]]:
    """Return the tokens that follow a prompt in the best `count` of some beams.

    Args:
        ends: the tokens that end a text; shorter texts are filled up with the first one.
        name: what error messages call the model.

    Raises:
        ModelError: the model's logits are NaN or infinite.
    """

    def check(input_ids: Tensor, scores: Tensor) -> Tensor:
        require_finite(scores, name)
        return scores

    given = torch.tensor([list(prompt)], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, num_beams=beams, num_return_sequences=count, do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,  # without an end, all texts have the same length: nothing is padded
    )  # fmt: skip
    with torch.no_grad():
        out: Any = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            generation_config=settings,
            logits_processor=LogitsProcessorList([check]),
        )
    return [row[len(prompt) :] for row in out.tolist()]


def require_finite(logits: Tensor, name: str) -> None:
    """Check logits, or the largest of each row, in which NaN is larger than any number.

    Raises:
        ModelError: they are NaN or infinite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"model {name}: its logits are NaN or infinite, although its weights are finite",
            "check the model with tinygpt2 verify",
        )
