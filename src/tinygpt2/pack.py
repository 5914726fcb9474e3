"""Documents to packed blocks on disk: `pregenerate`.

One pass tokenises and spills the tokens to a temporary file, so that memory grows with the longest document
and a few numbers for each, not with the corpus; a second pass writes each split's blocks. The result is an
Arrow dataset that plain `datasets` opens.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt2.config import PregenerateConfig
from tinygpt2.corpus import documents, size_hint
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.files import atomic_path, require_free, write_json
from tinygpt2.progress import say, track
from tinygpt2.tokenizer import batches, encode_all, fingerprint, load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast as Tokenizer

MANIFEST = "pregenerate.json"
_TOKENS = 1 << 20  # gathered before they are written as blocks
_Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class SplitCounts:
    """What one split holds. `tokens` are before packing, `dropped_tokens` the tail that fills no block."""

    documents: int
    bytes: int
    tokens: int
    sequences: int
    dropped_tokens: int


@dataclass(frozen=True)
class PregenerateResult:
    """What `pregenerate` made."""

    documents: int
    bytes: int
    tokens: int
    sequences: dict[str, int]
    seconds: float


@dataclass(frozen=True)
class _Spill:
    """A corpus as tokens in a file, with each document's end (in tokens), size (in bytes) and seeded hash."""

    tokens: _Array
    ends: _Array
    sizes: _Array
    hashes: _Array

    def select(self, chosen: _Array) -> _Stream:
        """Return the chosen documents (a mask over documents), in corpus order."""
        starts = np.concatenate(([0], self.ends[:-1]))
        pieces = [self.tokens[start:end] for start, end in zip(starts[chosen], self.ends[chosen], strict=True)]
        return _Stream(pieces, int(chosen.sum()), int(self.sizes[chosen].sum()))


@dataclass(frozen=True)
class _Stream:
    """The tokens of one split, in pieces."""

    pieces: list[_Array]
    documents: int
    bytes: int


def pregenerate(config: PregenerateConfig) -> PregenerateResult:
    """Tokenise, split and pack a corpus.

    Train and test are split by document: the documents whose seeded content hashes are smallest are held
    out, in the proportion asked for, so that a repeated document is never on both sides. Where that share
    is less than half a document, the last part of the tokens is held out instead, cut at a block border.

    Raises:
        ConfigError: the output directory is not empty, or the tokenizer has no end-of-text token.
        DataError: a source cannot be read, or there is less text than one block.
        ModelError: the tokenizer cannot be had.
    """
    started = time.perf_counter()
    out = Path(config.out).resolve()
    if not config.overwrite:
        require_free(out, "give another --out, or --overwrite to replace it")
    elif out.exists() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ConfigError(f"--out {out} holds no {MANIFEST}", "--overwrite replaces pregenerated datasets only")
    tokenizer = load_tokenizer(config.tokenizer)
    if config.append_eos and tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer {config.tokenizer} has no end-of-text token", "add --no-append-eos")
    length = config.sequence_length
    with _scratch(out) as scratch:
        corpus = _spill(config.source, tokenizer, config, scratch / "train")
        held_out = _spill(config.test_source, tokenizer, config, scratch / "test") if config.test_source else None
        how, streams = _split(corpus, held_out, config.test_fraction, length)
        with atomic_path(out) as temporary:
            counts = _write(temporary, streams, length, config.stride or length)
            tokenizer.save_pretrained(str(temporary / "tokenizer"))
            write_json(temporary / MANIFEST, _manifest(config, tokenizer, length, how, counts))
    if counts["test"].sequences == 0:
        say(f"warning: the held-out text fills no block of {length} tokens: the test split is empty")
    return PregenerateResult(
        documents=sum(split.documents for split in counts.values()),
        bytes=sum(split.bytes for split in counts.values()),
        tokens=sum(split.tokens for split in counts.values()),
        sequences={name: split.sequences for name, split in counts.items()},
        seconds=time.perf_counter() - started,
    )


def _manifest(
    config: PregenerateConfig, tokenizer: Tokenizer, length: int, how: str, counts: dict[str, SplitCounts]
) -> dict[str, Any]:
    return {
        "format": 1,
        "sources": config.source,
        "test_sources": config.test_source,
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "sequence_length": length,
        "stride": config.stride or length,
        "append_eos": config.append_eos,
        "seed": config.seed,
        "split": how,
        "splits": {name: asdict(split) for name, split in counts.items()},
    }


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Yield a temporary directory on the disk that will hold the result."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as scratch:
        yield Path(scratch)


def _spill(sources: list[str], tokenizer: Tokenizer, config: PregenerateConfig, file: Path) -> _Spill:
    """Tokenise the sources into a file.

    Raises:
        DataError: a source cannot be read, or there is no text.
    """
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    eos = [tokenizer.eos_token_id] if config.append_eos else []
    key = config.seed.to_bytes(8, "big")
    ends, sizes, hashes = [], [], []
    written = 0
    texts = batches(documents(sources, config.document, config.text_column))
    with track("tokenise", size_hint(sources)) as task, file.open("wb") as stream:
        for text, ids in encode_all(tokenizer, texts, config.num_workers):
            stream.write(np.array(ids + eos, dtype).tobytes())
            raw = text.encode()
            written += len(ids) + len(eos)
            ends.append(written)
            sizes.append(len(raw))
            hashes.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=key).digest(), "big"))
            task.advance(len(raw))
    if not written:
        raise DataError(f"no text in {', '.join(sources)}", "every document is empty or blank")
    tokens = np.memmap(file, dtype, "r", shape=(written,))
    return _Spill(tokens, np.array(ends), np.array(sizes), np.array(hashes, np.uint64))


def _split(corpus: _Spill, held_out: _Spill | None, fraction: float, length: int) -> tuple[str, dict[str, _Stream]]:
    """Choose what is held out; return how it was chosen, and both streams.

    Raises:
        DataError: the training text is shorter than one block.
    """
    everything = np.ones(len(corpus.ends), bool)
    count = round(fraction * len(everything))
    # Whole groups of equal hashes, so that a repeated document is never on both sides
    chosen = corpus.hashes <= np.sort(corpus.hashes)[count - 1] if count else ~everything
    if held_out is not None:
        how, test = "source", held_out.select(np.ones(len(held_out.ends), bool))
        train = corpus.select(everything)
    elif count and not chosen.all():
        how, train, test = "document", corpus.select(~chosen), corpus.select(chosen)
    else:
        how = "position"
        train, test = _split_by_position(corpus, fraction, length)
    have = sum(len(piece) for piece in train.pieces)
    if have < length:
        raise DataError(
            f"the text is {len(corpus.tokens)} tokens, {have} of them for training: shorter than one block of {length}",
            "give more text or a smaller --sequence-length",
        )
    return how, {"train": train, "test": test}


def _split_by_position(corpus: _Spill, fraction: float, length: int) -> tuple[_Stream, _Stream]:
    """Hold out the last part of the tokens, cut at a block border: one block at least, if any is asked for."""
    blocks, size, total = len(corpus.tokens) // length, int(corpus.sizes.sum()), len(corpus.tokens)
    held_out = min(max(1, round(fraction * blocks)), blocks - 1) if fraction and blocks else 0
    cut = (blocks - held_out) * length if held_out else total
    train = _Stream([corpus.tokens[:cut]], len(corpus.ends), size * cut // total)
    return train, _Stream([corpus.tokens[cut:]], 0, size - train.bytes)


def _write(out: Path, streams: dict[str, _Stream], length: int, stride: int) -> dict[str, SplitCounts]:
    """Write each stream's blocks as one split of an Arrow dataset."""
    import datasets

    out.mkdir()
    counts, splits = {}, {}
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        for name, stream in streams.items():
            file = Path(scratch) / f"{name}.arrow"
            splits[name], counts[name] = _write_split(file, name, stream, length, stride)
        # The library would write an empty split as no file at all, and then not open it.
        shards = {name: None if len(split) else 1 for name, split in splits.items()}
        datasets.DatasetDict(splits).save_to_disk(str(out), num_shards=shards)
    return counts


def _write_split(file: Path, name: str, stream: _Stream, length: int, stride: int) -> tuple[Dataset, SplitCounts]:
    import datasets
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    dtype = stream.pieces[0].dtype if stream.pieces else np.dtype(np.uint16)
    features = datasets.Features({"input_ids": datasets.List(datasets.Value(dtype.name), length=length)})
    content = hashlib.sha256(f"{name} {length} {stride} {dtype}".encode())
    sequences = 0
    with ArrowWriter(path=str(file), features=features) as writer:
        for rows in _blocks(stream.pieces, length, stride):
            content.update(rows.tobytes())
            column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), length)
            writer.write_table(pa.table({"input_ids": column}, schema=features.arrow_schema))
            sequences += len(rows)
        writer.finalize()
    tokens = sum(len(piece) for piece in stream.pieces)
    used = (sequences - 1) * stride + length if sequences else 0
    if sequences:
        dataset = datasets.Dataset.from_file(str(file), split=name)
    else:
        dataset = datasets.Dataset.from_dict({"input_ids": []}, features, split=name)
    dataset._fingerprint = content.hexdigest()[:16]  # from content: the library's own is random
    return dataset, SplitCounts(stream.documents, stream.bytes, tokens, sequences, tokens - used)


def _blocks(pieces: list[_Array], length: int, stride: int) -> Iterator[_Array]:
    """Yield arrays of blocks (rows, length), about `_TOKENS` tokens each, from a stream in pieces."""
    pending = np.empty(0, pieces[0].dtype if pieces else np.uint16)
    held: list[_Array] = []
    size = 0
    for index, piece in enumerate(pieces):
        held.append(piece)
        size += len(piece)
        if size < _TOKENS and index + 1 < len(pieces):
            continue
        pending = np.concatenate([pending, *held])
        held, size = [], 0
        count = (len(pending) - length) // stride + 1 if len(pending) >= length else 0
        if count:
            windows = np.lib.stride_tricks.sliding_window_view(pending, length)[::stride][:count]
            yield np.ascontiguousarray(windows)
            pending = pending[count * stride :]
