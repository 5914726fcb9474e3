"""Split a stream of text into documents, and a long document into parts. Neither has to fit into memory."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from itertools import chain, repeat
from typing import IO

from tinygpt2.utils.files import not_utf8

CHUNK = 1 << 18  # number of bytes that are decoded at a time
LEAST_PART = 1 << 16  # least number of characters in a part of a document; the last part may have fewer
_MARGIN = 1 << 12  # characters at the end of a chunk in which a separator may be incomplete
RULES = {"line": r"\r?\n", "blank-line": r"\r?\n[ \t\r]*\n\s*"}

TextPart = tuple[str, bool]
"""A part of a document's text, and whether it is the last one."""


def decoded_chunks(stream: IO[bytes], name: str, *, lenient: bool = False) -> Iterator[str]:
    """Yield the text of a UTF-8 stream, about 256 KiB at a time. Line ends are not changed.

    Args:
        stream: the file.
        name: the file's name, for the error message.
        lenient: decode invalid bytes as lone surrogates.

    Raises:
        DataError: the stream is not UTF-8 (the error names the byte), and `lenient` is off.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if lenient else "strict")
    offset = 0
    while True:
        block = stream.read(CHUNK)
        waiting = len(decoder.getstate()[0])
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise not_utf8(name, error, offset - waiting) from error
        offset += len(block)
        if not block:
            return


def document_parts(chunks: Iterator[str]) -> Iterator[TextPart]:
    """Cut one long document where GPT-2's pre-tokenizer always cuts: before white space that follows anything else.

    The tokens of the parts, one after another, are therefore the tokens of the whole. With a LEAST_PART of 4:

        chunks "The cat  s", "at on"  ->  ("The cat", False), ("  sat on", True)
        not allowed                   ->  ("The cat ", ...): the two spaces belong to one piece of white space
        not allowed                   ->  ("The", ...): this part is too short
    """
    held = ""
    for chunk in chunks:
        held += chunk
        cut = _last_cut(held)
        if cut:
            yield held[:cut], False
            held = held[cut:]
    yield held, True


def _last_cut(text: str) -> int:
    """Return the last place to cut, or 0 if every place leaves too short a part before it."""
    end = len(text)
    while (space := max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))) >= LEAST_PART:
        end = len(text[:space].rstrip())  # the start of this white space
        if end >= LEAST_PART and text[end] in " \n":
            return end
    return 0


def split_documents(chunks: Iterator[str], pattern: re.Pattern[str]) -> Iterator[str]:
    r"""Yield the texts between the matches of a pattern, as `pattern.split` of the whole text would.

    A match near the end of a chunk may continue in the next one, so it waits. For "a\n\nb" with the pattern \n+:

        chunk "a\n"   ->  nothing yet: the match reaches into the margin
        chunk "\nb"   ->  nothing yet: "b" may be followed by more
        the end       ->  "a", "b"
    """
    held, searched = "", 0  # no match begins before `searched`
    for chunk, margin in chain(zip(chunks, repeat(_MARGIN), strict=False), [("", 0)]):
        held += chunk
        start, next_ = 0, len(held) - 2 * _MARGIN
        for match in pattern.finditer(held, searched):
            if match.end() > len(held) - margin:
                next_ = min(next_, match.start())
                break
            yield held[start : match.start()]
            start = match.end()
        held, searched = held[start:], max(0, next_ - start)
    yield held
