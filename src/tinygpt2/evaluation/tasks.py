"""Evaluation texts: the named tasks of GPT-2's paper, text files and pregenerated datasets."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinygpt2.data.dataset import PackedDataset, is_packed_dataset, load_packed_dataset
from tinygpt2.errors import ConfigError, DataError, TinyGPT2Error
from tinygpt2.evaluation.detokenize import detokenize_cbt
from tinygpt2.evaluation.named_tasks import SPECS, HubSplit, TaskSpec
from tinygpt2.utils.files import absolute, read_text
from tinygpt2.utils.hub import dataset_rows
from tinygpt2.utils.progress import say, track

ALL = "all"
_WHOLE, _TEST = 100_000_000, 5_000_000  # bytes of enwik8 and text8, and of their test part at the end


@dataclass(frozen=True)
class Question:
    """A question of the Children's Book Test: its context, each candidate with the text after it, and the right one."""

    context: str
    endings: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Task:
    """A text to measure on, after it was read.

    Attributes:
        spec: its properties.
        name: its name, or the path that was given.
        source: the file or the Hub dataset that it was read from.
        text: for a running text, the text of its file.
        passages, questions, packed: the content of the other kinds.
        optional: whether it was found by `all`, so that it is skipped if it does not fit a model.
    """

    spec: TaskSpec
    name: str
    source: str
    text: str = ""
    passages: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    packed: PackedDataset | None = None
    optional: bool = False

    def joined(self) -> str:
        """Return the text as the conventions `hf` and `tinygpt2` join it."""
        if self.spec.kind == "passages":
            return "\n\n".join(self.passages)
        lines = self.text.removesuffix("\n").split("\n")
        if self.spec.joined == "rows":
            return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)
        return "\n\n".join(line.strip() for line in lines) if self.spec.joined == "lines" else self.text


def load_tasks(names: Iterable[str], data: str | None) -> list[Task]:
    """Find evaluation texts.

    Args:
        names: names of tasks, `all` for every named task whose data is found, or paths of text files and
            pregenerated datasets.
        data: file or folder with the texts of the named tasks; None reads them from the Hub.

    Raises:
        ConfigError: a name is unknown, or `data` is given but `names` does not contain a task that it can belong to.
        DataError: a text is missing, empty, not UTF-8, or not available from the Hub.
    """
    asked = list(dict.fromkeys(names))
    named = [name for name in asked if name in SPECS or name == ALL]
    if data is not None and not named:
        raise ConfigError(f"--task-data is only for named tasks ({', '.join(SPECS)}): {asked[0]} is a path")
    if data is not None and (len(named) > 1 or ALL in named) and Path(data).is_file():
        raise ConfigError(f"--task-data {data} is one file, but there are several tasks", "give a folder of files")
    tasks: dict[str, Task] = {}
    for name in asked:
        loaded = _every(data) if name == ALL else [_named(SPECS[name], data) if name in SPECS else _at(name)]
        tasks |= {task.name: task for task in loaded}
    return list(tasks.values())


def _every(data: str | None) -> list[Task]:
    found = []
    for spec in SPECS.values():
        try:
            found.append(replace(_named(spec, data), optional=True))
        except DataError as error:
            say(f"{spec.name} is skipped: {error.message}")
    if not found:
        raise DataError("no data was found for any task", "use --task-data FOLDER; the folder must contain their files")
    return found


def _named(spec: TaskSpec, data: str | None) -> Task:
    if data is None:
        if spec.source is None:
            what = "a pregenerated dataset" if spec.kind == "blocks" else f"the file {spec.files[0]}"
            raise DataError(f"{spec.name}: the Hub has no readable copy", f"use --task-data PATH to give {what}")
        with track(f"download {spec.name} from the Hub", None):
            return _from_rows(spec, spec.source)
    path = _find(spec, Path(data))
    if spec.kind == "blocks":
        return Task(spec, spec.name, str(path), packed=load_packed_dataset(str(path)))
    if spec.kind == "choices":
        return Task(spec, spec.name, str(path), questions=tuple(_questions(_read(path), path)))
    if spec.kind == "passages":
        return Task(spec, spec.name, str(path), passages=tuple(_passages(_read(path), path)))
    if spec.unit != "word" and path.stat().st_size == _WHOLE:  # bytes, because the cut may split a character
        return Task(spec, spec.name, str(path), text=path.read_bytes()[-_TEST:].decode("utf-8", "ignore"))
    return Task(spec, spec.name, str(path), text=_read(path))


def _find(spec: TaskSpec, data: Path) -> Path:
    """Return a task's file or dataset: `data` itself, or the first path below it that has one of the task's names."""
    if is_packed_dataset(data) if spec.kind == "blocks" else data.is_file():
        return data
    if data.is_dir():
        below = sorted(data.resolve().rglob("*"))
        for name in spec.files:
            for path in below:
                if path.match(name) and (is_packed_dataset(path) if spec.kind == "blocks" else path.is_file()):
                    return path
    kind = "pregenerated dataset" if spec.kind == "blocks" else "file"
    reason = f"{data} has no {kind} named {' or '.join(spec.files)}" if data.is_dir() else f"{data} is not a {kind}"
    if not data.exists():
        reason = f"no such file: {data}"
    raise DataError(f"{spec.name}: {reason}", f"--task-data must be the {kind} itself or a folder that contains it")


def _at(name: str) -> Task:
    """Read the text file or pregenerated dataset at a path."""
    path = Path(name)
    if path.is_dir():
        if not is_packed_dataset(path):
            raise DataError(
                f"{path} is not a pregenerated dataset", "give a text file, or make a dataset with tinygpt2 pregenerate"
            )
        return Task(TaskSpec(name, kind="blocks"), absolute(name), str(path), packed=load_packed_dataset(name))
    if not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise DataError(f"no such file: {path}")
        close = difflib.get_close_matches(name, [*SPECS, ALL], n=3)
        meant = f", did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"unknown task {name!r}{meant}", "tinygpt2 ppl --list-tasks lists the names; or give a path")
    return Task(TaskSpec(name), absolute(name), str(path), text=_read(path))


def _read(path: Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path} contains no text")
    return text


def _from_rows(spec: TaskSpec, source: HubSplit) -> Task:
    """Read a task from the Hub. Rows of a running text are joined to the text of the original file."""
    try:
        rows = dataset_rows(source.name, source.configuration, source.split, parquet=source.parquet)
    except TinyGPT2Error as error:
        raise DataError(
            f"{spec.name}: {error.message}", f"use --task-data {spec.files[0]}, or check HF_ENDPOINT and the network"
        ) from error
    if spec.kind == "passages":
        return Task(spec, spec.name, str(source), passages=tuple(str(row["text"]) for row in rows))
    if spec.kind == "choices":
        questions = tuple(
            _question(row["sentences"], row["question"], row["answer"], row["options"], f"{source}, row {number}")
            for number, row in enumerate(rows)
        )
        return Task(spec, spec.name, str(source), questions=questions)
    texts = [str(next(iter(row.values()))) for row in rows]
    if spec.joined == "rows":
        text = "".join(row or " \n" for row in texts)
    else:
        text = "".join(f" {row.strip()} \n" for row in texts) if spec.joined == "lines" else "".join(texts)
    return Task(spec, spec.name, str(source), text=text)


def _passages(text: str, path: Path) -> Iterator[str]:
    """Yield LAMBADA's passages. Each line is {"text": ...} or the passage itself."""
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        passage: Any = line.removesuffix("\r")
        if line.startswith("{"):
            try:
                passage = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f'{path}, line {number}: expected {{"text": ...}}') from error
        if " " not in str(passage).strip():
            raise DataError(f"{path}, line {number}: expected a passage of at least two words")
        yield str(passage)


def _questions(text: str, path: Path) -> Iterator[Question]:
    """Yield CBT's questions. A block is twenty numbered sentences, then a question, its answer and the candidates."""
    for number, block in enumerate(re.split(r"\n\s*\n", text.strip()), 1):
        lines = [re.sub(r"^\d+ ", "", line) for line in block.split("\n")]
        parts = lines[-1].split("\t")
        options = parts[-1].split("|")
        where = f"{path}, question {number}"
        yield _question(lines[:-1], parts[0], parts[1] if len(parts) > 2 else "", options, where)


def _question(sentences: list[str], question: str, answer: str, options: list[str], where: str) -> Question:
    """Make a question from its parts: the text before the gap, and each candidate with the text after the gap."""
    if "XXXXX" not in question or answer not in options:
        raise DataError(f"{where}: expected a question with XXXXX, and candidates that include its answer")
    before, after = question.split("XXXXX", 1)
    context = detokenize_cbt(" ".join([*sentences, before]))
    whole = [detokenize_cbt(" ".join([*sentences, before, option, after])) for option in options]
    # detokenization may join the end of the context, such as an opening quote, to a candidate
    shared = next(i for i in range(len(context), -1, -1) if all(text.startswith(context[:i]) for text in whole))
    return Question(context[:shared], tuple(text[shared:] for text in whole), options.index(answer))
