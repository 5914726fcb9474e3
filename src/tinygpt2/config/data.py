"""Options of the commands that read texts: `train-tokenizer` and `pregenerate`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from tinygpt2.config.base import Config, option
from tinygpt2.config.common import DEFAULT_SEQUENCE_LENGTH, MAX_SEED, RUN, TEXT

EncodingErrors = Literal["strict", "replace", "skip"]
Format = Literal["arrow", "hdf5", "jsonl"]


class SourceOptions(Config):
    """Where text comes from: shared by the commands that take sources."""

    source: list[str] = option(
        ...,
        "Files (text, jsonl, json, csv, parquet, arrow, tar; packed or plain), directories, patterns in quotes, "
        "- (stdin), python-docs, or a data set on the Hub (NAME:CONFIGURATION@SPLIT) or saved to disk.",
        positional=True,
    )


class TextOptions(Config):
    """How texts become documents: shared by every command that reads sources."""

    document: str | None = option(
        None,
        "What one document is in a text file: file, line, blank-line or separator:REGEX.",
        panel=TEXT,
        shown="file; a row of a table or of JSON is one",
    )
    text_column: str = option("text", "Field or column that holds the text of a row.", panel=TEXT)
    encoding_errors: EncodingErrors = option(
        "strict",
        "What to do with what is not UTF-8: stop, put a replacement character, or skip the document.",
        panel=TEXT,
    )

    def conflicts(self) -> Iterator[str]:
        """Check the document rule."""
        rule = self.document
        if rule is not None and rule.startswith("separator:"):
            pattern = rule.removeprefix("separator:")
            try:
                if re.compile(pattern).fullmatch(""):
                    yield f"--document separator:{pattern}: the pattern matches the empty string"
            except re.error as error:
                yield f"--document separator:{pattern}: not a regular expression ({error})"
        elif rule not in (None, "file", "line", "blank-line"):
            yield f"--document {rule!r}: expected file, line, blank-line or separator:REGEX"


class TrainTokenizerConfig(TextOptions, SourceOptions):
    """Options of `train-tokenizer`."""

    out: str = option(..., "Directory for the tokenizer.")
    vocab_size: int = option(50257, "Exact size of the vocabulary, <|endoftext|> included.", ge=257)
    test_fraction: float = option(
        0.01, "Share of the text held out, to report bytes per token on.", panel=TEXT, ge=0, lt=1
    )


class PackOptions(TextOptions):
    """How documents become packed blocks."""

    test_fraction: float = option(0.05, "Share of the documents held out.", panel=TEXT, ge=0, lt=1)
    append_eos: bool = option(True, "End every document with the end-of-text token.", panel=TEXT)
    num_workers: int | None = option(None, "Threads that tokenise.", panel=RUN, ge=1, shown="one per core")
    shuffle: bool = option(True, "Shuffle the training documents before they are packed.", panel=TEXT)


class PregenerateConfig(PackOptions, SourceOptions):
    """Options of `pregenerate`."""

    sequence_length: int = option(DEFAULT_SEQUENCE_LENGTH, "Tokens in a block.", panel=TEXT, ge=2)
    tokenizer: str = option(
        ..., "Tokenizer: a local directory, a Hub id, or one of tiktoken's, such as tiktoken:cl100k_base."
    )
    out: str = option(..., "Directory for the dataset.")
    stride: int | None = option(None, "Tokens from one block's start to the next.", ge=1, shown="the sequence length")
    test_source: list[str] | None = option(
        None, "Held-out text of its own, in its own order; --test-fraction is then unused."
    )
    seed: int = option(42, "Seed of the order and of the choice of held-out documents.", ge=0, le=MAX_SEED)
    format: Format = option("arrow", "What is written: for datasets, for Cerebras' GPT-2, or for TinyGPT2.")
    shard: str | None = option(None, "Make only part I of N, written I/N, of what one run would make.")
    overwrite: bool = option(False, "Replace an existing dataset in --out once the new one is complete.")
    resume: bool = option(False, "Continue an interrupted run, if there is one.")

    @property
    def shard_numbers(self) -> tuple[int, int]:
        """Which part to make, from 1, and of how many."""
        part, _, parts = (self.shard or "1/1").partition("/")
        return int(part), int(parts)

    def conflicts(self) -> Iterator[str]:
        """Check the stride against the length, and the part."""
        yield from super().conflicts()
        if self.resume and "-" in [*self.source, *(self.test_source or [])]:
            yield "--resume cannot go on with standard input, which is not there a second time"
        if self.shard is not None and not re.fullmatch(r"\d{1,9}/\d{1,9}", self.shard):
            yield f"--shard {self.shard!r}: expected I/N, such as 1/8"
        elif not 1 <= self.shard_numbers[0] <= self.shard_numbers[1]:
            yield f"--shard {self.shard}: the first of N parts is 1/N, the last N/N"
        length = self.sequence_length
        if self.stride is not None and self.stride > length:
            yield f"--stride {self.stride} is beyond --sequence-length {length}: tokens between blocks would be lost"
