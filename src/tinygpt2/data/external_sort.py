"""Sort tokenized documents on disk, so that a corpus of any size can be shuffled, split and continued.

Documents are collected into runs of limited size. A run is written in the order of its documents' keys, and is finished
when its progress file (run-N.json) exists. Reading merges the runs, a limited number of tokens at a time.

Source: external merge sort (Knuth, The Art of Computer Programming, volume 3, section 5.4).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt2.data.corpus.text_splitting import LEAST_PART
from tinygpt2.utils.files import atomic_path, flush_to_disk, read_json
from tinygpt2.utils.types import Array, Tokens

RUN_TOKENS, RUN_ENTRIES = 1 << 23, 1 << 20  # most in a run; its last batch may exceed them
GROUP_TOKENS = 1 << 22  # number of tokens to read at a time
_BINS = 1 << 16
_LAST = 2**64 - 1  # the largest key

_INDEX = np.dtype(
    [
        ("key", "<u8"),  # documents are sorted by it
        ("document", "<u8"),  # its number in the corpus
        ("hash", "<u8"),  # of its content and the seed
        ("start", "<u8"),  # position of the tokens in the run's file
        ("tokens", "<u4"),
        ("bytes", "<u4"),
        ("first", "?"),  # whether this is the document's first piece
        ("own", "?"),  # whether it is tokenized here, not in another shard of the dataset
    ]
)


def content_hash(text: str, seed: int) -> int:
    """Return a 64-bit hash of the beginning of a document, which depends on the seed."""
    head = text[:LEAST_PART].encode()
    return int.from_bytes(hashlib.blake2b(head, digest_size=8, key=seed.to_bytes(8, "big")).digest(), "big")


def shuffled_keys(documents: Array, seed: int) -> Array:
    """Return a 64-bit key for each document number and the seed. Sorting by the keys shuffles the documents.

    Source: SplitMix64 (Steele, Lea and Flood 2014), which maps numbers to numbers one to one.
    """
    offset = int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "big"), digest_size=8).digest(), "big")
    with np.errstate(over="ignore"):
        z = (documents.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(offset)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@dataclass
class EncodingProgress:
    """How much of the sources has been read. `--resume` continues from here.

    Attributes:
        pieces: number of pieces read from the sources.
        documents, bytes, tokens: sizes of the texts that belong to this shard.
        encoding_errors: number of documents with bytes that are not UTF-8.
        empty_documents: number of documents that were left out because they are blank.
        done: whether all sources have been read to the end.
    """

    pieces: int = 0
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    encoding_errors: int = 0
    empty_documents: int = 0
    done: bool = False


@dataclass(frozen=True)
class EncodedBatch:
    """Some pieces in the order of the corpus.

    Attributes:
        entries: their index entries, in which `key` and `start` are not set yet.
        tokens: their tokens, one piece after another.
    """

    entries: Array
    tokens: Tokens

    @classmethod
    def of(cls, rows: list[tuple[int, int, int, int, bool, bool]], tokens: list[Tokens]) -> EncodedBatch:
        """Build from rows of (document, hash, tokens, bytes, first, own)."""
        entries = np.zeros(len(rows), _INDEX)
        names = ("document", "hash", "tokens", "bytes", "first", "own")
        for name, column in zip(names, zip(*rows, strict=True), strict=True):
            entries[name] = column
        return cls(entries, np.concatenate(tokens))


@dataclass
class ExternalSort:
    """Sorts tokenized documents on disk: it writes sorted runs, and merges them when they are read.

    Documents a, b, c, d arrive in this order with the keys 7, 2, 9, 1. A run holds two of them:

        written:  run 0 is b (2), a (7)    run 1 is d (1), c (9)
        read:     the keys 0 to 4 of both runs, sorted: d, b;  then the keys 5 to 9: a, c

    Args:
        folder: directory of the runs. It is made if it does not exist; finished runs in it are used.
        dtype: number type of the tokens.
        seed: None keeps the order of the corpus; a number shuffles the documents.

    Attributes:
        progress: how much has been read and written.
    """

    folder: Path
    dtype: np.dtype[Any]
    seed: int | None
    progress: EncodingProgress = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._batches: list[EncodedBatch] = []
        self._held = [0, 0]
        self._runs = len(list(self.folder.glob("run-*.json")))
        self.progress = (
            EncodingProgress(**read_json(self._file(self._runs - 1, "json"))) if self._runs else EncodingProgress()
        )

    def _file(self, run: int, ending: str) -> Path:
        return self.folder / f"run-{run:06d}.{ending}"

    def add(self, batch: EncodedBatch) -> None:
        """Add the next pieces. Write a run when there are enough."""
        own = batch.entries[batch.entries["own"]]
        self.progress.pieces += len(batch.entries)
        self.progress.documents += int(own["first"].sum())
        self.progress.bytes += int(own["bytes"].sum())
        self.progress.tokens += len(batch.tokens)
        self._batches.append(batch)
        self._held[0] += len(batch.tokens)
        self._held[1] += len(batch.entries)
        if self._held[0] >= RUN_TOKENS or self._held[1] >= RUN_ENTRIES:
            self._flush()

    def finish(self, encoding_errors: int, empty_documents: int) -> None:
        """Write the last run, after the sources have been read to the end."""
        self.progress.encoding_errors, self.progress.empty_documents = encoding_errors, empty_documents
        self.progress.done = True
        self._flush()

    def _flush(self) -> None:
        """Write the collected pieces as a run. The run counts as soon as its progress file exists.

        The progress file is made after everything else is physically on the disk, so that a power cut leaves no run
        that counts but is not whole.
        """
        entries = np.concatenate([batch.entries for batch in self._batches] or [np.empty(0, _INDEX)])
        tokens = np.concatenate([batch.tokens for batch in self._batches] or [np.empty(0, self.dtype)])
        self._batches, self._held = [], [0, 0]
        starts = _starts(entries["tokens"])
        numbers = entries["document"]
        entries["key"] = numbers if self.seed is None else shuffled_keys(numbers, self.seed)
        order = np.lexsort((numbers, entries["key"]))  # a stable sort: the pieces of a long document keep their order
        entries = entries[order]
        entries["start"] = _starts(entries["tokens"])
        with self._file(self._runs, "tokens").open("wb") as file:
            for chosen in _groups(entries["tokens"]):
                file.write(_take(tokens, starts[order[chosen]], entries["tokens"][chosen]).tobytes())
        np.save(self._file(self._runs, "npy"), entries)
        for path in (self._file(self._runs, "tokens"), self._file(self._runs, "npy"), self.folder):
            flush_to_disk(path)
        with atomic_path(self._file(self._runs, "json")) as temporary:
            temporary.write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
            flush_to_disk(temporary)
        self._runs += 1

    def threshold(self, fraction: float) -> int | None:
        """Return the largest content hash to hold out. Equal documents have equal hashes, so they share a split.

        A `fraction` of all documents, including those of other shards, has this hash or a smaller one. The result is
        None if that is less than half a document, or if no document would be left for training.
        """
        histogram, total, highest = np.zeros(_BINS, np.int64), 0, 0
        for hashes in self._hashes():
            histogram += np.bincount((hashes >> np.uint64(48)).astype(np.int64), minlength=_BINS)
            total += len(hashes)
            highest = max(highest, int(hashes.max(initial=0)))
        count = round(fraction * total)
        if not count:
            return None
        before = np.cumsum(histogram)
        bin_ = int(np.searchsorted(before, count))
        near = np.concatenate([h[(h >> np.uint64(48)) == np.uint64(bin_)] for h in self._hashes()])
        rank = count - (int(before[bin_ - 1]) if bin_ else 0)
        last = int(np.sort(near)[rank - 1])
        return None if last == highest else last

    def _hashes(self) -> Iterator[Array]:
        for run in range(self._runs):
            entries = self._entries(run)
            yield entries["hash"][entries["first"]]

    def _entries(self, run: int) -> Array:
        entries: Array = np.load(self._file(run, "npy"), mmap_mode="r")
        return entries

    def groups(self, *, shuffled: bool = True) -> Iterator[tuple[Array, Tokens]]:
        """Yield this shard's pieces in groups: their index entries, and their tokens one after another.

        Args:
            shuffled: whether to sort by key. Otherwise the order is that of the corpus; this needs the whole index in
                memory, and is meant for few documents.
        """
        borders = self._borders(shuffled)
        for slice_ in range(borders.shape[1] - 1):
            slices = []
            for run in range(self._runs):
                entries = self._entries(run)[borders[run, slice_] : borders[run, slice_ + 1]]
                own = entries[entries["own"]]
                slices.append((own, np.full(len(own), run)))
            entries, runs = (np.concatenate(column) for column in zip(*slices, strict=True))
            numbers = entries["document"]
            order = np.lexsort((numbers, entries["key"]) if shuffled else (numbers,))
            entries, runs = entries[order], runs[order]
            for chosen in _groups(entries["tokens"]):
                yield entries[chosen], self._gather(entries[chosen], runs[chosen])

    def _borders(self, shuffled: bool) -> Array:
        """Divide the keys into ranges that together have about as many entries as one run.

        Returns:
            One row for each run: the index at which each range begins there, and the number of entries.
        """
        sizes = [len(self._entries(run)) for run in range(self._runs)]
        count = max(1, -(-sum(sizes) // RUN_ENTRIES)) if shuffled else 1
        last = _LAST
        if self.seed is None:
            last = max((int(self._entries(run)["key"].max(initial=0)) for run in range(self._runs)), default=0) + 1
        edges = np.array([last * index // count for index in range(1, count)], np.uint64)
        inner = [np.searchsorted(np.ascontiguousarray(self._entries(run)["key"]), edges) for run in range(self._runs)]
        return np.array([[0, *inside, size] for inside, size in zip(inner, sizes, strict=True)], np.int64)

    def _gather(self, entries: Array, runs: Array) -> Tokens:
        """Read the tokens of pieces. Those that a group needs from one run are close together in its file."""
        parts, starts, held = [], np.empty(len(entries), np.int64), 0
        for run in np.unique(runs):
            here = runs == run
            in_run = entries[here]
            first, last = int(in_run["start"].min()), int((in_run["start"] + in_run["tokens"]).max())
            offset = first * self.dtype.itemsize
            parts.append(np.fromfile(self._file(int(run), "tokens"), self.dtype, last - first, offset=offset))
            starts[here] = in_run["start"].astype(np.int64) - first + held
            held += last - first
        together = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return _take(together, starts, entries["tokens"])


def _starts(sizes: Array) -> Array:
    """Return the start of each piece, if pieces of these sizes follow one another."""
    return np.concatenate(([0], np.cumsum(sizes[:-1], dtype=np.int64))) if len(sizes) else np.empty(0, np.int64)


def _take(tokens: Tokens, starts: Array, sizes: Array) -> Tokens:
    """Return the spans of tokens with these starts and sizes, joined."""
    ends = starts + sizes
    if (starts[1:] == ends[:-1]).all():
        return tokens[int(starts[0]) : int(ends[-1])]
    spans = zip(starts.tolist(), ends.tolist(), strict=True)
    return np.concatenate([tokens[start:end] for start, end in spans])


def _groups(sizes: Array) -> Iterator[slice]:
    """Yield slices of entries that have about `GROUP_TOKENS` tokens each."""
    ends = np.cumsum(sizes, dtype=np.int64)
    start = 0
    while start < len(sizes):
        base = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + GROUP_TOKENS, side="right")))
        yield slice(start, stop)
        start = stop
