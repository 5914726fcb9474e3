"""Options of the commands that read texts: `train-tokenizer` and `pregenerate`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from tinygpt2.config.base import Config, option
from tinygpt2.config.common import DEFAULT_SEQUENCE_LENGTH, MAX_SEED, RUN, TEXT

# what finds documents and divides them
_OF_TEXTS = (
    "prompt_column", "response_column", "document", "text_column", "input_format", "encoding_errors", "test_fraction",
    "shuffle",
)  # fmt: skip

EncodingErrors = Literal["strict", "replace", "skip"]
Format = Literal["arrow", "hdf5", "jsonl"]
InputFormat = Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]


H5PY_HINT = "run pip install 'tinygpt2[hdf5]'"
_SOURCES = (
    "Files, directories, patterns in quotes, - (standard input), python-docs, or datasets. Files may be text, "
    "jsonl, json, csv, tsv, parquet, arrow, tar or zip, compressed or not. A dataset is saved to disk, or on the "
    "Hub as NAME:CONFIGURATION@SPLIT."
)


def is_stream(source: str) -> bool:
    """Return whether a source is standard input, a pipe or a device, which cannot be read twice."""
    path = Path(source)
    return source == "-" or (path.exists() and not path.is_file() and not path.is_dir())


class SourceOptions(Config):
    """Where text comes from."""

    source: list[str] = option(_SOURCES, positional=True, path=True, metavar="SOURCE")


class FileOptions(Config):
    """How files of text are read."""

    input_format: InputFormat = option(
        "Format of every file. auto goes by the ending of the name and, where that does not tell, by the content.",
        default="auto",
        panel=TEXT,
    )
    text_column: str = option(
        "Field or column that holds the text of a row.", default="text", panel=TEXT, metavar="NAME"
    )


class TextOptions(FileOptions):
    """How texts are divided into documents."""

    document: str | None = option(
        "What is one document in a text file.",
        default=None,
        panel=TEXT,
        shown="file; in JSON and tables, a row",
        metavar="file|line|blank-line|separator:REGEX",
    )
    encoding_errors: EncodingErrors = option(
        "What to do with text that is not UTF-8: strict stops with an error, replace inserts U+FFFD, skip leaves the "
        "document out.",
        default="strict",
        panel=TEXT,
    )

    def conflicts(self) -> Iterator[str]:
        """Check the document rule."""
        yield from super().conflicts()
        rule = self.document
        if rule is not None and rule.startswith("separator:"):
            pattern = rule.removeprefix("separator:")
            try:
                if re.compile(pattern).fullmatch(""):
                    yield f"--document separator:{pattern}: the pattern matches the empty string"
            except (re.error, OverflowError, RecursionError) as error:
                yield f"--document separator:{pattern}: not a regular expression ({error})"
        elif rule not in (None, "file", "line", "blank-line"):
            yield f"--document: expected file, line, blank-line or separator:REGEX, got {rule!r}"


class TrainTokenizerConfig(TextOptions, SourceOptions):
    """Options of `train-tokenizer`."""

    out: str = option("Directory for the tokenizer.", path=True)
    vocab_size: int = option("Exact size of the vocabulary, <|endoftext|> included.", default=50257, ge=257)
    test_fraction: float = option(
        "Share of the text to hold out. The tokenizer's bytes per token are measured on it.",
        default=0.01,
        panel=TEXT,
        ge=0,
        lt=1,
    )


class PairOptions(Config):
    """Which columns of rows hold prompts and responses."""

    prompt_column: str | None = option(
        "Field or column of a row that holds the prompt. The loss counts the response alone.",
        default=None,
        panel=TEXT,
        metavar="NAME",
    )
    response_column: str | None = option(
        "Field or column of a row that holds the response.", default=None, panel=TEXT, metavar="NAME"
    )
    template: str | None = option(
        "File with a text that has {prompt} and {response}: how a pair is written. It also serves chats, which are "
        "rows with a list of messages.",
        default=None,
        panel=TEXT,
        path=True,
        shown="the prompt, a line end, the response",
    )

    def conflicts(self) -> Iterator[str]:
        """Require both columns or none."""
        yield from super().conflicts()
        if (self.prompt_column is None) != (self.response_column is None):
            missing = "--prompt-column" if self.prompt_column is None else "--response-column"
            yield f"{missing} is missing: a pair has a prompt and a response"


class PackOptions(PairOptions, TextOptions):
    """How documents become blocks of tokens."""

    test_fraction: float = option(
        "Share of the documents to hold out for evaluation.", default=0.05, panel=TEXT, ge=0, lt=1
    )
    append_eos: bool = option("End every document with the end-of-text token.", default=True, panel=TEXT)
    num_workers: int | None = option(
        "Threads for tokenizing. The result does not depend on it.",
        default=None,
        panel=RUN,
        ge=1,
        shown="one per core",
    )
    shuffle: bool = option("Shuffle the training documents before they are packed.", default=True, panel=TEXT)


class PregenerateConfig(PackOptions, SourceOptions):
    """Options of `pregenerate`."""

    source: list[str] = option(
        _SOURCES, default=[], positional=True, path=True, metavar="SOURCE", required="without --from-dataset"
    )
    from_dataset: str | None = option(
        "Encode the text of a pregenerated dataset again, such as in the tokens of a student with a smaller "
        "vocabulary. Its splits and the order of its documents stay.",
        default=None,
        path=True,
        panel=TEXT,
    )
    sequence_length: int = option("Tokens in a block.", default=DEFAULT_SEQUENCE_LENGTH, panel=TEXT, ge=2)
    tokenizer: str = option(
        "Tokenizer: a local directory, a Hub id, or one of tiktoken's, such as tiktoken:cl100k_base.",
        path=True,
        metavar="PATH|ID",
    )
    out: str = option("Directory for the dataset.", path=True)
    stride: int | None = option(
        "Tokens from the start of one block to the start of the next. Smaller makes the blocks overlap.",
        default=None,
        ge=1,
        shown="the sequence length",
    )
    test_source: list[str] | None = option(
        "Read the held-out text from here, in its own order. --test-fraction then has no effect.",
        default=None,
        path=True,
        metavar="SOURCE",
    )
    seed: int = option(
        "Seed for the order of documents and for the choice of held-out ones.", default=42, ge=0, le=MAX_SEED
    )
    format: Format = option(
        "Output format: arrow (Hugging Face datasets), hdf5 (Cerebras) or jsonl (TinyGPT2).", default="arrow"
    )
    shard: str | None = option(
        "Make shard I of N. A folder with all N shards is one dataset.", default=None, metavar="I/N"
    )
    overwrite: bool = option(
        "Replace the dataset in --out, if there is one, when the new one is complete.", default=False
    )
    resume: bool = option(
        "Continue an interrupted run, if there is one. The result has the same bytes as one run.", default=False
    )

    @property
    def shard_numbers(self) -> tuple[int, int]:
        """The number of the shard to make, counted from 1, and the number of shards."""
        number, _, count = (self.shard or "1/1").partition("/")
        return int(number), int(count)

    def conflicts(self) -> Iterator[str]:
        """Check sources, stride, shard and resume."""
        yield from super().conflicts()
        if self.from_dataset is None and not self.source:
            yield "give a SOURCE, or --from-dataset"
        if self.from_dataset is not None and (self.source or self.test_source):
            yield "--from-dataset cannot be combined with a SOURCE or --test-source: it has both splits"
        if self.resume and any(map(is_stream, [*self.source, *(self.test_source or [])])):
            yield "--resume cannot be combined with standard input or a pipe, which cannot be read twice"
        if self.from_dataset is not None:
            for given in self.changed(*_OF_TEXTS):
                yield f"{given} has no effect on --from-dataset, whose texts and splits stay as they are"
        if self.shard is not None and not re.fullmatch(r"\d{1,9}/\d{1,9}", self.shard):
            yield f"--shard: expected I/N, such as 1/8, got {self.shard!r}"
        elif not 1 <= self.shard_numbers[0] <= self.shard_numbers[1]:
            yield f"--shard {self.shard}: the first of N shards is 1/N, the last N/N"
        if self.format == "hdf5" and find_spec("h5py") is None:
            yield f"--format hdf5: h5py is not installed; {H5PY_HINT}"
        length = self.sequence_length
        if self.stride is not None and self.stride > length:
            yield f"--stride {self.stride} is larger than --sequence-length {length}: tokens would be lost"
