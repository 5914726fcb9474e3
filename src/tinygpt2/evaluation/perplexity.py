"""`ppl`: zero-shot perplexity of models on tasks, and how two models differ."""

from __future__ import annotations

import math
import time
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from jaxtyping import Bool
from torch import Tensor, distributed

from tinygpt2.config.evaluation import Convention, PplConfig
from tinygpt2.errors import ConfigError, DataError, ModelError, TinyGPT2Error
from tinygpt2.evaluation.conventions import ModelTokenizer, TokenizedTask, counted, tokenize_task
from tinygpt2.evaluation.plots import plot_comparison
from tinygpt2.evaluation.results import Paired, PplResult, PplRow, make_row
from tinygpt2.evaluation.scoring import Scorer, Scores
from tinygpt2.evaluation.stopwords import STOP_WORDS
from tinygpt2.evaluation.tasks import Task, TaskList, load_tasks, task_list
from tinygpt2.models.loading import load_model, model_tokenizer
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.runtime.launch import check_number, launch
from tinygpt2.runtime.processes import launched
from tinygpt2.utils.files import absolute
from tinygpt2.utils.progress import say, track

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
    if not joined:  # an earlier call's processes are gone, and their number is no longer true
        PartialState._reset_state()
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        with state.main_process_first():  # the first may download, the others find it in the cache
            tasks = load_tasks(config.task, config.task_data)
        names = [task.name for task in tasks]
        if any(other != names for other in gather_object([names])):
            raise DataError("the processes found different tasks", "name them, instead of all, or give --task-data")
        with fast_products():
            measured = _measure_all(config, tasks, state.device)
        if config.plot and state.is_main_process:
            plot_comparison(measured.results, Path(config.plot))
    finally:
        if not joined:
            state.destroy_process_group()
    return measured


def tokenize_fitting_tasks(
    tasks: list[Task], reader: ModelTokenizer, convention: Convention = "hf", stride: int | None = None
) -> dict[str, TokenizedTask]:
    """Lay tasks out for a model, as far as its configuration and tokenizer are enough; those of `all` that fit.

    Raises:
        ConfigError, DataError, ModelError: see `make_sheet`; a task that was asked for by name does not fit.
    """
    tokenized_tasks = {}
    for task in tasks:
        try:
            tokenized_tasks[task.name] = tokenize_task(task, reader, convention, stride)
        except TinyGPT2Error as error:
            if not task.optional:
                raise
            say(f"{task.name} is left out: {error.message}")
    return tokenized_tasks


def _measure_all(config: PplConfig, tasks: list[Task], device: torch.device) -> PplResult:
    names = list(dict.fromkeys(config.model))
    tasks, tokenized_tasks = _tokenize_all(config, names, tasks)
    rows, done = [], {}
    for name in names:
        model, directory = load_model(name, allow_pickle=config.allow_pickle)
        parameters = count_parameters(model)
        scorer = Scorer(model, config.precision, device)
        for task in tasks:
            reader = ModelTokenizer(name, model.config, model_tokenizer(directory))
            row, done[name, task.name] = _measure(
                scorer, reader, task, tokenized_tasks[name, task.name], config, parameters
            )
            rows.append(row)
        del model, scorer  # before the next one is there
    paired = []
    for task in tasks:
        for a, b in combinations(names, 2):
            found = (done[a, task.name], done[b, task.name])
            same = tokenized_tasks[a, task.name].same_targets(tokenized_tasks[b, task.name])
            paired.append(_pair(absolute(a), absolute(b), task.name, *found if same else (None, None)))
    return PplResult(rows, paired)


def _tokenize_all(
    config: PplConfig, names: list[str], tasks: list[Task]
) -> tuple[list[Task], dict[tuple[str, str], TokenizedTask]]:
    """Make every sheet before anything is measured, so that what does not fit costs no time.

    Returns:
        The tasks that stay, and a sheet for each model and task. A task that `all` found is left out where it does not
        fit a model or the convention.
    """
    tokenized_tasks: dict[tuple[str, str], TokenizedTask] = {}
    for name in names:
        model, directory = load_model(name, allow_pickle=config.allow_pickle, hollow=True)
        reader = ModelTokenizer(name, model.config, model_tokenizer(directory))
        found = tokenize_fitting_tasks(tasks, reader, config.convention, config.stride)
        tokenized_tasks |= {(name, task): tokenized for task, tokenized in found.items()}
    kept = [task for task in tasks if all((name, task.name) in tokenized_tasks for name in names)]
    if not kept:
        raise DataError("no task is left that fits the models and the convention")
    if config.stride is not None and all(tokenized.stride is None for tokenized in tokenized_tasks.values()):
        raise ConfigError("--stride does nothing: every passage of these tasks is a window of its own")
    return kept, tokenized_tasks


def _measure(
    scorer: Scorer, reader: ModelTokenizer, task: Task, tokenized: TokenizedTask, config: PplConfig, parameters: int
) -> tuple[PplRow, Scores]:
    window = max(span.stop - span.start for span in tokenized.spans)
    budget = config.batch_size * window if config.batch_size else _budget(scorer.head.device.type)
    last_words = bool(task.passages) and config.convention != "tinygpt2"
    ruled_out = _stop_words(reader.tokenizer, len(scorer.head)).to(scorer.head.device) if last_words else None
    started = time.perf_counter()
    with track(f"{reader.name} on {task.name}", len(tokenized.spans)) as progress:
        try:
            every = scorer(tokenized.tokens, tokenized.spans, budget, progress.advance, ruled_out)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"out of memory on {task.name}", "lower --batch-size, or take --precision bf16"
            ) from error
    seconds = time.perf_counter() - started
    scores = counted(tokenized, every)
    if math.isnan(scores.loss):
        raise ModelError(f"model {reader.name}: its loss on {task.name} is not a number", "tinygpt2 verify says why")
    row = make_row(reader.name, parameters, task, config.convention, tokenized, scores, seconds, every.targets)
    return row, scores


def _budget(device: str) -> int:
    """Return the tokens in a forward pass: enough for fast products, few enough for little memory."""
    return 2**11 if device == "cpu" else 2**15


def _stop_words(tokenizer: Tokenizer | None, vocabulary: int) -> Bool[Tensor, " V"]:
    """Return which tokens are a stop word by themselves, with a space before it."""
    mask = torch.zeros(vocabulary, dtype=torch.bool)
    if tokenizer is not None:
        words = {f"{space}{word}" for word in STOP_WORDS for space in ("", " ")}
        found = [ids[0] for ids in tokenizer(sorted(words), add_special_tokens=False)["input_ids"] if len(ids) == 1]
        mask[found] = True
    return mask


def _pair(a: str, b: str, task: str, left: Scores | None, right: Scores | None) -> Paired:
    if left is None or right is None:
        return Paired(a, b, task, None, None)
    both = Scores(left.sums - right.sums, left.counts)
    return Paired(a, b, task, both.loss, both.stderr)
