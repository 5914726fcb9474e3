"""Decide whether the parts of a long document may be encoded apart: whether a tokenizer splits where they are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tinygpt2.data.corpus.sources import Corpus, Piece, whole

LONGEST_WHOLE = 1 << 20  # most characters that are joined; `tokenizers` needs about 130 bytes of memory for each

# Parts are cut before white space that follows another character. These normalizers change each character, or a
# character with the marks after it, whatever else the text contains.
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}
_SPLIT_AT_SPACE = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
_SPLIT_ELSEWHERE = {"Digits", "Punctuation"}  # at characters that are no white space


def splits_at_white_space(backend: dict[str, Any]) -> bool:
    """Return whether a tokenizer gives the parts of a document the tokens that they have in the whole.

    The answer is yes only if it follows from the tokenizer's parts:

    - The normalizer changes every character by itself.
    - The pre-tokenizer splits before all white space that follows another character, and what it makes of a part does
      not depend on where the part begins.
    - No added token that is found in a text reaches over white space.

    Args:
        backend: the content of the tokenizer's tokenizer.json.
    """
    for token in backend["added_tokens"]:
        spaced = token["lstrip"] or token["rstrip"] or any(character.isspace() for character in token["content"])
        if spaced and not token["special"]:  # special tokens are not looked for
            return False
    if any(each["type"] not in _LOCAL_NORMALIZERS for each in _steps(backend["normalizer"], "normalizers")):
        return False
    for each in _steps(backend["pre_tokenizer"], "pretokenizers"):
        if each["type"] in _SPLIT_AT_SPACE:
            return True
        if each["type"] == "ByteLevel" and not each["add_prefix_space"]:
            return bool(each.get("use_regex", True))
        if each["type"] not in _SPLIT_ELSEWHERE:
            return False
    return False


def _steps(part: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer or a pre-tokenizer, those inside a sequence too."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for each in part[key]:
        yield from _steps(each, key)


def joined_pieces(corpus: Corpus, tokenizer: str) -> Iterator[Piece]:
    """Yield whole documents, for a tokenizer that may not encode their parts apart. Very long ones stay in parts.

    Args:
        corpus: the documents.
        tokenizer: its name, for the message.
    """

    def divided() -> None:
        corpus.notes.once(
            "divided",
            f"documents longer than {LONGEST_WHOLE:,} characters are divided before they are encoded; the tokenizer "
            f"{tokenizer} may encode the places where they are cut otherwise",
        )

    return whole(corpus.pieces(), LONGEST_WHOLE, divided)
