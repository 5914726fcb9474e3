"""What an engine makes of an exported model, beside what the model itself computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tinygpt2.config.data import TextOptions
from tinygpt2.data.corpus.sources import PYTHON_DOCS, Corpus
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.encoding import Encoder
from tinygpt2.data.layout import is_packed_dataset
from tinygpt2.data.tokenizer import fingerprint
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.exporting.engines import Engine, LlamaEngine, TorchEngine
from tinygpt2.exporting.source import ExportSource
from tinygpt2.models.compatibility import check_fits
from tinygpt2.utils.progress import say, track

WINDOWS, LENGTH, PROMPT, NEW = 16, 256, 16, 64
NEAR_TIE = 0.01  # the two likeliest tokens may change places if their logits are this near
_CHARACTERS = 2_000_000  # of the text, at most


@dataclass(frozen=True)
class ExportChecks:
    """An exported model beside the float32 model that it was made from, on the same text.

    Attributes:
        logits: the largest difference of a logit.
        greedy_equal: whether 64 greedy tokens are the same, up to the first step at which the model's two best logits
            differ by less than 0.01.
        loss, float_loss: cross-entropy in nats per token of the exported model and of the model.
        kl: mean KL divergence from the model to the exported model, in nats per token.
        tokens_per_second: greedy decoding, one row; None if another engine than the format's own ran.
        engine: what ran.
        targets: the number of tokens that were predicted.
        tokens_equal: whether llama.cpp splits the text into the same tokens; None if it did not run.
    """

    logits: float
    greedy_equal: bool
    loss: float
    kl: float
    tokens_per_second: float | None
    float_loss: float
    engine: str
    targets: int
    tokens_equal: bool | None = None


@dataclass(frozen=True)
class CheckText:
    """Rows of tokens to compare on, and the text of them if there is one."""

    rows: list[list[int]]
    text: str = ""


def check_text(source: ExportSource, data: str | None) -> CheckText:
    """Return up to 16 evenly spaced rows of up to 256 tokens.

    Args:
        data: a text, a pregenerated dataset, or None for the text of `quickstart`. A model without a tokenizer gets
            random tokens then.

    Raises:
        DataError, ModelError: the text cannot be read, does not fit the model, or has fewer than two tokens.
    """
    config = source.model.config
    length, tokenizer = min(LENGTH, config.n_positions), source.tokenizer
    if data is not None and is_packed_dataset(Path(data)):
        packed = load_packed_dataset(data)
        check_fits(packed, config, tokenizer and fingerprint(tokenizer), f"model {source.name}")
        blocks = (packed.test if len(packed.test) else packed.train).spaced(WINDOWS)
        return CheckText([[int(one) for one in blocks.row(index)[:length]] for index in range(len(blocks))])
    if tokenizer is None:
        if data is not None:
            raise DataError(
                f"model {source.name} has no tokenizer for the text of {data}",
                "give pregenerated data; an exported file is compared with its model by verify --model",
            )
        say("the model has no tokenizer: it is compared on random tokens")
        random = np.random.default_rng(0).integers(0, config.vocab_size, (WINDOWS, length))
        return CheckText(random.tolist())
    text = ""
    for piece in Corpus.of([data or PYTHON_DOCS], TextOptions()).pieces():
        text += piece.text
        if len(text) > _CHARACTERS:
            break
    ids = Encoder(tokenizer).whole(text).tolist()
    if len(ids) < 2:
        raise DataError(f"{data} has too little text to compare on")
    starts = np.unique(np.linspace(0, max(0, len(ids) - length), WINDOWS).astype(int))
    return CheckText([ids[start : start + length] for start in starts], text[:20_000])


@torch.no_grad()
def run_checks(source: ExportSource, engine: Engine, text: CheckText) -> ExportChecks:
    """Run an exported model and the model that it was made from on the same tokens.

    Raises:
        ConfigError: the rows are too short to predict anything.
    """
    model, gap, losses, divergence, targets = TorchEngine(source.model, own=True), 0.0, np.zeros(2), 0.0, 0
    if not any(len(row) > 1 for row in text.rows):
        raise ConfigError(f"model {source.name} has too few positions to compare texts")
    with track(f"compare with {engine.name}", len(text.rows), "rows") as stage:
        for row in text.rows:
            exact, found = model.logits(row), engine.logits(row)
            gap = float(np.maximum(gap, float((exact - found).abs().max())))  # NaN stays NaN
            exact, found = exact[:-1].log_softmax(-1), found[:-1].log_softmax(-1)
            divergence += float((exact.exp() * (exact - found)).sum(dtype=torch.float64))
            right = torch.tensor(row[1:])[:, None]
            losses -= [float(one.gather(1, right).sum(dtype=torch.float64)) for one in (exact, found)]
            targets += len(row) - 1
            stage.advance()
    longest = max(text.rows, key=len)
    prompt = longest[: min(PROMPT, len(longest), max(1, source.model.config.n_positions // 2))]
    count = min(NEW, source.model.config.n_positions - len(prompt))
    expected, _ = model.greedy(prompt, count)
    runs = [engine.greedy(prompt, count) for _ in range(3)]
    same = isinstance(engine, LlamaEngine) and source.tokenizer is not None and bool(text.text)
    equal = None
    if same and isinstance(engine, LlamaEngine) and source.tokenizer is not None:
        equal = engine.tokens(text.text) == Encoder(source.tokenizer).whole(text.text).tolist()
    return ExportChecks(
        logits=gap,
        greedy_equal=same_text(model, prompt, expected, runs[0][0], source.ends[1]),
        loss=float(losses[1] / targets),
        kl=0.0 if divergence < 0 else divergence / targets,
        tokens_per_second=max(speed for _, speed in runs) if engine.own else None,
        float_loss=float(losses[0] / targets),
        engine=engine.name,
        targets=targets,
        tokens_equal=equal,
    )


def same_text(model: TorchEngine, prompt: list[int], expected: list[int], found: list[int], end: int | None) -> bool:
    """Return whether two greedy texts are the same up to the first near tie, or to the end of the text."""
    if end in expected:  # llama.cpp stops there
        expected = expected[: expected.index(end)]
        found = found[: len(expected)]
    if expected == found:
        return True
    pairs = list(zip(expected, found, strict=False))
    first = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
    best = model.logits([*prompt, *expected[:first]])[-1].topk(2).values
    return bool(best[0] - best[1] < NEAR_TIE)
