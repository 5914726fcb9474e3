"""Models of other architectures, and beam search: decoded by `transformers`."""

from __future__ import annotations

import inspect
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2LMHeadModel, PreTrainedModel

from tinygpt2.decoding.gpt2 import GPT2Decoder
from tinygpt2.decoding.products import Weights
from tinygpt2.errors import ConfigError, ModelError


class Kept(Protocol):
    """What a decoder keeps of the texts that it read."""

    length: int
    """The number of tokens that were read. To forget the last ones, set a smaller number."""


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
        self.positions = int(getattr(model.config, "max_position_embeddings", None) or 2**31)
        self.vocabulary = int(model.config.vocab_size)
        self.device: torch.device = model.device
        embeddings = model.get_input_embeddings().weight
        tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embeddings
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
    """The library's cache of keys and values; see `Cache`."""

    def __init__(self, model: PreTrainedModel, pads: Tensor | None) -> None:
        self.kept, self.pads = DynamicCache(config=model.config), pads

    @property
    def length(self) -> int:
        """The number of tokens that were read. To forget the last ones, set a smaller number."""
        return int(self.kept.get_seq_length())

    @length.setter
    def length(self, value: int) -> None:
        self.kept.crop(value)


Decoder = GPT2Decoder | LibraryDecoder


def make_decoder(
    model: PreTrainedModel, weights: Weights = "fp32", *, copy_head: bool = False, name: str = "model"
) -> Decoder:
    """Return what decodes a model: our own loop for GPT-2, else the model's own forward pass.

    Args:
        model: in memory, on any device. With fp32 weights nothing is copied, unless `copy_head` is set.
        weights: the format of the matrices; int8 needs a CPU, and both other formats need a GPT-2.
        copy_head: copy the output matrix into the layout that is faster for few rows.
        name: what error messages call it.

    Raises:
        ConfigError: the format is not possible here.
        ModelError: the model cannot be decoded.
    """
    if weights == "int8" and model.device.type != "cpu":
        raise ConfigError(f"--weights int8 needs a CPU, but {name} is on {model.device.type}", "use --weights bf16")
    if isinstance(model, GPT2LMHeadModel):
        return GPT2Decoder(model, weights, copy_head=copy_head)
    if weights != "fp32":
        raise ConfigError(f"--weights {weights} is for GPT-2, and {name} is a {type(model).__name__}")
    return LibraryDecoder(model, name)
