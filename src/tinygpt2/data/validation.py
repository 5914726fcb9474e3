"""Check that a pregenerated dataset agrees with its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinygpt2.data.batches.block_readers import MarkedPart, real_tokens
from tinygpt2.data.block_writers import MANIFEST, content_of
from tinygpt2.data.dataset import Blocks, load_packed_dataset
from tinygpt2.data.layout import shard_folders
from tinygpt2.data.tokenizer import fingerprint, vocabulary_size
from tinygpt2.errors import ConfigError, DataError, TinyGPT2Error, one_line
from tinygpt2.utils.files import read_json
from tinygpt2.utils.progress import track


def check_dataset(path: Path) -> Iterator[str]:
    """Yield one message for each fault of a pregenerated dataset, or of a folder with its shards."""
    folders = shard_folders(path)
    if folders:
        try:
            load_packed_dataset(str(path))
        except DataError as error:
            yield error.message
    for folder in folders or [path]:
        prefix = f"{folder.name}: " if folders else ""
        yield from (prefix + problem for problem in _check_folder(folder))


def _check_folder(path: Path) -> Iterator[str]:
    """Check the lengths, counts, range of tokens, padding, tokenizer and content of one dataset or shard."""
    try:
        packed = load_packed_dataset(str(path))
        tokenizer = packed.tokenizer()
    except ConfigError:  # a package is missing, which is no fault of the dataset
        raise
    except Exception as error:
        yield error.message if isinstance(error, TinyGPT2Error) else str(error)
        return
    if fingerprint(tokenizer) != packed.manifest.get("tokenizer_fingerprint"):
        yield f"tokenizer/ did not make this dataset: its fingerprint differs from the one in {MANIFEST}"
    for name, blocks in (("train", packed.train), ("test", packed.test)):
        counts = packed.manifest.get("splits", {}).get(name, {})
        if len(blocks) != counts.get("sequences"):
            yield f"{name}: there are {len(blocks)} sequences, but {MANIFEST} says {counts.get('sequences')}"
            continue
        if packed.manifest["format"] == "arrow":
            yield from _check_opens(path / name, len(blocks))
        if packed.manifest["format"] == "jsonl":
            yield from _check_metrics(path, name, len(blocks), packed.sequence_length)
        try:
            yield from _check_blocks(blocks, name, counts["files"], vocabulary_size(tokenizer))
        except Exception as error:
            yield f"{name}: {one_line(error)}"


def _check_opens(split: Path, sequences: int) -> Iterator[str]:
    """Check that plain `datasets` opens a split."""
    import datasets

    try:
        found = len(datasets.load_from_disk(str(split)))
    except Exception as error:  # broken files raise many kinds of exceptions
        yield f"{split.name}: datasets.load_from_disk cannot open it: {one_line(error)}"
        return
    if found != sequences:
        yield f"{split.name}: datasets.load_from_disk opens {found} sequences instead of {sequences}"


def _check_metrics(path: Path, split: str, sequences: int, length: int) -> Iterator[str]:
    try:
        metrics = read_json(path / f"{split}_metrics.json")
    except (OSError, ValueError) as error:
        yield f"{split}_metrics.json: {error}"
        return
    for key, expected in (("num_examples", sequences), ("max_seq_len", length)):
        if metrics.get(key) != expected:
            yield f"{split}_metrics.json: {key} is {metrics.get(key)}, not {expected}"


def _check_blocks(blocks: Blocks, split: str, files: list[dict[str, Any]], vocabulary: int) -> Iterator[str]:
    """Read every block, some at a time, and compare each file's tokens with its SHA-256."""
    waiting, sha, marks, left, number = list(files), hashlib.sha256(), hashlib.sha256(), 0, 0
    if sum(file["sequences"] for file in files) != len(blocks):
        listed = sum(file["sequences"] for file in files)
        yield f"{split}: there are {len(blocks)} sequences, but the files in {MANIFEST} have {listed}"
        return
    step = max(1, (1 << 20) // blocks.sequence_length)
    with track(f"check the {split} split", len(blocks), "blocks", announce=False) as stage:
        for part in blocks.parts:
            start = 0
            while start < len(part):
                while not left:
                    current = waiting.pop(0)
                    sha, marks, left = hashlib.sha256(), hashlib.sha256(), current["sequences"]
                ids, mask = part.read(start, min(start + step, start + left, len(part)))
                outside = (ids < 0) | (ids >= vocabulary)
                if outside.any():
                    row = number + int(outside.any(-1).argmax())
                    yield f"{split}: sequence {row} contains a token outside the vocabulary of {vocabulary}"
                    return
                if mask is not None:
                    real_tokens(mask, number)
                sha.update(content_of(ids))
                if isinstance(part, MarkedPart):
                    marks.update(part.marks(start, start + len(ids)).tobytes())
                start, left, number = start + len(ids), left - len(ids), number + len(ids)
                stage.advance(len(ids))
                if not left and sha.hexdigest() != current["sha256"]:
                    yield f"{current['name']}: its tokens are not the ones that were written (the SHA-256 differs)"
                if not left and marks.hexdigest() != current.get("marks_sha256", marks.hexdigest()):
                    yield f"{current['name']}: its marks are not the ones that were written (the SHA-256 differs)"
