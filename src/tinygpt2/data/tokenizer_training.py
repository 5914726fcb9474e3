"""Train a byte-level BPE tokenizer, and measure it on held-out text."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tinygpt2.config.data import TrainTokenizerConfig
from tinygpt2.data.corpus.sources import Corpus
from tinygpt2.data.encoding import encode
from tinygpt2.data.tokenizer import END_OF_TEXT, vocabulary_size
from tinygpt2.errors import DataError, explained
from tinygpt2.runtime.signals import consumed_interruptibly
from tinygpt2.utils.files import require_free, staged_files
from tinygpt2.utils.locks import writes_out
from tinygpt2.utils.progress import ProgressStage, track

_PASSAGE, _BORDER = 2000, re.compile(r"\S(?=\s)")

_REPORT = 1 << 24  # most bytes of held-out text on which bytes per token is measured


@dataclass(frozen=True)
class TrainTokenizerResult:
    """The result of `train_tokenizer`.

    Attributes:
        tokenizer: the tokenizer's directory.
        vocab_size: its number of tokens.
        documents, bytes: sizes of the corpus, including held-out text.
        test_bytes: bytes of held-out text that were measured; 0 if no text was held out.
        bytes_per_token: measured on the held-out text; None if no text was held out.
        encoding_errors: number of documents with bytes that are not UTF-8.
        seconds: time that the training took.
    """

    tokenizer: str
    vocab_size: int
    documents: int
    bytes: int
    test_bytes: int
    bytes_per_token: float | None
    encoding_errors: int
    seconds: float


@writes_out
def train_tokenizer(config: TrainTokenizerConfig) -> TrainTokenizerResult:
    """Train a byte-level BPE on any language and save it in the Hugging Face layout.

    Raises:
        ConfigError: the output directory is not empty, or another run writes to it.
        MachineError: the disk is full.
        DataError: there is no text, or too little for a vocabulary of `vocab_size` tokens.
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
    corpus = Corpus.of(config.source, config)
    share = _HeldOut(config.test_fraction)
    with track("read the text", corpus.size_hint(), "bytes") as stage:
        train = partial(backend.train_from_iterator, trainer=trainer)
        consumed_interruptibly(train, share.rest(corpus, stage))
    if not share.documents:
        raise DataError(f"no text in {', '.join(config.source)}")
    if backend.get_vocab_size() < config.vocab_size:
        raise DataError(
            f"the text yields {backend.get_vocab_size()} tokens, fewer than --vocab-size {config.vocab_size}",
            f"give more text, or --vocab-size {backend.get_vocab_size()}",
        )
    tokenizer = GPT2TokenizerFast(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )
    tokens = sum(map(len, encode(tokenizer, share.texts)))
    size = sum(len(text.encode()) for text in share.texts)
    saving = explained(f"cannot save the tokenizer in {out}", "then run the command again")
    with saving, staged_files(out) as temporary:
        tokenizer.save_pretrained(str(temporary))
    return TrainTokenizerResult(
        tokenizer=str(out.resolve()),
        vocab_size=vocabulary_size(tokenizer),
        documents=share.documents,
        bytes=share.bytes,
        test_bytes=size,
        bytes_per_token=size / tokens if tokens else None,
        encoding_errors=corpus.encoding_errors,
        seconds=time.perf_counter() - started,
    )


class _HeldOut:
    """Divides a corpus into passages of about a page and holds some of them out. Their content decides which."""

    def __init__(self, fraction: float) -> None:
        self._limit = int(fraction * 2**32)
        self.documents = self.bytes = self._kept = 0
        self.texts: list[str] = []

    def rest(self, corpus: Corpus, stage: ProgressStage) -> Iterator[str]:
        """Yield the passages to train on, and report their bytes."""
        for piece in corpus.pieces():
            self.documents += piece.last
            start = 0
            while start < len(piece.text):
                # cut where the pre-tokenizer cuts too, but keep no long word: training takes the square of its length
                end = _BORDER.search(piece.text, start + _PASSAGE, start + 2 * _PASSAGE)
                passage = piece.text[start : end.end() if end else start + 2 * _PASSAGE]
                start += len(passage)
                raw = passage.encode()
                self.bytes += len(raw)
                stage.advance(len(raw))
                if zlib.crc32(raw) >= self._limit:
                    yield passage
                elif self._kept < _REPORT:
                    self._kept += len(raw)
                    self.texts.append(passage)
        stage.then("compute the merges")
