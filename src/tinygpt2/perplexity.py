"""Zero-shot perplexity: strided, batched, exact counts of targets.

A token is a target, once, when an earlier token stands in its window. With the stride equal to the window
the first token of every window has no context and is no target; with overlap only the very first token of
the text is left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel

from tinygpt2.capture import capture
from tinygpt2.config import PplConfig
from tinygpt2.dataset import Packed
from tinygpt2.encoder import encode
from tinygpt2.errors import ConfigError, DataError, ModelError
from tinygpt2.files import absolute
from tinygpt2.machine import fast_products
from tinygpt2.model import default_device, load_model, model_tokenizer
from tinygpt2.objectives.prediction import default_chunk
from tinygpt2.progress import track
from tinygpt2.tasks import Task, load_task
from tinygpt2.tokenizer import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer


@dataclass(frozen=True)
class PplRow:
    """One model on one task. `loss` is in nats per token, `stderr` its standard error over windows.

    `bits_per_byte` and `word_perplexity` spread the total loss of all targets over the whole text.
    """

    model: str
    task: str
    perplexity: float
    loss: float
    bits_per_byte: float
    word_perplexity: float
    tokens: int
    words: int
    bytes: int
    stride: int
    stderr: float | None
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Paired:
    """Difference of two models' losses on one task (a - b, nats per token), window by window.

    Both are None where the models' windows hold different targets, so that losses do not compare.
    """

    a: str
    b: str
    task: str
    difference: float | None
    stderr: float | None


@dataclass(frozen=True)
class PplResult:
    """Every model on every task, and every pair of models."""

    results: list[PplRow]
    paired: list[Paired]


@dataclass(frozen=True)
class Scores:
    """Per window: the summed loss of its targets (nats), and how many there are."""

    sums: Float[np.ndarray, " W"]
    counts: Int[np.ndarray, " W"]

    @property
    def loss(self) -> float:
        """Mean loss per target, in nats."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def stderr(self) -> float | None:
        """Standard error of `loss` over windows (ratio estimator); None for a single window."""
        windows = len(self.sums)
        if windows < 2:
            return None
        residuals = self.sums - self.loss * self.counts
        return float(np.sqrt(windows / (windows - 1) * (residuals**2).sum()) / self.counts.sum())


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a text; those from `start + first` on are its targets."""

    start: int
    stop: int
    first: int


def windows(count: int, size: int, stride: int) -> Iterator[Window]:
    """Yield the windows over a text of `count` tokens such that every token with context is a target once.

    Args:
        count: tokens in the text.
        size: tokens in a window, at least 2.
        stride: tokens from one window's start to the next, 1 to `size`.
    """
    scored = 0
    for start in range(0, count, stride):
        stop = min(start + size, count)
        first = max(scored - start, 1)
        if start + first < stop:
            yield Window(start, stop, first)
        scored = stop
        if stop == count:
            return


@torch.no_grad()
def token_losses(model: GPT2LMHeadModel, input_ids: Int[Tensor, "B T"], first: int = 1) -> Float[Tensor, "B N"]:
    """Return the loss in nats of every token from position `first` on, in float32; N is T - first.

    Only the positions that predict a target go through the output matrix, a chunk at a time.
    """
    last, head = len(model.transformer.h), model.lm_head.weight
    hidden = capture(model, input_ids, states=[last]).states[last][:, first - 1 : -1]
    states, targets = hidden.flatten(0, 1), input_ids[:, first:].flatten()
    chunk = default_chunk(len(head), head.dtype, head.device.type)
    parts = [
        F.cross_entropy((states[i : i + chunk] @ head.mT).float(), targets[i : i + chunk], reduction="none")
        for i in range(0, len(targets), chunk)
    ]
    return torch.cat(parts).view(len(input_ids), -1)


def score(
    model: GPT2LMHeadModel,
    tokens: Integer[np.ndarray, " N"],
    spans: list[Window],
    batch_size: int,
    advance: Callable[[int], None] = lambda windows: None,
) -> Scores:
    """Score a text's windows with a model in evaluation mode, windows of one shape batched.

    Args:
        tokens: the text's token ids.
        spans: its windows.
        batch_size: windows in a forward pass.
        advance: told how many windows were done.
    """
    device = model.lm_head.weight.device
    sums = []
    for (_, first), group in groupby(spans, key=lambda span: (span.stop - span.start, span.first)):
        same = list(group)
        for index in range(0, len(same), batch_size):
            part = same[index : index + batch_size]
            ids = np.stack([tokens[span.start : span.stop] for span in part]).astype(np.int64)
            losses = token_losses(model, torch.from_numpy(ids).to(device), first)
            sums.append(losses.double().sum(1).cpu().numpy())
            advance(len(part))
    return Scores(np.concatenate(sums), np.array([span.stop - span.start - span.first for span in spans]))


@fast_products()
def ppl(config: PplConfig) -> PplResult:
    """Measure zero-shot perplexity of every model on every task.

    Raises:
        ConfigError: unknown task, stride beyond the window, blocks longer than the model's positions.
        DataError: a text is missing, empty or too short, or a dataset is another tokenizer's.
        ModelError: a model cannot be loaded, or has no tokenizer for a text.
    """
    tasks = [load_task(name, config.task_data) for name in config.task]
    rows, scores = [], {}
    for name in config.model:
        model, directory = load_model(name, allow_pickle=config.allow_pickle)
        model.to(default_device())
        tokenizer = model_tokenizer(directory)
        for task in tasks:
            row, scored = _measure(name, model, tokenizer, task, config)
            rows.append(row)
            scores[name, task.name] = scored
    paired = [
        _pair(absolute(a), absolute(b), absolute(task.name), scores[a, task.name], scores[b, task.name])
        for task in tasks
        for a, b in combinations(dict.fromkeys(config.model), 2)
    ]
    return PplResult(rows, paired)


def _measure(
    name: str, model: GPT2LMHeadModel, tokenizer: Tokenizer | None, task: Task, config: PplConfig
) -> tuple[PplRow, Scores]:
    tokens, text, window = _tokens(name, model, tokenizer, task)
    stride = config.stride or window
    if stride > window:
        raise ConfigError(
            f"--stride {stride} is beyond the window of {window} tokens: text between windows would be lost"
        )
    if len(tokens) < 2:
        raise DataError(f"{task.name} is {len(tokens)} tokens long: there is nothing to predict")
    spans = list(windows(len(tokens), window, stride))
    started = time.perf_counter()
    with track(f"{name} on {task.name}", len(spans)) as progress:
        scored = score(model, tokens, spans, config.batch_size, progress.advance)
    seconds = time.perf_counter() - started
    total, targets = float(scored.sums.sum()), int(scored.counts.sum())
    words, size = len(text.split()), len(text.encode())
    row = PplRow(
        model=absolute(name),
        task=absolute(task.name),
        perplexity=exponential(scored.loss),
        loss=scored.loss,
        bits_per_byte=total / math.log(2) / size,
        word_perplexity=exponential(total / max(words, 1)),
        tokens=targets,
        words=words,
        bytes=size,
        stride=stride,
        stderr=scored.stderr,
        seconds=seconds,
        tokens_per_second=targets / seconds,
    )
    return row, scored


def exponential(loss: float) -> float:
    """Return the perplexity of a loss in nats; infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def _tokens(
    name: str, model: GPT2LMHeadModel, tokenizer: Tokenizer | None, task: Task
) -> tuple[Integer[np.ndarray, " N"], str, int]:
    """Return the task as tokens and as text, and the window."""
    positions = model.config.n_positions
    if task.packed is not None:
        check_fits(task.packed, model.config, tokenizer and fingerprint(tokenizer), f"model {name}")
        blocks = task.packed.test
        if not len(blocks):
            raise DataError(f"the test split of {task.name} is empty")
        # Blocks of sliding windows repeat what the one before had: each token counts once.
        seen = task.packed.sequence_length - task.packed.manifest["stride"]
        if seen and task.packed.manifest.get("parts", 1) > 1:
            raise DataError(f"{task.name}: the blocks of its parts overlap", "measure on one part at a time")
        tokens = np.concatenate([blocks.row(0), *(blocks.row(index)[seen:] for index in range(1, len(blocks)))])
        text = task.packed.tokenizer().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return tokens, text, task.packed.sequence_length
    if tokenizer is None:
        raise ModelError(
            f"model {name} has no tokenizer to read {task.name} with",
            "copy the tokenizer's files beside the weights",
        )
    tokens = np.array(encode(tokenizer, [task.text])[0], np.int64)
    if len(tokens) and tokens.max() >= model.config.vocab_size:
        raise ModelError(
            f"model {name}: its tokenizer has tokens beyond the model's vocabulary of {model.config.vocab_size}"
        )
    return tokens, task.text, positions


def check_fits(packed: Packed, model: Any, tokenizer_fingerprint: str | None, who: str) -> None:
    """Check that a dataset's blocks can go through a model.

    Args:
        model: the model's configuration.
        tokenizer_fingerprint: of the model's own tokenizer, if it has one.
        who: the model, for the message.

    Raises:
        DataError: the dataset was made with another tokenizer, or its vocabulary is larger.
        ConfigError: its blocks are longer than the model's positions.
    """
    ours = packed.manifest["tokenizer_fingerprint"]
    if tokenizer_fingerprint not in (None, ours):
        raise DataError(
            f"dataset {packed.name} was made with another tokenizer ({ours[:12]}) "
            f"than {who}'s ({str(tokenizer_fingerprint)[:12]})",
            "pregenerate the text with the model's own tokenizer",
        )
    if packed.vocab_size > model.vocab_size:
        raise DataError(f"dataset {packed.name} has a vocabulary of {packed.vocab_size}, {who} of {model.vocab_size}")
    if packed.sequence_length > model.n_positions:
        raise ConfigError(
            f"blocks of {packed.sequence_length} tokens in {packed.name}, but {who} has {model.n_positions} positions",
            f"pregenerate with --sequence-length {model.n_positions}",
        )


def _pair(a: str, b: str, task: str, left: Scores, right: Scores) -> Paired:
    if not np.array_equal(left.counts, right.counts):
        return Paired(a, b, task, None, None)
    both = Scores(left.sums - right.sums, left.counts)
    return Paired(a, b, task, both.loss, both.stderr)
