"""Conventions of perplexity: which tokens are scored, in which context, and which units the loss is divided by.

Every convention turns a task into a `TokenizedTask`: token ids, windows over them, and the number of units.

Source:
    `hf`: the transformers page "Perplexity of fixed-length models".
    `gpt2-paper`: Radford et al. 2019, section 3.
    `lm-eval`: the tasks `wikitext` and `lambada_openai` of lm-evaluation-harness.
    `tinygpt2`: the program calc_ppl of TinyGPT2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int, Integer

from tinygpt2.config.evaluation import Convention
from tinygpt2.data.dataset import PackedDataset
from tinygpt2.data.encoding import Encoder
from tinygpt2.data.tokenizer import fingerprint
from tinygpt2.errors import ConfigError, DataError, ModelError
from tinygpt2.evaluation.detokenize import detokenize, detokenize_page, pages
from tinygpt2.evaluation.scoring import Scores, Window, windows
from tinygpt2.evaluation.sizes import TextSizes, decoded, line_bytes, text_bytes, token_lines
from tinygpt2.evaluation.tasks import Task
from tinygpt2.models.compatibility import check_fits, first_token, require_tokenizer
from tinygpt2.models.teachers.vocabularies import token_read_first

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer, Tokens

_AT_ONCE = 1000  # passages tokenized at a time
_NO_LINES = np.zeros(0, np.int64)


@dataclass(frozen=True)
class ModelTokenizer:
    """A model's name, configuration and tokenizer (None if it has none): enough to lay out texts without weights."""

    name: str
    config: Any
    tokenizer: Tokenizer | None

    @property
    def positions(self) -> int:
        """The longest sequence that the model can process, in tokens."""
        return int(self.config.n_positions)

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer's encoder.

        Raises:
            ModelError: there is no tokenizer, or it does not fit the model.
        """
        return Encoder(require_tokenizer(self.tokenizer, self.config, self.name))

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the token ids of texts of any length.

        Raises:
            ModelError: there is no tokenizer, it does not fit the model, or it cannot encode a text.
        """
        return [self.encoder.whole(text) for text in texts] if self.encoder.reproduced else self.encoder(list(texts))

    @property
    def prefix(self) -> int:
        """The token before a text: start of text or, if the model does not have one, end of text.

        Raises:
            ModelError: there is neither of them.
        """
        candidates = (getattr(self.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
        if (token := first_token(candidates, self.config)) is not None:
            return token
        raise ModelError(
            f"model {self.name}: neither a start-of-text nor an end-of-text token of the tokenizer is in the model's "
            "vocabulary, and one of them must precede a text",
            "use --convention hf, which needs none",
        )


@dataclass(frozen=True)
class TokenizedTask:
    """A task, tokenized and divided into windows, with the sizes that the loss is divided by.

    Attributes:
        tokens: token ids of all texts, one text after the other.
        spans: the windows over `tokens`.
        unit: perplexity is per token, word, character or byte.
        units: the number of units in the text. Not used for `token`, where the number of targets counts.
        words, characters, bytes: sizes of the text.
        stride: tokens from one window's start to the next; None if every passage is one window.
        right: for each question, the index of the right answer among its candidates.
        candidates: for each question, the number of candidates. Each candidate is one window.
        lengths: characters and bytes of each candidate, by which the normalised accuracies divide; empty if none do.
        parts: bytes of each line, last word or right answer, by which models with other tokens are compared.
    """

    tokens: Integer[np.ndarray, " N"]
    spans: list[Window]
    unit: Literal["token", "word", "character", "byte"]
    units: int
    words: int
    characters: int
    bytes: int
    stride: int | None
    right: Int[np.ndarray, " Q"] = field(default_factory=lambda: np.zeros(0, np.int64))
    candidates: Int[np.ndarray, " Q"] = field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: Int[np.ndarray, "2 C"] = field(default_factory=lambda: np.zeros((2, 0), np.int64))
    parts: Int[np.ndarray, " P"] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def answers(self) -> Int[np.ndarray, " Q"]:
        """For each question, the number of the right candidate's window."""
        answers: Int[np.ndarray, " Q"] = np.cumsum(self.candidates) - self.candidates + self.right
        return answers

    def lines(self, tokenizer: Tokenizer | None) -> Int[np.ndarray, " N1"] | None:
        """Return `token_lines`; None if the task has no lines, or the tokens do not have all of them."""
        if self.stride is None or not len(self.parts) or tokenizer is None:
            return None
        return token_lines(tokenizer, self.tokens, len(self.parts))

    def same_targets(self, other: TokenizedTask) -> bool:
        """Return whether both tasks have the same windows and tokens, so that losses compare window by window."""
        return self.spans == other.spans and np.array_equal(self.tokens, other.tokens)


def tokenize_task(task: Task, model: ModelTokenizer, convention: Convention, stride: int | None) -> TokenizedTask:
    """Tokenize a task for a model and divide it into windows.

    Args:
        stride: tokens from one window's start to the next; None means the length of a window.

    Raises:
        ConfigError: the stride is larger than the window, blocks are longer than the model's positions, or the
            convention does not support tasks of this kind.
        DataError: there is nothing to predict, or a dataset was made with another tokenizer.
        ModelError: there is no tokenizer, or it does not fit the model.
    """
    if task.questions:
        if convention == "tinygpt2" or (convention == "lm-eval" and task.spec.form == "cbt"):
            raise ConfigError(
                f"--convention {convention} does not support the task {task.name}", "use --convention gpt2-paper or hf"
            )
        tokenized = _choices(task, model, convention)
    elif task.passages and convention != "tinygpt2":
        tokenized = _last_words(task, model, convention)
    elif task.packed is not None:
        tokenized = _blocks(task.packed, model, convention, stride)
    elif convention in ("hf", "tinygpt2"):
        text = task.joined()
        (tokens,) = model.tokens([text])
        tokenized = _per_token(tokens, TextSizes.of([text]), model.positions, stride, line_bytes([text]))
    else:
        tokenized = _per_unit(task, model, convention, stride)
    if not tokenized.spans:
        raise DataError(f"{task.name} is {len(tokenized.tokens)} tokens long: there is nothing to predict")
    return tokenized


def headline_loss(tokenized: TokenizedTask, scores: Scores, convention: Convention) -> float:
    """Return the loss in nats per unit of the convention; `perplexity` is its exponential.

    Args:
        scores: the scores that `counted` returns.
    """
    if convention == "tinygpt2":  # calc_ppl multiplies the mean over n - 1 targets by n
        lengths = scores.counts + 1
        return float((scores.sums / scores.counts * lengths).sum() / lengths.sum())
    return scores.loss if tokenized.unit == "token" else float(scores.sums.sum()) / max(tokenized.units, 1)


def counted(tokenized: TokenizedTask, scores: Scores) -> Scores:
    """Return the scores that the figures use: for a question, those of the right answer and whether it scored best.

    As in lm-evaluation-harness 0.4.13, the normalised accuracies divide the sums of a question's candidates by their
    characters or bytes, and the first of several best candidates is the model's answer.
    """
    if not len(tokenized.right):
        return scores
    best = [
        np.array([part.argmin() for part in np.split(sums, np.cumsum(tokenized.candidates)[:-1])]) == tokenized.right
        for sums in (scores.sums, *(scores.sums / size for size in tokenized.lengths if len(size)))
    ]
    answers = tokenized.answers
    by_length = np.stack(best[1:]) if best[1:] else None
    return Scores(scores.sums[answers], scores.counts[answers], best[0], by_length=by_length)


def _per_token(
    tokens: Integer[np.ndarray, " N"],
    sizes: TextSizes,
    window: int,
    stride: int | None,
    lines: Int[np.ndarray, " P"] = _NO_LINES,
) -> TokenizedTask:
    step = _stride(stride, window)
    return TokenizedTask(tokens, list(windows(len(tokens), window, step)), "token", 0, *sizes, step, parts=lines)


def _after(prefix: int, tokens: Integer[np.ndarray, " N"]) -> Integer[np.ndarray, " N1"]:
    return np.concatenate([np.array([prefix], tokens.dtype), tokens])


def _per_unit(task: Task, model: ModelTokenizer, convention: Convention, stride: int | None) -> TokenizedTask:
    """Score every token of every document; a prefix token precedes each, and windows share at least one token."""
    text, style = task.text, task.spec.style
    if convention == "lm-eval":
        originals = pages(text) if style == "wikitext" else [text]
        texts = [detokenize_page(page) for page in originals] if style == "wikitext" else originals
        words = units = sum(len(re.split(r"\s+", page)) for page in originals)
        characters, size = (sum(map(len, pages)) for pages in (originals, [page.encode() for page in originals]))
        unit: Any = "word"
    else:
        texts = [detokenize(text, style) if style else text]
        words = len(text.split()) + (text.count("\n") if task.spec.lines else 0)
        characters, size, unit = len(text), len(text.encode()), task.spec.unit
        units = {"word": words, "character": characters, "byte": size}[unit]
    step = _stride(stride, model.positions)
    documents = [_after(model.prefix, tokens) for tokens in model.tokens(texts)]
    spans, offset = [], 0
    for document in documents:
        for span in windows(len(document), model.positions + 1, step, full=True):
            spans.append(Window(span.start + offset, span.stop + offset, span.first))
        offset += len(document)
    sizes = words, characters, size
    return TokenizedTask(np.concatenate(documents), spans, unit, units, *sizes, step, parts=line_bytes(texts))


def _last_words(task: Task, model: ModelTokenizer, convention: Convention) -> TokenizedTask:
    """Score the last word of every passage, with the rest of the passage as its context."""
    cut = [passage.rsplit(" ", 1) for passage in task.passages]
    endings = [f" {word}" for _, word in cut]
    tokens, spans = _continued(task.name, model, [context for context, _ in cut], endings)
    whole = "".join(endings)
    unit: Any = "token" if convention == "hf" else "word"
    sizes = len(spans), len(whole), len(whole.encode())
    return TokenizedTask(tokens, spans, unit, len(spans), *sizes, None, parts=text_bytes(endings))


def _choices(task: Task, model: ModelTokenizer, convention: Convention) -> TokenizedTask:
    """Score every candidate of every question, with the text before it as its context."""
    contexts = [context for question in task.questions for context in question.contexts]
    endings = [ending for question in task.questions for ending in question.endings]
    tokens, spans = _continued(task.name, model, contexts, endings)
    right = [question.endings[question.right] for question in task.questions]
    words, whole = sum(len(ending.split()) for ending in right), "".join(right)
    choices = [choice for question in task.questions for choice in question.choices]
    unit: Any = "token" if convention == "hf" else "word"
    return TokenizedTask(
        tokens,
        spans,
        unit,
        *(words, words, len(whole), len(whole.encode())),
        None,
        np.array([question.right for question in task.questions]),
        np.array([len(question.endings) for question in task.questions]),
        np.array([[len(choice) for choice in choices], [len(choice.encode()) for choice in choices]], dtype=np.int64),
        text_bytes(right),
    )


def _continued(
    task: str, model: ModelTokenizer, contexts: list[str], endings: list[str]
) -> tuple[Integer[np.ndarray, " N"], list[Window]]:
    """Return the tokens of every context with its ending, and one window for each, with the ending as its targets.

    As in lm-evaluation-harness, context and ending are tokenized together, white space at the end of a context belongs
    to the ending, and the token that begins a text stands for an empty context.

    Raises:
        DataError: an ending has no token of its own, or more than the model has positions.
    """
    parts, spans, offset = [], [], 0
    room = model.positions - (token_read_first(model.config, model.tokenizer) is not None)
    for index in range(0, len(contexts), _AT_ONCE):
        some = contexts[index : index + _AT_ONCE]
        whole = model.tokens([a + b for a, b in zip(some, endings[index : index + _AT_ONCE], strict=True)])
        known = model.tokens([context.rstrip() for context in some])
        for number, (context, tokens, before) in enumerate(zip(some, whole, known, strict=True), index):
            if not context.strip() and tokens[:1].tolist() != [model.prefix]:
                tokens = _after(model.prefix, tokens)
            if not 0 < (scored := len(tokens) - max(1, len(before))) <= room:
                raise DataError(
                    f"{task}: {endings[number][:60]!r} has {scored} tokens after its context, but {model.name} can "
                    f"predict 1 to {room}"
                )
            start = max(0, len(tokens) - room - 1)
            spans.append(Window(offset + start, offset + len(tokens), max(1, len(before) - start)))
            offset += len(tokens)
            parts.append(tokens)
    return np.concatenate(parts), spans


def _blocks(packed: PackedDataset, model: ModelTokenizer, convention: Convention, stride: int | None) -> TokenizedTask:
    """Read a dataset's test split as one text, in windows of its block length. Of pairs, score the responses."""
    check_fits(packed, model.config, model.tokenizer and fingerprint(model.tokenizer), f"model {model.name}")
    blocks = packed.test
    if not len(blocks):
        raise DataError(f"the test split of {packed.name} is empty")
    if blocks.divided:
        return _responses(packed, convention)
    # Blocks that overlap repeat tokens of the block before. Each token has to count once.
    seen = packed.sequence_length - packed.manifest["stride"]
    if seen and packed.manifest.get("shards", 1) > 1:
        raise DataError(
            f"{packed.name} has several shards with overlapping blocks, so its text cannot be restored",
            "measure on one part at a time",
        )
    tokens = np.concatenate([blocks.row(0), *(blocks.row(index)[seen:] for index in range(1, len(blocks)))])
    tokenizer = packed.tokenizer()
    sizes = TextSizes.of(decoded(tokenizer, tokens))
    if convention in ("hf", "tinygpt2"):
        return _per_token(tokens, sizes, packed.sequence_length, stride)
    step = _stride(stride, packed.sequence_length)
    tokens = _after(ModelTokenizer(model.name, model.config, tokenizer).prefix, tokens)
    spans = list(windows(len(tokens), packed.sequence_length + 1, step, full=True))
    return TokenizedTask(tokens, spans, "word", sizes.words, *sizes, step)


def _responses(packed: PackedDataset, convention: Convention) -> TokenizedTask:
    """Score the responses of a dataset's held-out pairs, each after its own prompt, as in training."""
    spans, rows, targets = [], [], []
    for index in range(len(packed.test)):
        batch, offset = packed.test.batch([index]), index * packed.sequence_length
        rows.append(batch.input_ids[0].numpy())
        for begins, first, stop in batch.answers(0):
            first = max(first, begins + 1)  # nothing predicts the first token of a pair
            if first < stop:
                spans.append(Window(offset + begins, offset + stop, first - begins))
                targets.append(rows[-1][first:stop])
    sizes = TextSizes.of(decoded(packed.tokenizer(), np.concatenate(targets)))
    unit: Any = "token" if convention in ("hf", "tinygpt2") else "word"
    return TokenizedTask(np.concatenate(rows), spans, unit, sizes.words, *sizes, None)


def _stride(stride: int | None, window: int) -> int:
    if (stride or 0) > window:
        raise ConfigError(
            f"--stride {stride} is larger than the window of {window} tokens: text between windows would be skipped"
        )
    return stride or window
