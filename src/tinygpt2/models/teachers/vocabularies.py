"""How a teacher reads a student's tokens: the same pieces of text may have other numbers in its vocabulary.

Pieces are compared by their bytes. What the student lacks (padded rows, special tokens) is left out before the softmax;
other pieces of text may not differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import GPT2Config

from tinygpt2.data.encoding import parsed, token_bytes
from tinygpt2.data.tokenizer import encoded_size
from tinygpt2.errors import ModelError, listed
from tinygpt2.utils.progress import say

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer


@dataclass(frozen=True)
class Reading:
    """How a teacher reads a student's tokens, and which of its own tokens count.

    Attributes:
        rows: for each token of the student, the teacher's token; -1 where the teacher has none. None if every token has
            the same number in both.
        others: the teacher's tokens that the student lacks.
        start: the teacher's token to put before each block; None if it expects none.
    """

    rows: tuple[int, ...] | None = None
    others: tuple[int, ...] = ()
    start: int | None = None


def teacher_reading(
    tokenizer: Tokenizer, student: int, own: Tokenizer | None, size: int, names: tuple[str | None, str | None]
) -> Reading:
    """Find out how a teacher reads the blocks of a dataset: token by token, by the bytes of the pieces.

    Args:
        tokenizer: the data's.
        student: number of tokens of the student.
        own: the teacher's tokenizer. Without one, its tokens are taken to be the data's.
        size: number of tokens of the teacher.
        names: of teacher and student for error messages.

    Raises:
        ModelError: the teacher lacks a piece of text of the student, or the student one of the teacher.
    """
    if own is None:
        if size < min(student, encoded_size(tokenizer)):
            raise _other_pieces(names, (size, student), "the teacher has no tokenizer, and fewer tokens")
        say(f"teacher {names[0]} has no tokenizer: its tokens are taken to be those of the data")
        return _reading([token if token < size else -1 for token in range(student)], size, None)
    text, special = _pieces(own)
    ours, added = _pieces(tokenizer)
    rows, missing, made = [-1] * student, [], _made(tokenizer)
    for piece, token in ours.items():
        if token >= student:
            continue
        rows[token] = text.get(piece, special.get(piece, -1))
        if not 0 <= rows[token] < size and piece in made:
            missing.append(piece)
    for piece, token in added.items():
        if token < student:
            rows[token] = special.get(piece, text.get(piece, -1))
    ends = tokenizer.eos_token_id, own.eos_token_id
    if None not in ends and ends[0] < student and ends[1] < size:
        rows[ends[0]] = ends[1]
    if missing:
        shown = listed([repr(piece.decode(errors="replace")) for piece in missing], 3)
        raise _other_pieces(names, (size, student), f"the teacher lacks {len(missing):,} pieces: {shown}")
    used = set(rows)
    if extra := [piece for piece in _made(own) if text.get(piece) not in used]:
        shown = listed([repr(piece.decode(errors="replace")) for piece in extra], 3)
        raise _other_pieces(names, (size, student), f"the student lacks {len(extra):,} pieces: {shown}")
    return _reading(rows, size, start_token(own))


def _reading(rows: list[int], size: int, start: int | None) -> Reading:
    others = sorted(set(range(size)) - set(rows))
    same = not others and rows == list(range(size))
    return Reading(None if same else tuple(rows), tuple(others), start)


def _other_pieces(names: tuple[str | None, str | None], sizes: tuple[int, int], why: str) -> ModelError:
    return ModelError(
        f"teacher {names[0]} has a vocabulary of {sizes[0]} tokens, and student {names[1]} one of {sizes[1]}, of other "
        f"pieces: {why}",
        "tokenize the data with the teacher's tokenizer (tinygpt2 pregenerate --tokenizer), and give a student of a "
        "preset, which takes its vocabulary from the data; or give distill --alignment pieces",
    )


def _pieces(tokenizer: Tokenizer) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """Return the token of each piece of text by its bytes, and that of each special token."""
    content = tokenizer.backend_tokenizer.to_str()
    byte_level = '"ByteLevel"' in content
    special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    pieces: dict[bytes, int] = {}
    for piece, token in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if token not in special:
            pieces.setdefault(piece_bytes(piece, byte_level=byte_level), token)
    return pieces, {name.encode(): index for index, name in special.items()}


def piece_bytes(piece: str, *, byte_level: bool) -> bytes:
    """Return the bytes that a piece stands for: in a byte-level vocabulary, or in one of sentencepiece."""
    if byte_level:
        return token_bytes(piece)
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _made(tokenizer: Tokenizer) -> set[bytes]:
    """Return the pieces that texts can have: single bytes and those that merges make, or all if there are no merges.

    A vocabulary may hold others, such as OPT's madeupword0000.
    """
    content = tokenizer.backend_tokenizer.to_str()
    byte_level, model = '"ByteLevel"' in content, parsed(content)["model"]
    if model.get("merges") is None:
        return set(_pieces(tokenizer)[0])
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merged = {piece_bytes("".join(pair), byte_level=byte_level) for pair in pairs}
    return merged | {piece for piece in _pieces(tokenizer)[0] if len(piece) == 1}


def start_token(tokenizer: Tokenizer) -> int | None:
    """Return the token that a tokenizer puts before every text, by its own template; None if it puts none there."""
    plain, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    return int(whole[0]) if whole[1 : 1 + len(plain)] == plain and whole[: len(plain)] != plain else None


def token_read_first(model: Any, tokenizer: Tokenizer | None) -> int | None:
    """Return the token that a model reads before every text: its tokenizer's start token; None for a GPT-2.

    Args:
        model: its configuration, or its sizes.
    """
    return None if tokenizer is None or isinstance(model, GPT2Config) else start_token(tokenizer)
