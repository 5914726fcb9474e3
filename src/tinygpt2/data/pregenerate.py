"""Make a dataset of packed blocks from documents: the `pregenerate` command.

The first pass tokenizes the documents and writes the tokens to disk in sorted runs. Memory therefore does not grow with
the corpus, and an interrupted run can continue. The second pass merges the runs and writes the blocks of each split.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt2.config.data import PregenerateConfig, is_stream
from tinygpt2.config.decoding import SampleConfig
from tinygpt2.data.batches.documents import documents_of
from tinygpt2.data.block_writers import MANIFEST, SplitWriter, totals
from tinygpt2.data.corpus.piecewise import joined_pieces, splits_at_white_space
from tinygpt2.data.corpus.sources import Corpus, Piece
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.encoding import Encoder, in_order, parsed
from tinygpt2.data.external_sort import EncodedBatch, ExternalSort, content_hash
from tinygpt2.data.layout import dataset_folders
from tinygpt2.data.pairs import described, make_pairs, require_pairs
from tinygpt2.data.splits import divide, training_tokens
from tinygpt2.data.staging import (
    discard,
    is_unfinished,
    put_back,
    put_in_place,
    require_same,
    staging_directory,
    staging_path,
)
from tinygpt2.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.runtime.cpu import usable_cores
from tinygpt2.utils.files import read_json, require_free, require_replaceable, write_json
from tinygpt2.utils.locks import writes_out
from tinygpt2.utils.progress import detail, say, track, warn
from tinygpt2.utils.types import Tokens

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

_BATCH_PIECES, _BATCH_CHARACTERS = 4096, 1 << 19  # most that one worker tokenizes at a time


@dataclass(frozen=True)
class PregenerateResult:
    """The sizes of the dataset that `pregenerate` made.

    Attributes:
        documents, bytes, tokens: sizes of the text in both splits together.
        sequences: number of blocks in each split.
        encoding_errors: number of documents in the whole corpus with bytes that are not UTF-8.
        empty_documents: number of blank documents in the whole corpus, such as rows without a text. They are left out.
        seconds: time that this run took.
    """

    documents: int
    bytes: int
    tokens: int
    sequences: dict[str, int]
    encoding_errors: int
    empty_documents: int
    seconds: float


def check_output(config: PregenerateConfig | SampleConfig) -> tuple[Path, bool]:
    """Check that the dataset may be written, and return its directory and whether a complete one is there.

    Raises:
        ConfigError: the directory is not empty, and the options say neither to replace nor to continue what is there.
    """
    out = Path(config.out).resolve()
    require_replaceable(out)
    complete = (out / MANIFEST).is_file()
    if config.overwrite and out.is_dir() and any(out.iterdir()) and not complete:
        raise ConfigError(f"--out {out} contains no {MANIFEST}", "--overwrite replaces only pregenerated datasets")
    if not config.overwrite and not (config.resume and complete):
        require_free(out, "give another --out, add --overwrite to replace it, or add --resume to continue a run")
    return out, complete


@writes_out
def pregenerate(config: PregenerateConfig) -> PregenerateResult:
    """Tokenize, split, shuffle and pack a corpus of documents, or of pairs of prompt and response: see `pairs`.

    The text is split by document: a share `test_fraction` of all documents is held out, namely those with the smallest
    seeded content hashes. A repeated document is therefore never in both splits. If that share is less than half a
    document, the last part of the tokens is held out instead, cut at a block border.

    Raises:
        ConfigError: the output directory is not empty, another run writes to it, an interrupted run left unfinished
            work (see `resume` and `overwrite`) or had other settings, or the tokenizer has no end-of-text token.
        DataError: a source cannot be read, or there is less text than one block.
        MachineError: the disk is full.
        ModelError: the tokenizer was not found or cannot be loaded.
    """
    started = time.perf_counter()
    put_back(Path(config.out).resolve())
    out, complete = check_output(config)
    tokenizer = load_tokenizer(config.tokenizer)
    config, corpus, held_out = _corpora(config)
    paired = require_pairs(corpus, held_out, config)
    if config.append_eos and tokenizer.eos_token_id is None:
        hint = "pairs need a tokenizer that has one" if paired else "add --no-append-eos"
        raise ConfigError(f"the tokenizer {config.tokenizer} has no end-of-text token", hint)
    settings = {**_settings(config, tokenizer, corpus, held_out), **described(corpus)}
    if config.resume and complete and not config.overwrite and not is_unfinished(out):
        manifest = read_json(out / MANIFEST)
        require_same({key: settings[key] for key in settings if key != "read"}, manifest, out)
        say(f"{out} is already complete")
        discard(staging_path(out))
        return _result(manifest, time.perf_counter() - started)
    again = not any(map(is_stream, [*config.source, *(config.test_source or [])]))
    with staging_directory(out, settings, resume=config.resume, overwrite=config.overwrite, again=again) as work:
        result = work / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        del settings["read"]  # names and times of files: the result depends only on their content
        make = make_pairs if paired else _packed
        manifest = {**settings, **make(result, corpus, held_out, tokenizer, config)}
        if datasets := {item.dataset: None for item in corpus.items if item.dataset}:
            manifest["hub_datasets"] = list(datasets)
        tokenizer.save_pretrained(str(result / "tokenizer"))
        write_json(result / MANIFEST, manifest)
        put_in_place(result, out)
    return _result(manifest, time.perf_counter() - started)


def _packed(
    out: Path, corpus: Corpus, held_out: Corpus | None, tokenizer: Tokenizer, config: PregenerateConfig
) -> dict[str, Any]:
    """Tokenize and pack the documents, and return the manifest's entries that describe them."""
    encoder, work = Encoder(tokenizer), out.parent
    eos = tokenizer.eos_token_id if config.append_eos else None
    apart = encoder.reproduced or splits_at_white_space(parsed(tokenizer.backend_tokenizer.to_str()))
    read = _tokenize(corpus, encoder, eos, config, work / "train", config.seed if config.shuffle else None, apart)
    kept = _tokenize(held_out, encoder, eos, config, work / "test", None, apart) if held_out else None
    return _write(out, read, kept, config, encoder.dtype)


def _corpora(config: PregenerateConfig) -> tuple[PregenerateConfig, Corpus, Corpus | None]:
    """Return the texts, those of the held-out split if they are given, and the options that they leave."""
    if config.from_dataset is None:
        kinds = ("validation", "test")
        held_out = Corpus.of(config.test_source, config, kinds) if config.test_source else None
        return config, Corpus.of(config.source, config), held_out
    name = config.from_dataset
    shards = [load_packed_dataset(str(folder)) for folder in dataset_folders(name)]
    if any(one.train.marked for one in shards):
        raise ConfigError(
            f"--from-dataset {name}: its blocks mark which tokens count, and a text has no such marks",
            "make the dataset from its source again",
        )
    config = config.model_copy(update={"source": [name], "shuffle": False, "test_fraction": 0.0})
    corpora = [Corpus.of(config.source, config), Corpus.of(config.source, config)]
    for corpus, split in zip(corpora, ("train", "test"), strict=True):  # no document goes over from shard to shard
        corpus.given = [documents_of(getattr(one, split), one.manifest, one.tokenizer(), name) for one in shards]
    return config, corpora[0], corpora[1] if any(len(one.test) for one in shards) else None


def _result(manifest: dict[str, Any], seconds: float) -> PregenerateResult:
    splits = manifest["splits"]
    if splits["test"]["sequences"] == 0 and (manifest["test_fraction"] or manifest["test_sources"]):
        warn(
            f"the held-out text is shorter than one block of {manifest['sequence_length']} tokens: "
            "the test split is empty"
        )
    return PregenerateResult(
        **totals(splits),
        sequences={name: split["sequences"] for name, split in splits.items()},
        **{key: manifest.get(key, 0) for key in ("encoding_errors", "empty_documents")},
        seconds=seconds,
    )


def _settings(
    config: PregenerateConfig, tokenizer: Tokenizer, corpus: Corpus, held_out: Corpus | None
) -> dict[str, Any]:
    """Return everything that the result depends on, as JSON values."""
    items = [item for part in (corpus, held_out) if part for item in part.items]
    return {
        "version": 2,
        "format": config.format,
        "sources": config.source,
        "test_sources": config.test_source,
        "document": config.document,
        "input_format": None if config.input_format == "auto" else config.input_format,
        "text_column": config.text_column,
        "on_encoding_errors": config.encoding_errors,
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "vocab_size": vocabulary_size(tokenizer),
        "sequence_length": config.sequence_length,
        "stride": config.stride or config.sequence_length,
        "append_eos": config.append_eos,
        "eos_token_id": tokenizer.eos_token_id,
        "shuffle": config.shuffle,
        "seed": config.seed,
        "test_fraction": config.test_fraction,
        "shard": list(config.shard_numbers),
        "read": hashlib.sha256(json.dumps([(item.name, item.mark) for item in items]).encode()).hexdigest(),
    }


@dataclass(frozen=True)
class _Item:
    """A piece to encode.

    Attributes:
        piece: the text.
        hash: the hash of its document's beginning.
        first: whether it is the first piece of its document.
        own: whether it belongs to this shard.
    """

    piece: Piece
    hash: int
    first: bool
    own: bool


def _items(pieces: Iterable[Piece], config: PregenerateConfig) -> Iterator[_Item]:
    shard, shards = config.shard_numbers
    first, hash_ = True, 0
    for piece in pieces:
        hash_ = content_hash(piece.text, config.seed) if first else hash_
        yield _Item(piece, hash_, first, piece.number % shards == shard - 1)
        first = piece.last


def _batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Group items into batches that are large enough for a thread and small compared to the memory."""
    batch: list[_Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += len(item.piece.text)
        if len(batch) >= _BATCH_PIECES or held >= _BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _encode(batch: list[_Item], encoder: Encoder, eos: Tokens) -> EncodedBatch:
    encoded = iter(encoder([item.piece.text for item in batch if item.own]))
    rows, parts = [], [eos[:0]]
    for item in batch:
        ids = next(encoded) if item.own else eos[:0]
        end = eos if item.own and item.piece.last else eos[:0]
        size = len(item.piece.text.encode()) if item.own else 0
        rows.append((item.piece.number, item.hash, len(ids) + len(end), size, item.first, item.own))
        parts += [ids, end]
    return EncodedBatch.of(rows, parts)


def _tokenize(
    corpus: Corpus,
    encoder: Encoder,
    eos: int | None,
    config: PregenerateConfig,
    folder: Path,
    seed: int | None,
    apart: bool,
) -> ExternalSort:
    """Tokenize the documents that an earlier run has not tokenized yet, the parts of long ones `apart` or joined.

    Raises:
        DataError: a source cannot be read, or there is no text.
    """
    sort = ExternalSort(folder, encoder.dtype, seed)
    end = np.array([] if eos is None else [eos], encoder.dtype)
    if not sort.progress.done:
        pieces = corpus.pieces() if apart else joined_pieces(corpus, config.tokenizer)
        items = islice(_items(pieces, config), sort.progress.pieces, None)
        workers = config.num_workers or usable_cores()
        detail(f"{workers} threads encode, {'parts of long documents apart' if apart else 'whole documents'}")
        encode = partial(_encode, encoder=encoder, eos=end)
        size = corpus.size_hint()
        with track("tokenize", size and size // config.shard_numbers[1], "bytes", done=sort.progress.bytes) as task:
            for batch in in_order(encode, _batches(items), workers):
                sort.add(batch)
                task.advance(int(batch.entries["bytes"].sum()))
            sort.finish(corpus.encoding_errors, corpus.empty_documents)
    if not sort.progress.pieces:
        raise DataError(f"no text in {', '.join(corpus.sources)}", "every document is empty or blank")
    return sort


def _write(
    out: Path, read: ExternalSort, kept: ExternalSort | None, config: PregenerateConfig, dtype: np.dtype[Any]
) -> dict[str, Any]:
    """Choose the held-out text and write both splits. Return the entries of the manifest that describe them.

    Raises:
        DataError: the training text is shorter than one block, or there are too few documents for the shards.
    """
    length, fraction = config.sequence_length, 0.0 if kept else config.test_fraction
    last, total, shards = read.threshold(fraction), read.progress.tokens, config.shard_numbers[1]
    if not read.progress.documents:
        raise DataError(f"--shard {config.shard} has no documents", f"there are fewer documents than {shards} shards")
    if last is None and fraction and shards > 1:
        raise DataError(
            f"there are too few documents for --test-fraction {fraction} to hold out any, and a shard cannot hold out "
            "the end of the text instead",
            "give --test-fraction 0 or --test-source, or leave --shard out",
        )
    how = "source" if kept else "position" if last is None else "document"
    cut = training_tokens(total, length, fraction) if last is None else None
    shape = (length, config.stride or length, dtype, config.format)
    with SplitWriter(out, "train", *shape) as train, SplitWriter(out, "test", *shape) as test:
        sizes = divide(read, kept, last, cut, train, test)
    if cut is not None and not kept:
        sizes[1, 1] = int(sizes[0, 1]) * (total - cut) // total  # their product may need more than 64 bits
        sizes[0, 1] -= sizes[1, 1]
    if train.tokens < length:
        whole = train.tokens == total
        what = (
            f"the text has {total} tokens" if whole else f"the training text has {train.tokens} of the {total} tokens"
        )
        raise DataError(f"{what}: it is shorter than one block of {length}", "give more text, or make shorter blocks")
    splits = {
        name: writer.entry(int(size[0]), int(size[1]))
        for (name, writer), size in zip({"train": train, "test": test}.items(), sizes, strict=True)
    }
    counts = {
        key: sum(getattr(part.progress, key) for part in (read, kept) if part)
        for key in ("encoding_errors", "empty_documents")
    }
    return {"split": how, **counts, "splits": splits}
