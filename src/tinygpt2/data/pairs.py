"""Pairs of prompt and response, and chats, to blocks: several in one block, with marks of what the loss counts.

Only tokens are held in memory: two or four bytes for each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from tinygpt2.config.data import PregenerateConfig, is_stream
from tinygpt2.data.batches.packing import COUNTED, REAL, best_fit, block_of
from tinygpt2.data.block_writers import ArrowWriter, BlockFile, content_of
from tinygpt2.data.corpus.pairs import MESSAGES, PairReader
from tinygpt2.data.corpus.sources import Corpus, Piece, whole
from tinygpt2.data.encoding import Encoder, in_order
from tinygpt2.data.external_sort import content_hash
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.runtime.cpu import usable_cores
from tinygpt2.utils.files import shared_name
from tinygpt2.utils.progress import say, track
from tinygpt2.utils.types import Array, Tokens

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

_BATCH = 1024  # pairs that one worker tokenizes at a time
_AT_ONCE = 1 << 20  # tokens that are collected before they are written


class Pair(NamedTuple):
    """A pair or a chat.

    Attributes:
        tokens: of prompts, responses, and the end of text after each response.
        counted: which tokens count as targets: the responses and their ends.
        hash: of the text, which decides whether it is held out.
        size: of the text in bytes.
    """

    tokens: Tokens
    counted: Array
    hash: int
    size: int


@dataclass
class Pairs:
    """The pairs of a corpus that fit into a block.

    Attributes:
        cut: how many were cut at the beginning of their prompts.
        left_out: how many were left out, because their responses alone fill a block.
    """

    kept: list[Pair] = field(default_factory=list)
    cut: int = 0
    left_out: int = 0

    def add(self, pair: Pair, length: int) -> None:
        """Add a pair, cut to the length of a block."""
        over = len(pair.tokens) - length
        if over > 0:
            if pair.counted[over:].all():
                self.left_out += 1
                return
            self.cut += 1
            pair = pair._replace(tokens=pair.tokens[over:], counted=pair.counted[over:])
        self.kept.append(pair)


def require_pairs(corpus: Corpus, held_out: Corpus | None, config: PregenerateConfig) -> bool:
    """Return whether the sources hold pairs: by the options, or because the first row has messages and no text.

    Raises:
        ConfigError: an option does not fit pairs.
    """
    if corpus.pairs is None and _has_chats(corpus):
        for part in (corpus, held_out):
            if part is not None:
                part.pairs = PairReader.of(config)
    if corpus.pairs is None:
        if config.template is not None:
            raise ConfigError(
                "--template has no effect: the rows are neither pairs nor chats",
                f"give --prompt-column and --response-column, or a file whose rows have {MESSAGES!r}",
            )
        return False
    for option, given in (
        ("--shard", config.shard),
        ("--stride", config.stride),
        ("--document", config.document),
        ("--no-append-eos", not config.append_eos),
        (f"--format {config.format}", config.format != "arrow"),
    ):
        if given:
            raise ConfigError(f"{option} does not fit pairs of prompt and response", f"leave {option} out")
    return True


_CHAT = "\0chat"


@dataclass(frozen=True)
class _Probe(PairReader):
    """Reads of a row whether it is a chat."""

    text_column: str = "text"
    needs_rows: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[str, ...]:
        """See `PairReader`."""
        return (self.text_column,)

    def text(self, row: Any, where: str, *, lenient: bool) -> str:
        """Return a text that says whether the row is a chat."""
        return _CHAT if isinstance(row, dict) and MESSAGES in row and self.text_column not in row else "a text"


def _has_chats(corpus: Corpus) -> bool:
    """Return whether the first row has messages and no text. Streams cannot be read twice."""
    if any(map(is_stream, corpus.sources)) or corpus.given is not None:
        return False
    probe = Corpus(corpus.sources, corpus.document, corpus.text_column, "replace", corpus.split, corpus.format)
    probe.pairs, probe.notes = _Probe(text_column=corpus.text_column), corpus.notes
    return any(piece.text == _CHAT for piece in islice(probe.pieces(), 1))


def _read(corpus: Corpus, encoder: Encoder, eos: int, config: PregenerateConfig) -> Pairs:
    """Tokenize the pairs of a corpus, and cut those that are longer than a block.

    Raises:
        DataError: a source cannot be read, or no pair is left.
    """
    found, pieces = Pairs(), whole(corpus.pieces())
    end = np.array([eos], encoder.dtype)

    def encode(texts: list[str]) -> list[Pair]:
        return [_encoded(text, encoder, end, config.seed) for text in texts]

    with track("tokenize", corpus.size_hint(), "bytes") as task:
        for pairs in in_order(encode, _batches(pieces), config.num_workers or usable_cores()):
            for pair in pairs:
                found.add(pair, config.sequence_length)
            task.advance(sum(pair.size for pair in pairs))
    named = ", ".join(map(shared_name, corpus.sources))
    if found.cut:
        say(f"{named}: {found.cut:,} pairs are longer than a block; they are cut at the beginning of their prompts")
    if found.left_out:
        say(f"{named}: {found.left_out:,} pairs are left out, because their responses alone fill a block")
    if not found.kept:
        raise DataError(f"no pairs in {', '.join(corpus.sources)}", "give more pairs or a larger --sequence-length")
    return found


def _batches(pieces: Iterator[Piece]) -> Iterator[list[str]]:
    while batch := [piece.text for piece in islice(pieces, _BATCH)]:
        yield batch


def _encoded(text: str, encoder: Encoder, end: Tokens, seed: int) -> Pair:
    """Encode prompts and responses apart, so that no token lies in both."""
    turns = json.loads(text)
    parts = iter(encoder([part for turn in turns for part in turn]))
    tokens, counted = [], []
    for _ in turns:
        before, answer = next(parts), next(parts)
        tokens += [before, answer, end]
        counted += [np.zeros(len(before), np.bool_), np.ones(len(answer) + 1, np.bool_)]
    size = sum(len(part.encode()) for turn in turns for part in turn)
    return Pair(np.concatenate(tokens), np.concatenate(counted), content_hash(text, seed), size)


def make_pairs(
    out: Path, corpus: Corpus, held_out: Corpus | None, tokenizer: Tokenizer, config: PregenerateConfig
) -> dict[str, Any]:
    """Read the pairs, pack both splits and write them. Return the manifest's entries that describe them.

    Raises:
        DataError: a source cannot be read, or every pair is too long or would be held out.
    """
    encoder, end = Encoder(tokenizer), int(tokenizer.eos_token_id)
    read = _read(corpus, encoder, end, config)
    kept = _read(held_out, encoder, end, config) if held_out else None
    pairs, tests = (read.kept, kept.kept) if kept else _divided(read.kept, config.test_fraction)
    if not pairs:
        raise DataError("every pair would be held out", "give more pairs, or a smaller --test-fraction")
    if config.shuffle:
        order = np.random.default_rng(config.seed).permutation(len(pairs))
        pairs = [pairs[number] for number in order]
    splits = {}
    for name, some in (("train", pairs), ("test", tests)):
        with MarkedWriter(out, name, config.sequence_length, encoder.dtype) as writer:
            for block in _packed(some, config.sequence_length):
                writer.add(*block)
        splits[name] = writer.entry(len(some), sum(pair.size for pair in some))
    both, corpora = [part for part in (read, kept) if part], [part for part in (corpus, held_out) if part]
    counts = {
        "encoding_errors": sum(part.encoding_errors for part in corpora),
        "empty_documents": sum(part.empty_documents for part in corpora),
        "pairs_cut": sum(part.cut for part in both),
        "pairs_left_out": sum(part.left_out for part in both),
    }
    return {"split": "source" if kept else "document", **counts, "splits": splits}


def _divided(pairs: list[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to train on, and the share with the smallest hashes, which is held out."""
    hashes = sorted(pair.hash for pair in pairs)
    few = int(bool(fraction) and hashes[:1] != hashes[-1:])  # at least one, unless all pairs are the same
    count = max(few, round(fraction * len(pairs)))
    last = hashes[count - 1] if count else -1
    return [pair for pair in pairs if pair.hash > last], [pair for pair in pairs if pair.hash <= last]


def _packed(pairs: list[Pair], length: int) -> Iterable[tuple[Tokens, Array]]:
    """Yield the tokens and the marks of the blocks that hold the pairs."""
    for numbers in best_fit([len(pair.tokens) for pair in pairs], length):
        yield block_of([(pairs[number].tokens, pairs[number].counted) for number in numbers], length)


def described(corpus: Corpus) -> dict[str, Any]:
    """Return what the manifest says of how pairs were read."""
    reader = corpus.pairs
    return {} if reader is None else {"pairs": {"columns": list(reader.columns), "template": reader.template}}


class MarkedWriter:
    """Writes blocks with marks as one Arrow file: see `batches.packing`.

    Args:
        out: the dataset's directory.
        split: `train` or `test`.
        length: number of tokens in a block.
        dtype: the number type of the tokens.
    """

    def __init__(self, out: Path, split: str, length: int, dtype: np.dtype[Any]) -> None:
        self._split, self._length, self._dtype = out / split, length, dtype
        self._rows: list[tuple[Tokens, Array]] = []
        self._sha, self._marks_sha = hashlib.sha256(), hashlib.sha256()
        self._writer = ArrowWriter(self._split, 0, length, dtype, marked=True)
        self._sequences = self._tokens = self._targets = 0

    def add(self, ids: Array, marks: Array) -> None:
        """Add a block."""
        self._rows.append((ids.astype(self._dtype), marks))
        self._sequences += 1
        self._tokens += int((marks & REAL != 0).sum())
        self._targets += int((marks & COUNTED != 0).sum())
        if len(self._rows) * self._length >= _AT_ONCE:
            self._write()

    def _write(self) -> None:
        if not self._rows:
            return
        ids, marks = (np.stack(values) for values in zip(*self._rows, strict=True))
        self._writer.write(ids, 0, marks)
        self._sha.update(content_of(ids))
        self._marks_sha.update(marks.tobytes())
        self._rows = []

    def entry(self, documents: int, size: int) -> dict[str, Any]:
        """Return what the manifest says of the finished split, whose documents have `size` bytes of text."""
        return {
            "documents": documents,
            "bytes": size,
            "tokens": self._tokens,
            "targets": self._targets,
            "sequences": self._sequences,
            "dropped_tokens": 0,
            "padding_tokens": self._sequences * self._length - self._tokens,
            "files": [{**asdict(self._file), "marks_sha256": self._marks_sha.hexdigest()}],
        }

    @property
    def _file(self) -> BlockFile:
        return BlockFile(self._writer.name, self._sequences, self._sha.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self._write()
        self._writer.close()
        if kind is None:
            ArrowWriter.finish(self._split, self._length, self._dtype, [self._file], marked=True)
