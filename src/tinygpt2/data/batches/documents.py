"""The documents that blocks of tokens consist of, as texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from tinygpt2.data.batches.batch import Batch
from tinygpt2.data.corpus.formats import ReadOptions
from tinygpt2.data.corpus.sources import SourceItem
from tinygpt2.data.corpus.text_splitting import TextPart, document_parts

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

_BLOCKS = 64  # read at a time
_LONG = 1 << 17  # tokens of a document that are held
_TRIED = 16  # tokens at its end between which it may be split


class Rows(Protocol):
    """The blocks of a split."""

    def __len__(self) -> int:
        """Return their number."""

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return some of them."""


def documents_of(blocks: Rows, manifest: Mapping[str, Any], tokenizer: Tokenizer, name: str) -> SourceItem:
    """Return the text of a split as a source. A document ends at the end-of-text token, or before padding.

    Args:
        manifest: of the dataset.
        tokenizer: with which it was made.
        name: of the dataset.
    """
    end, decode = manifest["eos_token_id"], partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)

    def chunks() -> Iterator[str | None]:
        """Yield the next text of a document, or None where one ends."""
        held: list[int] = []
        for ids, closed in _rows(blocks, manifest):
            for token in [*ids, *([end] if closed else [])]:
                if token != end:
                    held.append(token)
                    continue
                if held:
                    yield decode(held)
                yield None
                held = []
            if len(held) > _LONG:
                text, held = _beginning(held, decode)
                if text:
                    yield text
        if held:
            yield decode(held)

    def read(how: ReadOptions) -> Iterator[TextPart]:
        left = chunks()
        for chunk in left:
            if chunk is not None:
                whole = chain([chunk], iter(partial(next, left, None), None))
                yield from document_parts(whole, forced=partial(how.cut_without_space, name))

    return SourceItem(name, None, read, json.dumps(manifest, sort_keys=True, default=str))


def _beginning(held: list[int], decode: Callable[[list[int]], str]) -> tuple[str, list[int]]:
    """Return the text of a document so far, and the tokens that remain: split where that changes no character.

    The text is empty if there is no such place among the last tokens.
    """
    text = decode(held)
    for size in range(len(held) - 1, len(held) - _TRIED, -1):
        if (beginning := decode(held[:size])) + decode(held[size:]) == text:
            return beginning, held[size:]
    return "", held


def _rows(blocks: Rows, manifest: Mapping[str, Any]) -> Iterator[tuple[list[int], bool]]:
    """Yield the tokens of each block that the next one does not repeat, and whether padding follows them."""
    count, stride = len(blocks), int(manifest.get("stride") or manifest["sequence_length"])
    for start in range(0, count, _BLOCKS):
        numbers = range(start, min(start + _BLOCKS, count))
        batch = blocks.batch(numbers)
        rows = batch.input_ids.tolist()
        for number, row, length in zip(numbers, rows, batch.real_lengths, strict=True):
            yield row[: length if number == count - 1 else min(length, stride)], length < len(row)
