"""`ppl`: zero-shot perplexity of models on tasks, and the differences between models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from jaxtyping import Bool
from torch import Tensor, distributed

from tinygpt2.config.evaluation import Convention, PplConfig
from tinygpt2.data.encoding import encode
from tinygpt2.data.tokenizer import fingerprint
from tinygpt2.errors import ConfigError, DataError, ModelError, TinyGPT2Error
from tinygpt2.evaluation.conventions import ModelTokenizer, TokenizedTask, counted, tokenize_task
from tinygpt2.evaluation.fidelity import Fidelity, compare, counted_spans, reads_alike
from tinygpt2.evaluation.other_tokens import compare_across
from tinygpt2.evaluation.plots import plot_comparison
from tinygpt2.evaluation.results import PplResult, PplRow, make_pair, make_row, short_names
from tinygpt2.evaluation.scoring import Scorer, Scores, enough_memory
from tinygpt2.evaluation.stopwords import STOP_WORDS
from tinygpt2.evaluation.tasks import Task, load_tasks
from tinygpt2.models.activations import attention_kernel
from tinygpt2.models.compatibility import text_sizes
from tinygpt2.models.lm_head import scoring_chunk
from tinygpt2.models.loading import load_causal_lm, model_tokenizer
from tinygpt2.models.parameters import count_parameters
from tinygpt2.models.teachers.vocabularies import token_read_first
from tinygpt2.runtime.cpu import fast_products
from tinygpt2.runtime.devices import DTYPES, computes_on_device, current_device, on_cuda
from tinygpt2.runtime.launch import check_number, launch
from tinygpt2.runtime.processes import launched
from tinygpt2.runtime.threads import tell_machine
from tinygpt2.utils.files import absolute
from tinygpt2.utils.hub import download_size
from tinygpt2.utils.plotting import plot_may_fail
from tinygpt2.utils.progress import ProgressStage, detail, follow, say, shown, track
from tinygpt2.utils.units import size

if TYPE_CHECKING:
    from tinygpt2.utils.types import Tokenizer

_GPT2_BYTES = 548_105_171  # of gpt2's model.safetensors on the Hub


@computes_on_device
def ppl(config: PplConfig) -> PplResult:
    """Measure the zero-shot perplexity of every model on every task.

    Args:
        config: its `list_tasks` must be off: see `list_tasks`.

    Raises:
        ConfigError: a task is unknown, the stride is larger than the window, or blocks are longer than the model's
            positions.
        DataError: a text is missing, empty or too short, or a dataset was made with another tokenizer.
        ModelError: a model cannot be loaded, or has no tokenizer for a text.
    """
    if config.list_tasks:
        raise ConfigError("ppl measures, and list_tasks does not", "call tinygpt2.list_tasks instead")
    check_number(config.num_processes)
    if config.precision == "fp16" and not on_cuda():
        raise ConfigError("--precision fp16 needs a CUDA GPU", "elsewhere use bf16 or fp32")
    if (config.num_processes or 1) > 1 and not launched():
        result: PplResult = launch("ppl", config.num_processes or 1, config)
        return result
    if "model" not in config.model_fields_set:
        _say_default_model(config.model[0])
    joined = distributed.is_initialized()
    if not joined:  # forget the processes of an earlier call: they no longer exist
        PartialState._reset_state()
    state = PartialState(cpu=current_device().type == "cpu")
    try:
        # no barrier, which would time out: while one process downloads, the others wait for the lock on the Hub's cache
        tasks = load_tasks(config.task, config.task_data, config, config.limit)
        names = [task.name for task in tasks]
        if any(other != names for other in gather_object([names])):
            raise DataError(
                "the processes found different tasks", "name the tasks instead of using --task all, or use --task-data"
            )
        with fast_products():
            measured = _measure_all(config, tasks, state.device)
        if config.plot and state.is_main_process:
            with plot_may_fail(config.plot):
                plot_comparison(measured, config)
    finally:
        if not joined:
            state.destroy_process_group()
    return measured


def _say_default_model(name: str) -> None:
    """Say which model is measured without --model, and how large its download is."""
    if not shown():
        return
    if Path(name).is_dir():
        say(f"no --model was given: measuring the directory {name}")
        return
    say(f"no --model was given: measuring {name} (OpenAI's smallest, 124M parameters)")
    if missing := download_size(name, _GPT2_BYTES):
        say(f"its weights are not in the Hub's cache: about {size(missing)} to download")


def tokenize_fitting_tasks(
    tasks: list[Task], model: ModelTokenizer, convention: Convention = "hf", stride: int | None = None
) -> dict[str, TokenizedTask]:
    """Tokenize tasks for a model. Tasks that were found by `all` and do not fit the model are skipped.

    Raises:
        ConfigError, DataError, ModelError: a task that was given by name does not fit; see `tokenize_task`.
    """
    tokenized_tasks = {}
    for task in tasks:
        try:
            tokenized_tasks[task.name] = tokenize_task(task, model, convention, stride)
        except TinyGPT2Error as error:
            if not task.optional:
                raise
            say(f"{task.name} is skipped: {error.message}")
    return tokenized_tasks


def _measure_all(config: PplConfig, tasks: list[Task], device: torch.device) -> PplResult:
    names = list(dict.fromkeys(config.model))
    tasks, tokenized_tasks, alike = _tokenize_all(config, names, tasks)
    tell_machine(device, config.precision)
    detail(f"attention: {attention_kernel(device.type, DTYPES[config.precision], gradients=False)}")
    rows, done = [], {}
    with _Stages(names, tasks, tokenized_tasks) as stages:
        for name in names:
            scorer, tokenizer = _opened(name, config, device)
            parameters = count_parameters(scorer.model)
            for task in tasks:
                with stages.next(name, task.name) as advance:
                    row, done[name, task.name] = _measure(
                        scorer, tokenizer, task, tokenized_tasks[name, task.name], config, parameters, advance
                    )
                rows.append(row)
            del scorer  # so that two models are never in memory at once
    both = {key: (tokenized_tasks[key], scores) for key, scores in done.items()}
    paired = [
        make_pair(a, b, task.name, both[a, task.name], both[b, task.name])
        for task in tasks
        for a, b in combinations(names, 2)
    ]
    if config.reference is not None:
        fidelity = _compare_all(config, config.reference, names, tasks, tokenized_tasks, alike, device)
        rows = [replace(row, fidelity=fidelity[row.model, row.task]) for row in rows]
    return PplResult(rows, paired)


def _opened(name: str, config: PplConfig, device: torch.device) -> tuple[Scorer, ModelTokenizer]:
    """Load a model that is ready to score, and its tokenizer."""
    model, directory = load_causal_lm(name, allow_pickle=config.allow_pickle)
    tokenizer = ModelTokenizer(name, text_sizes(model), model_tokenizer(directory))
    scorer = Scorer(model, config.precision, device)
    scorer.begin_with(_start(tokenizer, config.convention))
    return scorer, tokenizer


def _start(model: ModelTokenizer, convention: Convention) -> int | None:
    """Return the token that a model reads before each window. Two conventions put one before the text themselves."""
    return token_read_first(model.config, model.tokenizer) if convention in ("hf", "tinygpt2") else None


def _compare_all(
    config: PplConfig,
    reference: str,
    names: list[str],
    tasks: list[Task],
    tokenized_tasks: dict[tuple[str, str], TokenizedTask],
    alike: set[tuple[str, str]],
    device: torch.device,
) -> dict[tuple[str, str], Fidelity]:
    """Return the fidelity of every model, by its absolute name, on every task.

    Args:
        alike: the models and tasks that the reference reads as the same tokens.
    """
    found: dict[tuple[str, str], Fidelity] = {}
    opened = {name: _opened(name, config, device) for name in dict.fromkeys([reference, *names])}
    readers = {name: (tokenizer, scorer) for name, (scorer, tokenizer) in opened.items()}
    for task in tasks:
        waiting = list(names)
        while waiting:  # models that read the task as the same windows are compared at once
            tokenized = tokenized_tasks[waiting[0], task.name]
            same = (waiting[0], task.name) in alike
            group = [
                name
                for name in waiting
                if ((name, task.name) in alike) == same
                and opened[name][0].head.size == opened[waiting[0]][0].head.size
                and tokenized.same_targets(tokenized_tasks[name, task.name])
            ]
            waiting = [name for name in waiting if name not in group]
            title = f"{', '.join(short_names(group).values())} beside {Path(reference).name} on {Path(task.name).name}"
            budget = _budget(config, tokenized, device.type)
            total = sum(span.targets for span in counted_spans(tokenized))
            with track(title, total, "tokens") as stage, enough_memory(task.name):
                if same:
                    models = {absolute(name): opened[name][0] for name in group}
                    whole = absolute(reference), opened[reference][0]
                    compared = compare(whole, models, tokenized, budget, stage.advance)
                else:
                    others = {absolute(name): readers[name] for name in group}
                    compared = compare_across(readers[reference], others, tokenized, budget, stage.advance)
            found |= {(name, task.name): one for name, one in compared.items()}
    return found


class _Stages(ExitStack):
    """Reports how far each model is on each task and, if there are several of them, how far all are."""

    def __init__(self, names: list[str], tasks: list[Task], tokenized: dict[tuple[str, str], TokenizedTask]) -> None:
        super().__init__()
        self._targets = {key: sum(span.targets for span in one.spans) for key, one in tokenized.items()}
        self._names, self._tasks = short_names(names), short_names([task.name for task in tasks])
        self._count, self._number, self._whole = len(names) * len(tasks), 0, ProgressStage()

    def __enter__(self) -> Self:
        if self._count > 1:
            total = sum(self._targets[name, task] for name in self._names for task in self._tasks)
            self._whole = self.enter_context(track("all of them", total, "tokens", announce=False, lines=False))
        return self

    @contextmanager
    def next(self, name: str, task: str) -> Iterator[Callable[[int, str], None]]:
        """Report on a model and a task; yield a function to be called with the targets just scored and a note."""
        self._number += 1
        number = f"{self._number} of {self._count}: " if self._count > 1 else ""
        title = f"{number}{self._names[name]} on {self._tasks[task]}"
        with track(title, self._targets[name, task], "tokens") as stage:

            def advance(targets: int, note: str) -> None:
                stage.advance(targets, note)
                self._whole.advance(targets)

            yield advance


def _tokenize_all(
    config: PplConfig, names: list[str], tasks: list[Task]
) -> tuple[list[Task], dict[tuple[str, str], TokenizedTask], set[tuple[str, str]]]:
    """Tokenize every task for every model before anything is measured, so that errors are reported early.

    Returns:
        The tasks to measure, the tokenized task for each model and task, and the models and tasks that the reference
        reads as the same tokens. Tasks that were found by `all` and do not fit every model and the convention are
        skipped.
    """
    tokenized_tasks: dict[tuple[str, str], TokenizedTask] = {}
    every = list(dict.fromkeys([*names, *([config.reference] if config.reference else [])]))
    readers = {}
    for name in follow(every, "tokenize the tasks", "models", announce=False):
        model, directory = load_causal_lm(name, allow_pickle=config.allow_pickle, hollow=True)
        readers[name] = tokenizer = ModelTokenizer(name, text_sizes(model), model_tokenizer(directory))
        own = [task for task in tasks if name in names or _reads(tokenizer, task)]
        stride = config.stride if name in names else None  # of the reference, only the tokens are used
        fitting = tokenize_fitting_tasks(own, tokenizer, config.convention, stride)
        tokenized_tasks |= {(name, task): tokenized for task, tokenized in fitting.items()}
    kept = [task for task in tasks if all((name, task.name) in tokenized_tasks for name in names)]
    alike = set()
    if config.reference is not None:
        whole = readers[config.reference]
        room = whole.positions - (_start(whole, config.convention) is not None)
        kept = [task for task in kept if (whole.name, task.name) in tokenized_tasks or not _reads(whole, task)]
        alike = {
            (name, task.name)
            for name in names
            for task in kept
            if reads_alike(
                (whole, tokenized_tasks.get((whole.name, task.name))),
                (readers[name], tokenized_tasks[name, task.name]),
                task.name,
                room,
            )
        }
    if not kept:
        raise DataError("none of the tasks fits the models and the convention")
    if config.stride is not None and all(tokenized.stride is None for tokenized in tokenized_tasks.values()):
        raise ConfigError("--stride has no effect: in these tasks every passage is one window")
    return kept, tokenized_tasks, alike


def _reads(model: ModelTokenizer, task: Task) -> bool:
    """Return whether a task has tokens for a model: a text has, and a dataset if they are the model's."""
    if task.packed is None or model.tokenizer is None:
        return True
    return fingerprint(model.tokenizer) == str(task.packed.manifest["tokenizer_fingerprint"])


def _measure(
    scorer: Scorer,
    model: ModelTokenizer,
    task: Task,
    tokenized: TokenizedTask,
    config: PplConfig,
    parameters: int,
    advance: Callable[[int, str], None],
) -> tuple[PplRow, Scores]:
    budget = _budget(config, tokenized, scorer.head.matrix.device.type)
    last_words = bool(task.passages) and config.convention != "tinygpt2"
    ruled_out = (
        _stop_words(model.tokenizer, scorer.model.vocabulary).to(scorer.head.matrix.device) if last_words else None
    )
    chunk = scoring_chunk(scorer.head.size, scorer.head.matrix.device.type)
    detail(f"{task.name}: up to {budget:,} tokens in a forward pass, logits of {chunk:,} tokens at a time")
    started = time.perf_counter()
    with enough_memory(task.name):
        candidates = tokenized.candidates if len(tokenized.candidates) else None
        lines = tokenized.lines(model.tokenizer) if len(config.model) > 1 else None
        every = scorer(tokenized.tokens, tokenized.spans, budget, advance, ruled_out, candidates, lines)
    seconds = time.perf_counter() - started
    scores = counted(tokenized, every)
    if not np.isfinite(every.sums).all():
        raise ModelError(
            f"model {model.name}: the loss on {task.name} is NaN or infinite, although the weights are finite",
            "check the model with tinygpt2 verify"
            if config.precision == "fp32"
            else f"--precision {config.precision} may be too coarse: use fp32",
        )
    row = make_row(model.name, parameters, task, config.convention, tokenized, scores, seconds, every.targets)
    return row, scores


def _budget(config: PplConfig, tokenized: TokenizedTask, device: str) -> int:
    """Return the number of tokens in one forward pass; by default, a compromise between speed and memory."""
    if config.batch_size:
        return config.batch_size * max(span.stop - span.start for span in tokenized.spans)
    return 2**11 if device == "cpu" else 2**15


def _stop_words(tokenizer: Tokenizer | None, vocabulary: int) -> Bool[Tensor, " V"]:
    """Return a mask of the tokens that are a whole stop word, with or without a space before it."""
    mask = torch.zeros(vocabulary, dtype=torch.bool)
    if tokenizer is not None:
        words = {f"{space}{word}" for word in STOP_WORDS for space in ("", " ")}
        mask[[ids[0] for ids in encode(tokenizer, sorted(words)) if len(ids) == 1]] = True
    return mask
