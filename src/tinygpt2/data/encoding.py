"""Encode texts: exactly the tokens of the tokenizer, from the fastest library that returns the same tokens.

tiktoken encodes for every byte-level BPE that it provably reproduces, and `tokenizers` for all others. Special tokens
inside a text are never interpreted: `<|endoftext|>` in a web page is thirteen ordinary characters.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tinygpt2.errors import ModelError, one_line
from tinygpt2.utils.progress import detail
from tinygpt2.utils.types import Tokens

if TYPE_CHECKING:
    import tiktoken
    from tokenizers import Tokenizer as Backend

    from tinygpt2.utils.types import Tokenizer

Item = TypeVar("Item")
Made = TypeVar("Made")

# The characters that Unicode, tiktoken and `tokenizers` all treat as white space
_SPACE = np.zeros(0x3002, bool)
_SPACE[[*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]] = True

# GPT-2's pre-tokenizer looks ahead: it separates the last character of a run of white space before a word from the rest
# of the run. Looking ahead halves the speed. Therefore `_marked` puts a mark at this place, and this pattern, which
# does not look ahead, splits the marked text in the same way. The mark is U+FFFF, which is not a character.
_MARK = "\uffff"
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x{FFFF}]+|\s+|\x{FFFF}"

# A long text is cut before white space that follows anything else, as in data/corpus/text_splitting.py
_PART, _BORDER = 1 << 18, re.compile(r"\S(?=[ \n])")

# The letter that stands for each byte in a byte-level vocabulary (GPT-2, `bytes_to_unicode`), and the inverse
_SHOWN = {*range(33, 127), *range(161, 173), *range(174, 256)}
LETTERS = {byte: byte for byte in _SHOWN}
LETTERS |= {byte: 256 + index for index, byte in enumerate(sorted(set(range(256)) - _SHOWN))}
_BYTES = dict.fromkeys(range(256), 0x10FFFF) | {letter: byte for byte, letter in LETTERS.items()}

_NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that do not occur in UTF-8

# Parameters of a BPE that change its tokens. Without them, and with a token for every byte, it is plain.
_VARIANTS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")


class Encoder:
    """Encodes texts as a tokenizer does. It neither adds nor interprets special tokens, and is thread-safe.

    Attributes:
        reproduced: whether tiktoken encodes. A text may then be encoded in parts, if it is cut before white space that
            follows another character.
        dtype: uint16 if the vocabulary fits, otherwise int32.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._serialized = tokenizer.backend_tokenizer.to_str()
        ranks = reproduce(parsed(self._serialized))
        self._mark = 1 + max(ranks.values()) if ranks else 0
        self._fast = _engine(ranks, self._mark) if ranks else None
        self.reproduced = self._fast is not None
        engine = "tiktoken, which gives the same tokens" if self.reproduced else "tokenizers: tiktoken would differ"
        detail(f"texts are encoded by {engine}")
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.int32)

    @property
    def _backend(self) -> Backend:
        return _plain(self._serialized)

    def __call__(self, texts: list[str]) -> list[Tokens]:
        """Return the token ids of each text.

        Raises:
            ModelError: the tokenizer has no token for a part of a text.
        """
        if self._fast is None:
            return [np.array(ids, self.dtype) for ids in _ids(self._backend, texts)]
        return [self._encode(text) for text in texts]

    def whole(self, text: str) -> Tokens:
        """Return the token ids of one text of any length; it is encoded in parts if that gives the same tokens."""
        return np.concatenate(self(list(_parts(text)) if self.reproduced else [text]))

    def _encode(self, text: str) -> Tokens:
        assert self._fast is not None
        if _MARK in text:
            return np.array(_ids(self._backend, [text])[0], self.dtype)
        ids = self._fast.encode_to_numpy(_marked(text), disallowed_special=())
        tokens: Tokens = ids[ids != self._mark]
        return tokens.astype(self.dtype)


def _engine(ranks: dict[bytes, int], mark: int) -> tiktoken.Encoding:
    """Build the tiktoken encoding for marked texts."""
    import tiktoken

    # With a special token, tiktoken's search for special tokens is fast. None is ever allowed in a text.
    return tiktoken.Encoding(
        "marked",
        pat_str=_PATTERN,
        mergeable_ranks={**ranks, _MARK.encode(): mark},
        special_tokens={"<|endoftext|>": mark + 1},
    )


def _marked(text: str) -> str:
    """Put the mark before the last character of each run of two or more white-space characters that text follows."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    space = _SPACE[np.minimum(codes, len(_SPACE) - 1)]
    borders = np.flatnonzero(space[:-2] & space[1:-1] & ~space[2:]) + 1
    return np.insert(codes, borders, ord(_MARK)).tobytes().decode("utf-32-le")


def _parts(text: str) -> Iterator[str]:
    """Cut a text of a reproduced tokenizer into parts whose tokens, one after another, are those of the whole."""
    start = 0
    while border := _BORDER.search(text, start + _PART):
        yield text[start : border.end()]
        start = border.end()
    yield text[start:]


@lru_cache(maxsize=2)
def parsed(serialized: str) -> dict[str, Any]:
    """Return the content of a tokenizer.json. It is cached, so do not change it."""
    content: dict[str, Any] = json.loads(serialized)
    return content


@lru_cache(maxsize=4)
def _plain(serialized: str) -> Backend:
    """Build a fresh backend from a tokenizer.json. It treats special tokens inside a text as text."""
    from tokenizers import Tokenizer as Backend

    backend = without_dropout(Backend.from_str(serialized))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
    return backend


def without_dropout(backend: Backend) -> Backend:
    """Return a backend whose merges are never left out at random: the same text has the same tokens."""
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    return backend


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the token ids of a few texts. Special tokens are neither added nor interpreted.

    Raises:
        ModelError: the tokenizer has no token for a part of a text.
    """
    return _ids(_plain(tokenizer.backend_tokenizer.to_str()), texts)


def _ids(backend: Backend, texts: list[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # `tokenizers` raises plain exceptions, such as for a vocabulary without unknown token
        raise ModelError(f"the tokenizer cannot encode a text: {one_line(error, 200)}") from error


def is_plain_bpe(model: dict[str, Any]) -> bool:
    """Return whether a tokenizer's model, as in tokenizer.json, is a BPE that vocabulary and merges define alone."""
    return model["type"] == "BPE" and not any(model.get(key) for key in _VARIANTS)


def missing_bytes(is_token: Callable[[str], bool]) -> list[int]:
    """Return the bytes of UTF-8 that are not tokens of a byte-level vocabulary."""
    return [byte for byte, letter in sorted(LETTERS.items()) if byte not in _NEVER and not is_token(chr(letter))]


def token_bytes(token: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary. A token with another letter is its own text."""
    raw = token.translate(_BYTES)
    return raw.encode("latin-1") if max(raw, default="") < "\u0100" else token.encode()


def reproduce(backend: dict[str, Any]) -> dict[bytes, int] | None:
    """Return the ranks with which tiktoken encodes exactly like a byte-level BPE, or None if it does not.

    Both give the same tokens if three conditions hold:

    - The pre-tokenizer is GPT-2's, without normalizer and prefix space.
    - Every byte is a token.
    - For every merge, merging that token's bytes with lower ranks ends in exactly the listed pair.

    tiktoken merges the pair whose joined bytes have the lowest rank; `tokenizers` merges the pair that is listed first.
    If the third condition holds for the whole vocabulary, both choose the same pair in any text.

    Args:
        backend: the content of the tokenizer's tokenizer.json.
    """
    model, pre = backend["model"], backend["pre_tokenizer"] or {}
    gpt2 = pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space") and pre.get("use_regex", True)
    if not (is_plain_bpe(model) and gpt2) or backend["normalizer"]:
        return None
    special = {item["content"] for item in backend["added_tokens"]}
    if any(not item["special"] for item in backend["added_tokens"]):  # these are found inside any text
        return None
    vocabulary = {token: rank for token, rank in model["vocab"].items() if token not in special}
    try:
        raw = {token: token.translate(_BYTES).encode("latin-1") for token in vocabulary}
    except UnicodeEncodeError:
        return None
    ranks = {raw[token]: rank for token, rank in vocabulary.items()}
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    if len(ranks) != len(pairs) + 256 or any(bytes([byte]) not in ranks for byte in range(256)):
        return None
    last = -1
    for left, right in pairs:
        rank = vocabulary.get(left + right, -1)
        if rank <= last or left not in vocabulary or right not in vocabulary:
            return None
        token = raw[left] + raw[right]
        if merge_ends(token, rank, ranks) != [len(raw[left]), len(token)]:
            return None
        last = rank
    return ranks


def merge_ends(token: bytes, limit: int, ranks: dict[bytes, int]) -> list[int]:
    """Merge a token's bytes by ranks below `limit`, as tiktoken does. Return where each remaining piece ends."""
    ends = list(range(1, len(token) + 1))
    pair_ranks = [ranks.get(token[i : i + 2], limit) for i in range(len(token) - 1)]  # of neighbouring pieces
    while pair_ranks and (lowest := min(pair_ranks)) < limit:
        at = pair_ranks.index(lowest)
        del ends[at], pair_ranks[at]
        for pair in (at - 1, at):
            if 0 <= pair < len(pair_ranks):
                start = ends[pair - 1] if pair else 0
                pair_ranks[pair] = ranks.get(token[start : ends[pair + 1]], limit)
    return ends


def in_order(work: Callable[[Item], Made], items: Iterable[Item], workers: int) -> Iterator[Made]:
    """Yield work(item) for each item, in order, computed by `workers` threads. Only a few items wait at any time.

    tiktoken and `tokenizers` release the interpreter's lock while they encode. Threads therefore use as many cores as
    processes would, and they share one vocabulary.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Made]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
