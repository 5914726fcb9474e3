"""`sample`: a dataset of blocks that a model writes itself.

The texts go to a log on disk, batch by batch, so that an interrupted run loses one batch. Then they are packed into
blocks as `pregenerate` packs documents. A student that learns from a teacher's texts learns by sequence-level
distillation (Kim and Rush 2016, arXiv:1606.07947).
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from tinygpt2.config.decoding import SampleConfig
from tinygpt2.data import staging
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.block_writers import MANIFEST, SplitWriter, totals
from tinygpt2.data.dataset import PackedDataset, load_packed_dataset
from tinygpt2.data.external_sort import shuffled_keys
from tinygpt2.data.pregenerate import check_output
from tinygpt2.data.tokenizer import fingerprint, vocabulary_size
from tinygpt2.decoding.library import Decoder, make_decoder
from tinygpt2.decoding.own_text import Lengths, continued
from tinygpt2.decoding.sampling import Sampling
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.models.compatibility import check_fits, first_token, require_tokenizer, text_sizes
from tinygpt2.models.loading import load_causal_lm, model_tokenizer
from tinygpt2.models.parameters import count_parameters, fingerprint_of_weights
from tinygpt2.models.teachers.vocabularies import token_read_first
from tinygpt2.runtime.devices import computes_on_device, current_device
from tinygpt2.runtime.threads import enough_threads, tell_machine
from tinygpt2.utils.files import flush_to_disk, read_json, shared_name, write_json
from tinygpt2.utils.locks import writes_out
from tinygpt2.utils.progress import say, track, warn
from tinygpt2.utils.types import Array, Tokens

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

DEFAULT_TOKENS = 1_000_000  # to sample, without prompts


@dataclass(frozen=True)
class SampleResult:
    """The dataset that a model wrote.

    Attributes:
        samples: number of texts.
        sampled_tokens: number of tokens that the model sampled, with the ends of texts and without prompts.
        ended: share of the texts that the model ended itself; the others were cut, and then ended.
        documents, bytes, tokens: those of both splits, with prompts, as `pregenerate` counts them.
        sequences: number of blocks in each split.
        seconds: time that this run took.
        tokens_per_second: speed of sampling; None if nothing was left to sample.
    """

    samples: int
    sampled_tokens: int
    ended: float
    documents: int
    bytes: int
    tokens: int
    sequences: dict[str, int]
    seconds: float
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class _Writer:
    """The model that writes, and how.

    Attributes:
        start: the token that the model reads before every text, if it reads one.
        end: the token that ends a text.
        vocabulary: number of tokens that the tokenizer knows. The model may have more rows.
        prompts: the blocks that texts begin with, if there are any.
        lengths: of prompts and of what follows them.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    decoder: Decoder
    start: list[int]
    end: int
    vocabulary: int
    prompts: PackedDataset | None
    lengths: Lengths

    @property
    def dtype(self) -> np.dtype[Any]:
        """The number type of the tokens on disk."""
        return np.dtype(np.uint16 if self.vocabulary <= 1 << 16 else np.int32)

    def before(self, prompt: list[int]) -> list[int]:
        """Return what the model reads first: its start token, or the end of a text if there is nothing else."""
        return [*(self.start or ([] if prompt else [self.end])), *prompt]


@computes_on_device
@writes_out
def sample(config: SampleConfig) -> SampleResult:
    """Write a pregenerated dataset of texts that a model samples.

    Every text begins as a block of `prompts` does or, without prompts, after an end-of-text token. It goes on to the
    first end-of-text token, or until positions or `max_new_tokens` end. Texts that begin with the same block are all in
    the same split. The same seed gives the same texts, whatever the batch size.

    Raises:
        ConfigError: the output directory is not empty, an interrupted run left unfinished work or had other settings,
            the tokenizer has no end-of-text token, or `tokens` is less than a block.
        DataError: the dataset of prompts is missing, or was made with another tokenizer.
        MachineError: the disk is full.
        ModelError: the model or its tokenizer was not found or is broken.
    """
    started = time.perf_counter()
    staging.put_back(Path(config.out).resolve())
    out, complete = check_output(config)
    writer = _load(config)
    length = config.sequence_length or int(text_sizes(writer.model).n_positions)
    settings = _settings(config, writer, length)
    if config.resume and complete and not config.overwrite and not staging.is_unfinished(out):
        manifest = read_json(out / MANIFEST)
        staging.require_same(settings, manifest, out)
        say(f"{out} is already complete")
        staging.discard(staging.staging_path(out))
        return _result(manifest, time.perf_counter() - started, None)
    if settings["tokens"] is not None and settings["tokens"] < length:
        raise ConfigError(f"--tokens {settings['tokens']:,} is less than one block of {length} tokens")
    with (
        staging.staging_directory(out, settings, resume=config.resume, overwrite=config.overwrite) as work,
        _Log(work / "log", writer.dtype) as log,
    ):
        began, before = time.perf_counter(), log.sampled
        _sample(log, writer, config, settings["tokens"])
        sampled, seconds = log.sampled - before, time.perf_counter() - began
        result = work / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        counts = {"samples": log.samples, "sampled_tokens": log.sampled, "ended_samples": log.ended}
        splits = _pack(log, writer, config, length, result)
        manifest = {**settings, "split": "document", **counts, "splits": splits}
        writer.tokenizer.save_pretrained(str(result / "tokenizer"))
        write_json(result / MANIFEST, manifest)
        staging.put_in_place(result, out)
    return _result(manifest, time.perf_counter() - started, sampled / seconds if sampled else None)


def _load(config: SampleConfig) -> _Writer:
    """Load the model, its tokenizer and the prompts, and check that they fit each other."""
    model, directory = load_causal_lm(config.model, allow_pickle=config.allow_pickle)
    sizes = text_sizes(model)
    tokenizer = require_tokenizer(model_tokenizer(directory), sizes, config.model)
    end = first_token([tokenizer.eos_token_id], sizes)
    if end is None:
        raise ConfigError(f"model {config.model} has no end-of-text token", "its tokenizer needs one (eos_token)")
    prompts = None if config.prompts is None else load_packed_dataset(config.prompts)
    if prompts is not None:  # only the beginnings of its blocks have to fit into the positions
        read = SimpleNamespace(vocab_size=sizes.vocab_size, n_positions=prompts.sequence_length)
        check_fits(prompts, read, fingerprint(tokenizer), f"model {config.model}")
    start = [token for token in [token_read_first(sizes, tokenizer)] if token is not None]
    room = min(int(sizes.n_positions) - len(start), config.sequence_length or int(sizes.n_positions))
    asked = (1, 1) if prompts is None else config.prompt_range
    pairs = prompts is not None and prompts.train.labelled
    lengths = Lengths.fitting(asked, config.max_new_tokens, room, pairs=pairs)
    model.to(current_device())
    decoder = make_decoder(model, config.weights, copies=True, name=config.model)
    tell_machine(current_device(), config.weights)
    return _Writer(model, tokenizer, decoder, start, end, vocabulary_size(tokenizer), prompts, lengths)


def _settings(config: SampleConfig, writer: _Writer, length: int) -> dict[str, Any]:
    """Return everything that the dataset depends on, as JSON values."""
    prompts = writer.prompts
    tokens = config.tokens if config.tokens is not None or prompts is not None else DEFAULT_TOKENS
    return {
        "version": 2,
        "format": config.format,
        "sources": [f"texts of {shared_name(config.model)}"],
        "model_fingerprint": fingerprint_of_weights(writer.model),
        "prompts": None if prompts is None else prompts.content,
        "prompt_tokens": list(writer.lengths[:2]),
        "max_new_tokens": writer.lengths.new,
        "tokens": tokens,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "weights": config.weights,
        "tokenizer_fingerprint": fingerprint(writer.tokenizer),
        "vocab_size": writer.vocabulary,
        "sequence_length": length,
        "stride": length,
        "append_eos": True,
        "eos_token_id": writer.end,
        "seed": config.seed,
        "test_fraction": config.test_fraction,
        "test_sources": None,
        "shard": [1, 1],
    }


def _result(manifest: dict[str, Any], seconds: float, speed: float | None) -> SampleResult:
    splits, samples = manifest["splits"], int(manifest["samples"])
    if splits["test"]["sequences"] == 0 and manifest["test_fraction"]:
        warn(f"the held-out texts are shorter than one block of {manifest['sequence_length']} tokens: "
             "the test split is empty")  # fmt: skip
    sequences = {name: split["sequences"] for name, split in splits.items()}
    ended = manifest["ended_samples"] / max(1, samples)
    return SampleResult(
        samples, manifest["sampled_tokens"], ended, **totals(splits), sequences=sequences, seconds=seconds,
        tokens_per_second=speed,
    )  # fmt: skip


class _Log:
    """The texts so far, on disk: tokens.bin, and texts.bin with a row for each text.

    A row holds the number of the text's tokens, how many of them were sampled, and whether the model ended it. A batch
    counts once progress.json says so; what is behind it was cut off by an interruption, and is removed.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._dtype = folder, dtype
        self._progress = folder / "progress.json"
        known = read_json(self._progress) if self._progress.is_file() else {}
        self.samples, self.sampled, self.ended, self._tokens = (
            int(known.get(name, 0)) for name in ("samples", "sampled", "ended", "tokens")
        )
        self._files = {
            "tokens.bin": self._opened("tokens.bin", self._tokens * dtype.itemsize),
            "texts.bin": self._opened("texts.bin", self.samples * 3 * 4),
        }

    def _opened(self, name: str, size: int) -> IO[bytes]:
        (self._folder / name).touch()
        file = (self._folder / name).open("r+b")
        file.truncate(size)
        file.seek(size)
        return file

    def add(self, texts: list[list[int]], sampled: list[int], ended: list[bool]) -> None:
        """Write a batch of texts."""
        rows = np.array([[len(text), count, end] for text, count, end in zip(texts, sampled, ended, strict=True)])
        self._files["tokens.bin"].write(np.array([token for text in texts for token in text], self._dtype).tobytes())
        self._files["texts.bin"].write(rows.astype(np.int32).tobytes())
        for name, file in self._files.items():
            file.flush()
            flush_to_disk(self._folder / name)
        self.samples, self.sampled = self.samples + len(texts), self.sampled + sum(sampled)
        self.ended, self._tokens = self.ended + sum(ended), self._tokens + int(rows[:, 0].sum())
        known = {"samples": self.samples, "sampled": self.sampled, "ended": self.ended, "tokens": self._tokens}
        write_json(self._progress, known)

    def texts(self) -> tuple[Array, Tokens]:
        """Return the number of tokens in each text, and all tokens one after another."""
        rows = np.fromfile(self._folder / "texts.bin", np.int32).reshape(-1, 3)
        tokens: Tokens = np.memmap(self._folder / "tokens.bin", self._dtype, "r", shape=(self._tokens,))
        return rows[:, 0].astype(np.int64), tokens

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


def _sample(log: _Log, writer: _Writer, config: SampleConfig, tokens: int | None) -> None:
    """Sample texts until there are enough tokens; without a number of tokens, one text for each block of prompts."""
    sampling = Sampling(config.temperature, config.top_k, config.top_p, writer.vocabulary)
    most = None if tokens is not None or writer.prompts is None else len(writer.prompts.train)
    goal, unit = (tokens, "tokens") if most is None else (most, "texts")
    order = None if writer.prompts is None else Shuffle(len(writer.prompts.train), config.seed)
    operations = 2.0 * count_parameters(writer.model) * config.batch_size
    done = log.sampled if most is None else log.samples
    with enough_threads(operations), track("sample", goal, unit, done=done) as stage:
        while log.samples < most if most is not None else log.sampled < (tokens or 0):
            last = log.samples + config.batch_size
            numbers = list(range(log.samples, last if most is None else min(last, most)))
            prompts = [_prompt(writer, order, config.seed, number) for number in numbers]
            made = continued(
                writer.decoder, [writer.before(prompt) for prompt in prompts], numbers, seed=config.seed,
                new=writer.lengths.new, ends=[writer.end], sampling=sampling, name=config.model,
            )  # fmt: skip
            counts, ended = made.lengths.tolist(), made.ended.tolist()
            kept = len(counts) if tokens is None else _needed(counts, tokens - log.sampled)
            rows = zip(prompts, made.tokens.tolist(), counts, ended, strict=True)
            texts = [[*own, *row[:n], *([] if end else [writer.end])] for own, row, n, end in rows]
            log.add(texts[:kept], counts[:kept], ended[:kept])
            stage.advance(sum(counts[:kept]) if most is None else kept)


def _prompt(writer: _Writer, order: Shuffle | None, seed: int, number: int) -> list[int]:
    """Return the tokens that a text begins with: a block's beginning, or nothing."""
    if order is None or writer.prompts is None:
        return []
    return writer.lengths.prompt(writer.prompts.train, order[number : number + 1][0], seed, number)


def _needed(counts: list[int], tokens: int) -> int:
    """Return how many of some texts it takes to have so many tokens, or all of them."""
    return 1 + int(np.searchsorted(np.cumsum(counts)[:-1], tokens))


def _pack(log: _Log, writer: _Writer, config: SampleConfig, length: int, out: Path) -> dict[str, Any]:
    """Write the blocks of both splits, and return what the manifest says of them.

    Raises:
        DataError: the training texts are shorter than one block.
    """
    sizes, tokens = log.texts()
    held_out = _held_out(len(sizes), writer.prompts, config)
    shape, text = (length, length, writer.dtype, config.format), writer.tokenizer.decode
    figures = {"train": [0, 0], "test": [0, 0]}
    with SplitWriter(out, "train", *shape) as train, SplitWriter(out, "test", *shape) as test:
        ends = np.cumsum(sizes)
        with track("pack", len(tokens), "tokens") as stage:
            for number, (size, end) in enumerate(zip(sizes.tolist(), ends.tolist(), strict=True)):
                one = np.array(tokens[end - size : end])
                name, split = ("test", test) if held_out[number] else ("train", train)
                split.add(one)
                figures[name][0] += 1
                figures[name][1] += len(str(text(one, skip_special_tokens=True)).encode())
                stage.advance(size)
        if train.tokens < length:
            raise DataError(
                f"the training texts have {train.tokens:,} tokens: they are shorter than one block of {length}",
                "give more --tokens or a smaller --sequence-length",
            )
    return {name: split.entry(*figures[name]) for name, split in (("train", train), ("test", test))}


def _held_out(samples: int, prompts: PackedDataset | None, config: SampleConfig) -> Array:
    """Return for each text whether it is held out: those whose blocks, or whose own numbers, have the smallest keys."""
    origins: Array = np.arange(samples)
    if prompts is not None:
        origins = np.array(Shuffle(len(prompts.train), config.seed)[0:samples])
    known = np.unique(origins)
    count = min(max(1, round(config.test_fraction * len(known))), len(known) - 1) if config.test_fraction else 0
    chosen: Array = np.isin(origins, known[np.argsort(shuffled_keys(known, config.seed))[:count]])
    return chosen
