"""A byte-level BPE as the vocabulary of a GGUF file, which llama.cpp encodes in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinygpt2.data.encoding import is_plain_bpe, missing_bytes, parsed
from tinygpt2.errors import ModelError, listed
from tinygpt2.utils.progress import say

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""The kinds of tokens: of the BPE, special, added (found inside any text), and rows without a token."""

_OTHER_WAY = "export it to onnx or safetensors, which keep its tokenizer.json"


@dataclass(frozen=True)
class GgufVocabulary:
    """The vocabulary of a GGUF file.

    Attributes:
        tokens: the token of each row of the model.
        kinds: the kind of each token.
        merges: the merges, as two tokens with a space between them, in order.
        starts: whether every prompt begins with the start token.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    starts: bool


def gguf_vocabulary(tokenizer: Tokenizer, rows: int, ends: tuple[int | None, int | None]) -> GgufVocabulary:
    """Return a tokenizer as the vocabulary of a GGUF file.

    Args:
        rows: the size of the model's vocabulary; rows without a token become unused tokens.
        ends: the tokens that start and end a text.

    Raises:
        ModelError: llama.cpp cannot encode as this tokenizer does.
    """
    backend = parsed(tokenizer.backend_tokenizer.to_str())
    if (reason := _foreign(backend)) is not None:
        raise ModelError(f"the tokenizer cannot be written into a GGUF file: {reason}", _OTHER_WAY)
    start, end = ends
    if end is None:
        raise ModelError(
            "the model names no end-of-text token, and a GGUF file has to: llama.cpp would end texts at token 11",
            "set eos_token_id in config.json",
        )
    model, added = backend["model"], backend["added_tokens"]
    known = {index: token for token, index in model["vocab"].items()}
    kinds = dict.fromkeys(known, NORMAL)
    for token in added:
        known[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    kinds[end] = CONTROL
    stripping = [token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if stripping:
        say(f"llama.cpp does not strip the space around added tokens, or ask for a whole word: {listed(stripping)}")
    return GgufVocabulary(
        tokens=[known.get(row, f"[PAD{row}]") for row in range(rows)],
        kinds=[kinds.get(row, UNUSED) for row in range(rows)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        starts=_first_of_nothing(tokenizer, start),
    )


def _foreign(backend: dict[str, object]) -> str | None:
    """Return why llama.cpp does not encode as a tokenizer does; None if it does."""
    model, pre = backend["model"], backend["pre_tokenizer"] or {}
    assert isinstance(model, dict)
    assert isinstance(pre, dict)
    if not is_plain_bpe(model):
        return f"it is no plain BPE, but {model['type']}"
    if backend["normalizer"]:
        return "it has a normalizer"
    if pre.get("type") != "ByteLevel" or pre.get("add_prefix_space") or not pre.get("use_regex", True):
        return "its pre-tokenizer is not GPT-2's"
    if missing := missing_bytes(model["vocab"].__contains__):
        return f"it has no tokens for {len(missing)} bytes"
    return None


def _first_of_nothing(tokenizer: Tokenizer, start: int | None) -> bool:
    """Return whether the tokenizer puts the start token, and nothing else, around a text."""
    template = [int(index) for index in tokenizer("")["input_ids"]]
    if template in ([], [start]):
        return bool(template)
    raise ModelError(
        f"the tokenizer cannot be written into a GGUF file: it puts the tokens {template} around a text", _OTHER_WAY
    )
