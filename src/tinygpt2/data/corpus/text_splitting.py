"""Split a stream of text into documents, and a long document into parts. Neither has to fit into memory."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import IO

from tinygpt2.utils.files import not_utf8

CHUNK = 1 << 18  # number of bytes that are decoded at a time
LEAST_PART = 1 << 16  # least number of characters in a part of a document; the last part may have fewer
LONGEST_RUN = 1 << 20  # characters without a place to cut, after which a document is cut anyway
_MARGIN = 1 << 12  # characters at the end of a chunk in which a separator may be incomplete, or on which one may depend
RULES = {"line": r"\r?\n", "blank-line": r"\r?\n[ \t\r]*\n\s*"}

TextPart = tuple[str, bool]
"""A part of a document's text, and whether it is the last one."""


def decoded_chunks(stream: IO[bytes], name: str, *, lenient: bool = False, offset: int = 0) -> Iterator[str]:
    """Yield the text of a UTF-8 stream, about 256 KiB at a time. Line ends are not changed.

    Args:
        stream: the file.
        name: the file's name, for the error message.
        lenient: decode invalid bytes as lone surrogates.
        offset: position of the stream in the file, for the error message.

    Raises:
        DataError: the stream is not UTF-8 (the error names the byte), and `lenient` is off.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if lenient else "strict")
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


def document_parts(
    chunks: Iterator[str], separator: re.Pattern[str] | None = None, forced: Callable[[], None] = lambda: None
) -> Iterator[TextPart]:
    r"""Yield the texts between the matches of a pattern, as `separator.split` of the whole text would, in parts.

    A match near the end of a chunk may continue in the next one, so it waits. For "a\n\nb" with the pattern \n+:

        chunk "a\n"   ->  nothing yet: the match reaches into the margin
        chunk "\nb"   ->  nothing yet: "b" may be followed by more
        the end       ->  ("a", True), ("b", True)

    A long document is cut where GPT-2's pre-tokenizer always cuts: before white space that follows anything else. The
    tokens of the parts, one after another, are therefore the tokens of the whole. With a LEAST_PART of 4:

        chunks "The cat  s", "at on"  ->  ("The cat", False), ("  sat on", True)
        not allowed                   ->  ("The cat ", ...): the two spaces belong to one piece of white space
        not allowed                   ->  ("The", ...): this part is too short

    Args:
        chunks: the text.
        separator: what lies between two documents; None makes the whole text one document. What a match depends on must
            lie within 4,096 characters.
        forced: called before a document is cut after LONGEST_RUN characters without such a place.
    """
    held, start, searched = "", 0, 0  # the document begins at `start`; no match begins before `searched`
    inside = False  # whether a part of the current document was yielded
    margin = _MARGIN if separator else 0
    for chunk, wait in chain(zip(chunks, repeat(margin), strict=False), [("", 0)]):
        held += chunk
        next_ = len(held) - 2 * wait
        for match in separator.finditer(held, searched) if separator else ():
            if match.end() > len(held) - wait:
                next_ = min(next_, match.start())
                break
            if match.end() > start or inside:  # otherwise an empty match where the document begins
                yield held[start : match.start()], True
                start, inside = match.end(), False
        searched = max(start, next_)
        while searched - start >= LEAST_PART and (cut := _cut(held[start:searched], forced)):
            yield held[start : start + cut], False
            start, inside = start + cut, True
        kept = max(0, start - margin)  # ^ and look-behind need what lies before the document
        held, start, searched = held[kept:], start - kept, searched - kept
    if not separator or inside or start < len(held):
        yield held[start:], True


def parts_of_rows(texts: Iterable[str], forced: Callable[[], None]) -> Iterator[TextPart]:
    """Yield the texts of rows, each a document. A long one comes in parts, as those of `document_parts`."""
    for text in texts:
        if len(text) <= LONGEST_RUN:
            yield text, True
        else:
            chunks = (text[at : at + CHUNK] for at in range(0, len(text), CHUNK))
            yield from document_parts(chunks, forced=forced)


def _cut(text: str, forced: Callable[[], None]) -> int:
    """Return the last place to cut, or 0 to wait for more text."""
    if (cut := _last_cut(text)) or len(text) < LONGEST_RUN:
        return cut
    forced()
    return LONGEST_RUN


def _last_cut(text: str) -> int:
    """Return the last place before white space, or 0 if every place leaves too short a part before it."""
    end = len(text)
    while (space := max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))) >= LEAST_PART:
        end = space  # the start of this white space, after the loop
        while end and text[end - 1].isspace():
            end -= 1
        if end >= LEAST_PART and text[end] in " \n":
            return end
    return 0
