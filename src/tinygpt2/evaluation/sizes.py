"""The sizes of a text in words, characters and bytes, also of a text that is stored as tokens; and its lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from tinygpt2.alignment.borders import spelled
from tinygpt2.data.encoding import token_bytes

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

_AT_ONCE = 1 << 16  # tokens that are decoded at a time


class TextSizes(NamedTuple):
    """Sizes of a text."""

    words: int
    characters: int
    bytes: int

    @classmethod
    def of(cls, pieces: Iterable[str]) -> TextSizes:
        """Return the sizes of the text that some pieces make together. A word may begin in one and end in another."""
        words = characters = size = 0
        inside = False  # whether the text so far ends inside a word
        for piece in pieces:
            if piece:
                words += len(piece.split()) - (inside and not piece[0].isspace())
                characters, size = characters + len(piece), size + len(piece.encode())
                inside = not piece[-1].isspace()
        return cls(words, characters, size)


def decoded(tokenizer: Tokenizer, tokens: Integer[np.ndarray, " N"], at_once: int = _AT_ONCE) -> Iterator[str]:
    """Yield the text of tokens, without special tokens, in pieces: together exactly what decoding all at once gives.

    Byte-level tokens are cut before a token that begins a character. Other decoders may join what they decode, so their
    tokens are decoded at once.
    """
    backend = tokenizer.backend_tokenizer
    if type(backend.decoder).__name__ != "ByteLevel":
        yield str(backend.decode(tokens.tolist(), skip_special_tokens=True))
        return
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    vocabulary = tokenizer.get_vocab()
    begins = np.zeros(max(vocabulary.values(), default=-1) + 1, bool)
    for token, at in vocabulary.items():
        begins[at] = token not in special and not 0x80 <= (token_bytes(token) or b"\x80")[0] < 0xC0
    start = 0
    while start < len(tokens):
        end = min(start + at_once, len(tokens))
        while end < len(tokens) and not (tokens[end] < len(begins) and begins[tokens[end]]):
            end += 1
        yield str(backend.decode(tokens[start:end].tolist(), skip_special_tokens=True))
        start = end


def line_bytes(texts: Iterable[str]) -> Int[np.ndarray, " L"]:
    """Return the bytes of each line of the text that some texts make together, with those of the line ends."""
    return np.array([len(line.encode()) + 1 for line in "".join(texts).split("\n")], dtype=np.int64)


def text_bytes(texts: Iterable[str]) -> Int[np.ndarray, " P"]:
    """Return the bytes of each text."""
    return np.array([len(text.encode()) for text in texts], dtype=np.int64)


def token_lines(tokenizer: Tokenizer, tokens: Integer[np.ndarray, " N"], count: int) -> Int[np.ndarray, " N1"] | None:
    """Return for each token of a text the number of the line in which it begins, and lastly that of the last line.

    Args:
        count: number of the text's lines.

    Returns:
        None if the tokens do not have all of them.
    """
    ends = np.array([piece.count(b"\n") for piece in spelled(tokenizer)[0]], dtype=np.int64)
    lines = np.concatenate([[0], ends[tokens].cumsum()])
    return lines if lines[-1] + 1 == count else None
