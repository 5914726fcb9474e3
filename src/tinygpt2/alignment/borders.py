"""Texts in the tokens of two tokenizers, aligned by their bytes.

A common border is a position where both a token of the teacher and one of the student begin. Each token is compared
with the bytes of the text. So what a tokenizer adds (the space of sentencepiece before a text) or cannot spell (an
unknown character) is no border, whatever its kind.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from tinygpt2.alignment.blocks import TEXT, BlockAligner
from tinygpt2.data.encoding import encode
from tinygpt2.errors import ModelError
from tinygpt2.models.teachers.vocabularies import piece_bytes
from tinygpt2.utils.types import Array

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

_UNKNOWN = -2  # a special token that the teacher lacks
# the first word of a text, and the last one of a text that is read backwards, with the white space on both sides
_FIRST, _LAST = re.compile(r"\s*(?:\w+|[^\w\s]+)?"), re.compile(r"\s*(?:\w+|[^\w\s]+)?\s*")


class Borders(NamedTuple):
    """A block in the teacher's tokens, and its common borders.

    Attributes:
        tokens: the teacher's tokens.
        ours, theirs: for each common border, the student's token and the teacher's token that begin there, by their
            places in the block.
        sure: whether the teacher's token is certainly the one that it has there in the whole text.
        spans: for each of them, how many tokens of the student and of the teacher spell the text up to the next one, or
            to the text's end (C, 2); zeros where they do not spell the same, or the end is not known.
    """

    tokens: Array
    ours: Array
    theirs: Array
    sure: Array
    spans: Array


class ByteAligner(BlockAligner):
    """Encodes blocks of a student with any tokenizer in the teacher's tokens.

    Args:
        whole, small: the teacher's tokenizer, and the student's.
        limit: see `BlockAligner`.

    Raises:
        ModelError: a tokenizer changes the bytes of texts.
    """

    def __init__(self, whole: Tokenizer, small: Tokenizer, limit: int | None) -> None:
        check_keeps_bytes(whole, "teacher")
        check_keeps_bytes(small, "dataset")
        (own, _), (pieces, special) = spelled(whole), spelled(small)
        numbers = {token.content: index for index, token in whole.added_tokens_decoder.items() if token.special}
        ends = {small.eos_token: whole.eos_token_id}
        places = {name: numbers.get(name, _UNKNOWN) for name in special.values()}
        places |= {name: end for name, end in ends.items() if name is not None and end is not None}
        marks = [places[special[index]] if index in special else TEXT for index in range(len(pieces))]
        super().__init__(whole, pieces, marks, limit)
        self._own = own
        # whether the student's texts begin with a space of its tokenizer, which the teacher is not to read
        self._added = b"".join(pieces[token] for token in encode(small, ["a"])[0]) == b" a"

    def borders(self, ids: Array, *, whole: bool) -> Borders:
        """Find the common borders of a block.

        Args:
            ids: the student's tokens (T,).
            whole: whether its last word is complete.
        """
        spans = self._spans(ids)
        texts = [self._text(ids[start:stop]) for start, stop in spans]
        if self._added:
            added = [start > 0 and text.startswith(" ") for (start, _), (text, _) in zip(spans, texts, strict=True)]
            texts = [(text[one:], skipped + one) for (text, skipped), one in zip(texts, added, strict=True)]
        encoded = self._backend.encode_batch([text for text, _ in texts], add_special_tokens=False)
        tokens: list[int] = []
        found: list[tuple[int, int, bool, int, int]] = []
        lost = True  # whether the text before a span is unknown to the teacher
        for (start, stop), (text, skipped), one in zip(spans, texts, encoded, strict=True):
            begins = np.concatenate([[0], self._sizes[ids[start:stop]].cumsum()])[:-1] - skipped
            ours = {int(begin): start + place for place, begin in enumerate(begins)}
            cut_after = stop == len(ids) and not whole
            first, last = _complete(text, cut_before=lost, cut_after=cut_after)
            theirs = self._begins(text, one)
            common = [
                _Place(begin, ours[begin], place)
                for place, begin in enumerate(theirs)
                if first <= begin <= last and begin in ours
            ]
            end = _Place(len(text.encode()), stop, len(one.ids))
            known = not cut_after and int(self._sizes[ids[start:stop]].sum()) - skipped == end.at
            pieces = [self._own[token] for token in one.ids]
            for border, after in zip(common, [*common[1:], end if known else None], strict=False):
                span = _span(border, after, theirs, pieces)
                found.append((border.ours, len(tokens) + border.theirs, border.at < last, *span))
            tokens.extend(one.ids)
            if stop < len(ids):
                number = int(self._special[ids[stop]])
                lost = number == _UNKNOWN
                if not lost:
                    found.append((stop, len(tokens), True, 1, 1))
                    tokens.append(number)
        columns = np.array(found, np.int64).reshape(-1, 5)
        ours_at, theirs_at, sure = columns[:, :3].T
        return Borders(np.array(tokens, np.int64), ours_at, theirs_at, sure.astype(bool), columns[:, 3:])

    def _begins(self, text: str, encoding: Encoding) -> list[int]:
        """Return where each of the teacher's tokens begins in a text, in bytes; -1 if it does not spell the text."""
        raw = text.encode()
        ends = np.concatenate([[0], np.cumsum([len(letter.encode()) for letter in text], dtype=np.int64)])
        at, found = 0, []
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            piece = self._own[token]
            if not raw.startswith(piece, at):  # begin again where the tokenizer says that it is
                at = int(ends[start])
            if piece and raw.startswith(piece, at):
                found.append(at)
                at += len(piece)
            else:
                found.append(-1)
                at = int(ends[stop])
        return found

    def _block(self, ids: Array, *, whole: bool) -> tuple[Array, Array, Array]:
        """See `BlockAligner`."""
        found = self.borders(ids, whole=whole)
        states = np.full(len(ids), -1)
        states[found.ours] = found.theirs - 1
        return found.tokens, states[1:], np.zeros(len(ids) - 1, np.int64)


class _Place(NamedTuple):
    """A border in a text.

    Attributes:
        at: in bytes.
        ours, theirs: in tokens of the student and of the teacher.
    """

    at: int
    ours: int
    theirs: int


def _span(border: _Place, after: _Place | None, begins: list[int], pieces: list[bytes]) -> tuple[int, int]:
    """Return how many tokens of the student and of the teacher are between two borders; 0 if not the same text.

    Args:
        begins: where each of the teacher's tokens begins; -1 if it does not spell the text.
        pieces: the bytes of these.
    """
    if after is None:
        return 0, 0
    at = border.at
    for place in range(border.theirs, after.theirs):
        if begins[place] != at:
            return 0, 0
        at += len(pieces[place])
    return (after.ours - border.ours, after.theirs - border.theirs) if at == after.at else (0, 0)


def _complete(text: str, *, cut_before: bool, cut_after: bool) -> tuple[int, int]:
    """Return where the first and the last border can be in a text, in bytes: not inside incomplete words.

    Args:
        cut_before, cut_after: whether the first and the last word may be incomplete.
    """
    first, last = 0, len(text)
    if cut_before and (found := _FIRST.match(text)):
        first = max(1, found.end())
    if cut_after and (found := _LAST.match(text[::-1])):
        last -= found.end()
    return len(text[:first].encode()), len(text[: max(0, last)].encode())


def spelled(tokenizer: Tokenizer) -> tuple[list[bytes], dict[int, str]]:
    """Return the bytes of each token, which special tokens have none of, and the special tokens' names."""
    byte_level = '"ByteLevel"' in tokenizer.backend_tokenizer.to_str()
    special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = [b""] * (max(tokenizer.get_vocab().values()) + 1)
    for name, token in tokenizer.get_vocab().items():
        if token not in special:
            pieces[token] = piece_bytes(name, byte_level=byte_level)
    return pieces, special


def check_keeps_bytes(tokenizer: Tokenizer, role: str) -> None:
    """Check that a tokenizer's normalizer leaves the bytes of texts as they are.

    The spaces of sentencepiece are allowed. NFC is, too: it changes few texts, and where it does there is no border.

    Args:
        role: whose tokenizer it is, for the error.

    Raises:
        ModelError: it does not.
    """
    for part in _normalizers(json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"]):
        spaces = part["type"] == "Replace" and (part["pattern"], part["content"]) == ({"String": " "}, "\u2581")
        added = part["type"] == "Prepend" and part["prepend"] == "\u2581"
        if not (spaces or added or part["type"] == "NFC"):
            raise ModelError(
                f"texts are aligned by their bytes, and the {role}'s tokenizer changes them: its normalizer is "
                f"{part['type']}",
                "use a tokenizer without one",
            )


def _normalizers(content: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, as tokenizer.json describes it."""
    if content is None:
        return []
    if content["type"] == "Sequence":
        return [step for one in content["normalizers"] for step in _normalizers(one)]
    return [content]
