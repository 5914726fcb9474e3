"""`ppl`: zero-shot perplexity of models on tasks, and how two models differ."""

from __future__ import annotations

import time
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from jaxtyping import Bool
from torch import Tensor, distributed

from tinygpt2.comparison import Paired, PplResult, PplRow, plot_comparison
from tinygpt2.config import PplConfig
from tinygpt2.conventions import Reader, Sheet, counted, figures, make_sheet
from tinygpt2.errors import ConfigError
from tinygpt2.files import absolute
from tinygpt2.launch import check_number, launch, launched
from tinygpt2.machine import fast_products
from tinygpt2.model import count_parameters, load_model, model_tokenizer
from tinygpt2.progress import track
from tinygpt2.scoring import Scorer, Scores
from tinygpt2.stopwords import STOP_WORDS
from tinygpt2.tasks import Task, TaskList, load_tasks, task_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer


def ppl(config: PplConfig) -> PplResult | TaskList:
    """Measure zero-shot perplexity of every model on every task.

    Returns:
        The figures; with `list_tasks` the named tasks instead.

    Raises:
        ConfigError: unknown task, stride beyond the window, blocks longer than the model's positions.
        DataError: a text is missing, empty or too short, or a dataset is another tokenizer's.
        ModelError: a model cannot be loaded, or has no tokenizer for a text.
    """
    return task_list() if config.list_tasks else measure(config)


def measure(config: PplConfig) -> PplResult:
    """Do what `ppl` does, unless it only lists the tasks."""
    check_number(config.num_processes)
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("--precision fp16 needs a GPU", "on a CPU use bf16 or fp32")
    if (config.num_processes or 1) > 1 and not launched():
        result: PplResult = launch("ppl", config.num_processes or 1, config)
        return result
    joined = distributed.is_initialized()
    state = PartialState(cpu=not torch.cuda.is_available())
    with fast_products():
        measured = _measure_all(config, load_tasks(config.task, config.task_data), state.device)
    if config.plot and state.is_main_process:
        plot_comparison(measured.results, Path(config.plot))
    if not joined:
        state.destroy_process_group()
    return measured


def _measure_all(config: PplConfig, tasks: list[Task], device: torch.device) -> PplResult:
    rows, done = [], {}
    names = list(dict.fromkeys(config.model))
    for name in names:
        model, directory = load_model(name, allow_pickle=config.allow_pickle)
        reader = Reader(name, model.config, model_tokenizer(directory))
        parameters = count_parameters(model)
        scorer = Scorer(model, config.precision, device)
        for task in tasks:
            sheet = make_sheet(task, reader, config.convention, config.stride)
            row, scores = _measure(scorer, reader, task, sheet, config, parameters)
            rows.append(row)
            done[name, task.name] = sheet, scores
    paired = [
        _pair(a, b, task.name, *done[a, task.name], *done[b, task.name])
        for task in tasks
        for a, b in combinations(names, 2)
    ]
    return PplResult(rows, paired)


def _measure(
    scorer: Scorer, reader: Reader, task: Task, sheet: Sheet, config: PplConfig, parameters: int
) -> tuple[PplRow, Scores]:
    window = max(span.stop - span.start for span in sheet.spans)
    budget = config.batch_size * window if config.batch_size else _budget(scorer.head.device.type)
    last_words = bool(task.passages) and config.convention != "tinygpt2"
    ruled_out = _stop_words(reader.tokenizer, len(scorer.head)).to(scorer.head.device) if last_words else None
    started = time.perf_counter()
    with track(f"{reader.name} on {task.name}", len(sheet.spans)) as progress:
        every = scorer(sheet.tokens, sheet.spans, budget, progress.advance, ruled_out)
    seconds = time.perf_counter() - started
    scores = counted(sheet, every, config.convention)
    found = figures(sheet, scores, config.convention)
    targets = int(every.counts.sum())
    row = PplRow(
        model=absolute(reader.name),
        task=absolute(task.name),
        convention=config.convention,
        perplexity=found.perplexity,
        loss=found.loss,
        stderr=scores.stderr,
        bits_per_byte=found.bits_per_byte,
        byte_perplexity=found.byte_perplexity,
        word_perplexity=found.word_perplexity,
        accuracy=found.accuracy,
        accuracy_without_stop_words=found.accuracy_without_stop_words,
        unit=sheet.unit,
        units=int(scores.counts.sum()) if sheet.unit == "token" else sheet.units,
        tokens=int(scores.counts.sum()),
        words=sheet.words,
        bytes=sheet.bytes,
        stride=sheet.stride,
        seconds=seconds,
        tokens_per_second=targets / seconds,
        parameters=parameters,
        source=absolute(task.source),
    )
    return row, scores


def _budget(device: str) -> int:
    """Return the tokens in a forward pass: enough for fast products, few enough for little memory."""
    return 2**11 if device == "cpu" else 2**15


def _stop_words(tokenizer: Tokenizer | None, vocabulary: int) -> Bool[Tensor, " V"]:
    """Return which tokens are a stop word by themselves, with a space before it."""
    mask = torch.zeros(vocabulary, dtype=torch.bool)
    if tokenizer is not None:
        words = {f"{space}{form}" for word in STOP_WORDS for form in (word, word.capitalize()) for space in ("", " ")}
        found = [ids[0] for ids in tokenizer(sorted(words), add_special_tokens=False)["input_ids"] if len(ids) == 1]
        mask[found] = True
    return mask


def _pair(a: str, b: str, task: str, sheet_a: Sheet, left: Scores, sheet_b: Sheet, right: Scores) -> Paired:
    names = absolute(a), absolute(b), absolute(task)
    if not sheet_a.same_targets(sheet_b):
        return Paired(*names, None, None)
    both = Scores(left.sums - right.sums, left.counts)
    return Paired(*names, both.loss, both.stderr)
