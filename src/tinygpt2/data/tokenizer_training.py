"""Train a byte-level BPE tokenizer, and measure it on held-out text."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tinygpt2.config.data import TrainTokenizerConfig
from tinygpt2.data.corpus.sources import Corpus
from tinygpt2.data.encoding import encode
from tinygpt2.data.tokenizer import END_OF_TEXT
from tinygpt2.errors import DataError
from tinygpt2.utils.files import atomic_contents, require_free
from tinygpt2.utils.progress import track

_PASSAGE, _BORDER = 2000, re.compile(r"\S(?=\s)")

_REPORT = 1 << 24  # bytes of held-out text that the report is measured on, at most


@dataclass(frozen=True)
class TrainTokenizerResult:
    """What `train_tokenizer` did.

    `bytes_per_token` is measured on the `test_bytes` of held-out text; both say nothing where none is held out.
    """

    tokenizer: str
    vocab_size: int
    documents: int
    bytes: int
    test_bytes: int
    bytes_per_token: float | None
    encoding_errors: int
    seconds: float


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
    corpus = Corpus.of(config.source, config)
    share = _HeldOut(config.test_fraction)
    with track("train tokenizer", corpus.size_hint()) as task:
        backend.train_from_iterator(share.rest(corpus, task.advance), trainer=trainer)
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
    with atomic_contents(out) as temporary:
        tokenizer.save_pretrained(str(temporary))
    return TrainTokenizerResult(
        tokenizer=str(out.resolve()),
        vocab_size=len(tokenizer),
        documents=share.documents,
        bytes=share.bytes,
        test_bytes=size,
        bytes_per_token=size / tokens if tokens else None,
        encoding_errors=corpus.encoding_errors,
        seconds=time.perf_counter() - started,
    )


class _HeldOut:
    """A corpus in passages of about a page, some of which are kept from training, chosen by their content."""

    def __init__(self, fraction: float) -> None:
        self._limit = int(fraction * 2**32)
        self.documents = self.bytes = self._kept = 0
        self.texts: list[str] = []

    def rest(self, corpus: Corpus, advance: Callable[[int], None]) -> Iterator[str]:
        """Yield the passages to train on."""
        for piece in corpus.pieces():
            self.documents += piece.last
            start = 0
            while start < len(piece.text):
                # cut where the pre-tokeniser cuts too
                end = _BORDER.search(piece.text, start + _PASSAGE)
                passage = piece.text[start : end.end() if end else None]
                start += len(passage)
                raw = passage.encode()
                self.bytes += len(raw)
                advance(len(raw))
                if zlib.crc32(raw) >= self._limit:
                    yield passage
                elif self._kept < _REPORT:
                    self._kept += len(raw)
                    self.texts.append(passage)
