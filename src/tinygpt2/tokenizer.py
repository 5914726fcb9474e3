"""Tokenizers: load any, train one, encode documents exactly as the tokenizer itself would.

Special tokens inside a text are never interpreted: `<|endoftext|>` in a web page is thirteen characters.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt2.config import TrainTokenizerConfig
from tinygpt2.corpus import documents, size_hint
from tinygpt2.errors import DataError, ModelError
from tinygpt2.files import atomic_contents, require_free
from tinygpt2.hub import local_directory
from tinygpt2.progress import Task, track

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast as Tokenizer

END_OF_TEXT = "<|endoftext|>"
_PROBE = "Hello, world! It's 2 o'clock;\n\tnaïve café, 你好, 🙂  <|endoftext|> ok."


@dataclass(frozen=True)
class TrainTokenizerResult:
    """What `train_tokenizer` did."""

    tokenizer: str
    vocab_size: int
    documents: int
    bytes: int
    seconds: float


def has_tokenizer(directory: Path) -> bool:
    """Say whether a directory holds a tokenizer's files."""
    return (directory / "tokenizer.json").is_file() or all(
        (directory / f).is_file() for f in ("vocab.json", "merges.txt")
    )


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer from a directory (vocab.json and merges.txt are enough) or the Hub.

    Raises:
        ModelError: there is none, or what there is loses text: an empty vocabulary can never pass.
    """
    directory = local_directory(name, "tokenizer")
    if not has_tokenizer(directory):
        raise ModelError(f"no tokenizer in {directory}: neither tokenizer.json nor vocab.json with merges.txt")
    from transformers import AutoTokenizer, GPT2TokenizerFast

    # AutoTokenizer refuses a folder of vocab.json and merges.txt alone; GPT-2's own class reads it.
    kind = AutoTokenizer if (directory / "tokenizer.json").is_file() else GPT2TokenizerFast
    try:
        tokenizer: Tokenizer = kind.from_pretrained(str(directory))
        ids = encode(tokenizer, [_PROBE])[0]
        kept = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    except Exception as error:  # whatever a broken file makes the library raise
        raise ModelError(f"cannot load the tokenizer in {directory}: {' '.join(str(error).split())}") from error
    byte_level = type(tokenizer.backend_tokenizer.decoder).__name__ == "ByteLevel"
    if not kept.strip() or (byte_level and kept.strip() != _PROBE):
        raise ModelError(f"the tokenizer in {directory} ({len(tokenizer)} tokens) loses text", "check its files")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text: no special token added, none interpreted."""
    return [ids for _, ids in encode_all(tokenizer, [texts])]


def encode_all(tokenizer: Tokenizer, groups: Iterable[list[str]], workers: int = 1) -> Iterator[tuple[str, list[int]]]:
    """Yield each text with its token ids, in order, whatever the number of worker processes.

    One worker is this process, with the tokenizer's own threads; more are processes that hold a batch each.
    """
    serialised = tokenizer.backend_tokenizer.to_str()
    if workers == 1:
        for group in groups:
            yield from zip(group, _encode_batch(_backend(serialised), group), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (serialised,)) as pool:
        waiting: deque[tuple[list[str], Future[list[list[int]]]]] = deque()
        for group in groups:
            waiting.append((group, pool.submit(_work, group)))
            if len(waiting) > 2 * workers:  # bounds what is in memory, whatever the corpus
                texts, future = waiting.popleft()
                yield from zip(texts, future.result(), strict=True)
        for texts, future in waiting:
            yield from zip(texts, future.result(), strict=True)


@lru_cache(maxsize=4)
def _backend(serialised: str) -> Backend:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(serialised)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
    return backend


_worker: Backend | None = None


def _start_worker(serialised: str) -> None:
    global _worker
    _worker = _backend(serialised)


def _work(texts: list[str]) -> list[list[int]]:
    assert _worker is not None
    return _encode_batch(_worker, texts)


def _encode_batch(backend: Backend, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def batches(texts: Iterable[str], size: int = 256, characters: int = 1 << 20) -> Iterator[list[str]]:
    """Group texts so that a batch holds at most `size` of them and about `characters` characters."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if len(batch) >= size or held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 over all that decides an encoding: vocabulary, merges, normaliser, pre-tokeniser.

    Equal for the same tokenizer in any layout (tokenizer.json, or vocab.json with merges.txt).
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = backend["model"].get("merges")
    parts = {
        "vocab": sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]),
        "merges": merges and [m if isinstance(m, str) else " ".join(m) for m in merges],
        "normalizer": backend["normalizer"],
        "pre_tokenizer": backend["pre_tokenizer"],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def train_tokenizer(config: TrainTokenizerConfig) -> TrainTokenizerResult:
    """Train a byte-level BPE on any language and save it in the Hugging Face layout.

    Raises:
        ConfigError: the output directory is not empty.
        DataError: no text, or too little for the size asked for.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import GPT2TokenizerFast

    started = time.perf_counter()
    out = Path(config.out)
    require_free(out, "give another --out")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    count = _Count()
    texts = documents(config.source, config.document, config.text_column)
    with track("train tokenizer", size_hint(config.source)) as task:
        backend.train_from_iterator(count.through(texts, task), trainer=trainer)
    if not count.documents:
        raise DataError(f"no text in {', '.join(config.source)}")
    if backend.get_vocab_size() < config.vocab_size:
        raise DataError(
            f"the text yields {backend.get_vocab_size()} tokens, fewer than --vocab-size {config.vocab_size}",
            f"give more text, or --vocab-size {backend.get_vocab_size()}",
        )
    tokenizer = GPT2TokenizerFast(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )
    with atomic_contents(out) as temporary:
        tokenizer.save_pretrained(str(temporary))
    seconds = time.perf_counter() - started
    return TrainTokenizerResult(str(out.resolve()), len(tokenizer), count.documents, count.bytes, seconds)


class _Count:
    """Counts what passes through."""

    def __init__(self) -> None:
        self.documents = 0
        self.bytes = 0

    def through(self, texts: Iterable[str], task: Task) -> Iterator[str]:
        for text in texts:
            size = len(text.encode())
            self.documents += 1
            self.bytes += size
            task.advance(size)
            yield text
