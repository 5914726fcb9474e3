"""Texts to tokens: exactly the tokenizer's own, at the speed of the fastest engine that is the same function.

tiktoken encodes for every byte-level BPE that it provably reproduces, `tokenizers` for all others. Special
tokens inside a text are never interpreted: `<|endoftext|>` in a web page is thirteen characters.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tinygpt2.utils.types import Tokens

if TYPE_CHECKING:
    import tiktoken
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast as Tokenizer

Item = TypeVar("Item")
Made = TypeVar("Made")

# White space as Unicode and both engines have it
_SPACE = np.zeros(0x3002, bool)
_SPACE[[*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]] = True

# GPT-2's pre-tokeniser looks ahead: of a run of white space before a word, the last character stands by itself or
# goes with the word. Looking ahead costs half the speed, so that place is marked by a character that stands in no
# text, and this pattern is the same function of the marked text.
_MARK = "\uffff"
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x{FFFF}]+|\s+|\x{FFFF}"

# The letter that spells each byte in a byte-level vocabulary (GPT-2, `bytes_to_unicode`), and the way back
_SHOWN = {*range(33, 127), *range(161, 173), *range(174, 256)}
LETTERS = {byte: byte for byte in _SHOWN}
LETTERS |= {byte: 256 + index for index, byte in enumerate(sorted(set(range(256)) - _SHOWN))}
_BYTES = dict.fromkeys(range(256), 0x10FFFF) | {letter: byte for byte, letter in LETTERS.items()}


class Encoder:
    """Encodes texts as a tokenizer does, with no special token added and none interpreted. Safe in threads.

    Attributes:
        reproduced: whether tiktoken encodes; then a text may also be encoded in parts, cut before white space
            that follows anything else.
        dtype: uint16 where the vocabulary fits, else int32.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._serialised = tokenizer.backend_tokenizer.to_str()
        ranks = reproduce(parsed(self._serialised))
        self._mark = 1 + max(ranks.values()) if ranks else 0
        self._fast = _engine(ranks, self._mark) if ranks else None
        self.reproduced = self._fast is not None
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.int32)

    @property
    def _backend(self) -> Backend:
        return _plain(self._serialised)

    def __call__(self, texts: list[str]) -> list[Tokens]:
        """Return the token ids of each text."""
        if self._fast is None:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype) for encoding in encodings]
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Tokens:
        assert self._fast is not None
        if _MARK in text:
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, self.dtype)
        ids = self._fast.encode_to_numpy(_marked(text), disallowed_special=())
        tokens: Tokens = ids[ids != self._mark]
        return tokens.astype(self.dtype)


def _engine(ranks: dict[bytes, int], mark: int) -> tiktoken.Encoding:
    """Build the engine that encodes marked texts."""
    import tiktoken

    # A special token keeps tiktoken's search for special tokens fast; none is ever allowed in a text.
    return tiktoken.Encoding(
        "marked",
        pat_str=_PATTERN,
        mergeable_ranks={**ranks, _MARK.encode(): mark},
        special_tokens={"<|endoftext|>": mark + 1},
    )


def _marked(text: str) -> str:
    """Put the mark before the last character of each run of two and more white spaces that something follows."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    space = _SPACE[np.minimum(codes, len(_SPACE) - 1)]
    borders = np.flatnonzero(space[:-2] & space[1:-1] & ~space[2:]) + 1
    return np.insert(codes, borders, ord(_MARK)).tobytes().decode("utf-32-le")


@lru_cache(maxsize=2)
def parsed(serialised: str) -> dict[str, Any]:
    """Read a tokenizer.json; not to be changed."""
    found: dict[str, Any] = json.loads(serialised)
    return found


@lru_cache(maxsize=4)
def _plain(serialised: str) -> Backend:
    """Build a tokenizer's engine as nobody has changed it, with special tokens in a text left as text."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(serialised)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
    return backend


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the token ids of a few texts: no special token added, none interpreted."""
    engine = _plain(tokenizer.backend_tokenizer.to_str())
    return [encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)]


def reproduce(backend: dict[str, Any]) -> dict[bytes, int] | None:
    """Return the ranks by which tiktoken is the same function as a byte-level BPE, or None.

    It is the same function when the pre-tokeniser is GPT-2's, with no normaliser and no prefix space; every byte
    is a token; and for every merge, merging that token's bytes by lower ranks ends in exactly the listed pair.
    tiktoken merges the pair whose joined bytes have the lowest rank, `tokenizers` the pair listed first: checked
    for the whole vocabulary, both choose alike in any text.

    Args:
        backend: a tokenizer as its tokenizer.json has it.
    """
    model, pre = backend["model"], backend["pre_tokenizer"] or {}
    plain = model["type"] == "BPE" and not any(
        model.get(key)
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    )
    gpt2 = pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space") and pre.get("use_regex", True)
    if not (plain and gpt2) or backend["normalizer"]:
        return None
    special = {item["content"] for item in backend["added_tokens"]}
    if any(not item["special"] for item in backend["added_tokens"]):  # found in any text
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
    """Merge a token's bytes by ranks below `limit`, as tiktoken would; return where each of what is left ends."""
    ends = list(range(1, len(token) + 1))
    found = [ranks.get(token[i : i + 2], limit) for i in range(len(token) - 1)]  # of each pair of neighbours
    while found and (lowest := min(found)) < limit:
        at = found.index(lowest)
        del ends[at], found[at]
        for pair in (at - 1, at):
            if 0 <= pair < len(found):
                start = ends[pair - 1] if pair else 0
                found[pair] = ranks.get(token[start : ends[pair + 1]], limit)
    return ends


def in_order(work: Callable[[Item], Made], items: Iterable[Item], workers: int) -> Iterator[Made]:
    """Yield work(item) for each item, in order, made by so many threads; few items wait at any time.

    The engines leave the interpreter's lock while they encode, so threads keep as many cores busy as processes
    would, and share one vocabulary.
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
