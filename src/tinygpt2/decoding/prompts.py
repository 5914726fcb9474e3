"""From a prompt to tokens, and from the tokens that follow it to text: at once, or the same text while it grows."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from tinygpt2.data.encoding import parsed, token_bytes
from tinygpt2.errors import ConfigError, ModelError, one_line

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

_REWRITING = re.compile("WordPiece|CTC|ByteFallback")  # decoders that may change earlier text when more follows
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # the token of a byte in vocabularies that fall back to bytes


def require_utf8(prompt: str) -> None:
    """Check that a prompt is valid text.

    Raises:
        ConfigError: the prompt was not UTF-8 on the command line.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt is not valid UTF-8 at character {error.start}: {prompt[error.start : error.end]!a}",
            "use --prompt-file with a UTF-8 file",
        ) from error


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the token ids of a prompt, as `transformers` reads it.

    Special tokens in it are interpreted, and the tokenizer's template (such as a start token) is applied.

    Raises:
        ConfigError: the prompt is not valid UTF-8.
        ModelError: the tokenizer has no token for a part of the prompt.
    """
    require_utf8(prompt)
    try:
        return [int(index) for index in tokenizer(prompt, verbose=False)["input_ids"]]
    except Exception as error:  # `tokenizers` raises plain exceptions, such as for a vocabulary without unknown token
        raise ModelError(f"the tokenizer cannot encode the prompt: {one_line(error, 200)}") from error


class Continuation:
    """The text of tokens that follow a prompt.

    Prompt and continuation are decoded together, and the prompt's text is cut off: decoded alone, a continuation would
    lose the space at its beginning, or gain one. Special tokens are left out, and so is an incomplete last character.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the token ids of the prompt.
        ends: the token ids that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], ends: Sequence[int]) -> None:
        decoder = parsed(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
        self._byte_level = decoder.get("type") == "ByteLevel"
        self.grows = not _REWRITING.search(json.dumps(decoder))
        self._tokenizer, self._prompt, self._ends = tokenizer, prompt, set(ends)
        self._known = self._decoded([])

    def until_end(self, added: list[int]) -> list[int]:
        """Return the tokens before the first one that ends a text."""
        end = next((at for at, token in enumerate(added) if token in self._ends), len(added))
        return added[:end]

    def text(self, added: list[int]) -> str:
        """Return the text of the tokens after the prompt."""
        incomplete = self._incomplete(added)
        # In a byte-level vocabulary, a token may hold more than the beginning of the last character
        whole = self._decoded(added if self._byte_level or not incomplete else added[:-incomplete])
        whole = whole[:-1] if self._byte_level and incomplete else whole
        same = next((at for at, (a, b) in enumerate(zip(self._known, whole, strict=False)) if a != b), None)
        return whole[min(len(self._known), len(whole)) if same is None else same :]

    def _incomplete(self, added: list[int]) -> int:
        """Return the number of bytes at the end of some tokens that begin a character without completing it."""
        named = self._tokenizer.convert_ids_to_tokens(added, skip_special_tokens=True)
        tokens = [token for token in named if token is not None][-3:]  # a row of the model may have no token
        if self._byte_level:
            raw = b"".join(map(token_bytes, tokens))
        else:
            raw = b"".join(bytes.fromhex(found[1]) if (found := _BYTE.fullmatch(token)) else b" " for token in tokens)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(raw)
        return len(decoder.getstate()[0])

    def _decoded(self, added: list[int]) -> str:
        ids = [*self._prompt, *added]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class LiveText:
    """Shows the text of a continuation while it is generated, piece by piece, and a line end after it.

    The text is that of `Continuation`. If more tokens may change earlier text (WordPiece), it is shown at the end.
    """

    def __init__(self, continuation: Continuation, show: Callable[[str], None]) -> None:
        self._continuation, self._show = continuation, show
        self._added: list[int] = []
        self._shown = ""

    def add(self, tokens: Iterable[int]) -> None:
        """Take the next tokens."""
        self._added += tokens
        if self._continuation.grows:
            self._advance()

    def end(self) -> None:
        """Show the rest."""
        self._advance()
        self._show("\n")

    def _advance(self) -> None:
        text = self._continuation.text(self._continuation.until_end(self._added))
        if len(text) > len(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text
