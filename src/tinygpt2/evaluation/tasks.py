"""Evaluation texts: the named tasks of GPT-2's paper, text files and pregenerated datasets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tinygpt2.config.data import FileOptions
from tinygpt2.data.corpus.formats import ReadOptions
from tinygpt2.data.corpus.readers import read_documents, table_rows
from tinygpt2.data.dataset import PackedDataset, load_packed_dataset
from tinygpt2.errors import ConfigError, DataError, TinyGPT2Error
from tinygpt2.evaluation.choices.questions import Question, question_of, read_questions
from tinygpt2.evaluation.detokenize import detokenize_cbt
from tinygpt2.evaluation.named_tasks import ALL, OWN, SPECS, HubSplit, TaskSpec
from tinygpt2.evaluation.task_files import check_tasks, find_task, is_alone, no_copy
from tinygpt2.utils.files import absolute, open_file
from tinygpt2.utils.hub import dataset_rows
from tinygpt2.utils.progress import say, track

_WHOLE, _TEST = 100_000_000, 5_000_000  # bytes of enwik8 and text8, and of their test part at the end


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


def load_tasks(
    names: Iterable[str], data: str | None, how: FileOptions | None = None, limit: int | None = None
) -> list[Task]:
    """Find evaluation texts.

    A file of rows (JSON lines, Parquet and so on) is the texts of its rows with an empty line between them, as in the
    transformers page on perplexity; blank ones are left out. The rows of a named task are joined to its original file.

    Args:
        names: names of tasks, `all` for every named task whose data is found, or paths of text files and
            pregenerated datasets.
        data: file or folder with the texts of the named tasks; None reads them from the Hub.
        how: how files are read; None reads them by their names and contents.
        limit: keep only the first of the questions or passages of each task, of BLiMP those of each paradigm.

    Raises:
        ConfigError: a name is unknown, or `data` is given but `names` does not contain a task that it can belong to.
        DataError: a text is missing, empty, not UTF-8, or not available from the Hub.
    """
    asked = list(dict.fromkeys(names))
    check_tasks(asked, data)
    how, alone = how or FileOptions(), is_alone(asked)
    tasks: dict[str, Task] = {}
    for name in asked:
        if name == ALL:
            loaded = _every(data, how, limit)
        elif name in SPECS:
            loaded = [_named(SPECS[name], data, how, limit, alone=alone)]
        else:
            loaded = [_own(name, limit) if name.startswith(OWN) else _at(name, how)]
        tasks |= {task.name: task for task in loaded}
    if limit is not None and not any(task.passages or task.questions for task in tasks.values()):
        raise ConfigError("--limit has no effect: none of the tasks has questions or passages")
    if not any(task.passages or task.text or task.spec.form == "cbt" for task in tasks.values()):
        for given in how.changed(*FileOptions.model_fields):
            raise ConfigError(f"{given} has no effect: none of the tasks reads texts")
    return list(tasks.values())


def _every(data: str | None, how: FileOptions, limit: int | None) -> list[Task]:
    found = []
    for spec in SPECS.values():
        try:
            found.append(replace(_named(spec, data, how, limit), optional=True))
        except DataError as error:
            say(f"{spec.name} is skipped: {error.message}")
    if not found:
        raise DataError("no data was found for any task", "use --task-data FOLDER; the folder must contain their files")
    return found


def _named(spec: TaskSpec, data: str | None, how: FileOptions, limit: int | None, *, alone: bool = False) -> Task:
    """Read a named task. `alone` says that no other task is read from the same folder."""
    if data is None:
        if spec.source is None:
            raise no_copy(spec)
        with track(f"download {spec.name} from the Hub", None):
            return _from_rows(spec, spec.source, limit)
    parts = [spec] if Path(data).is_file() else spec.parts  # one file is all of BLiMP
    found = [find_task(part, Path(data), alone=alone and len(parts) == 1) for part in parts]
    paths, path = found[0], found[0][0]
    if spec.kind == "blocks":
        return Task(spec, spec.name, str(path), packed=load_packed_dataset(str(path)))
    if spec.unit != "word" and path.stat().st_size == _WHOLE:  # bytes, because the cut may split a character
        return Task(spec, spec.name, str(path), text=_end(path.read_bytes()))
    column = spec.column if how.text_column == "text" else how.text_column
    files = ReadOptions(text_column=column, format=how.input_format, members=spec.files)
    if spec.kind == "choices":
        questions = tuple(question for part in found for question in _questions(spec, part, files)[:limit])
        return Task(spec, spec.name, str(path if len(found) == 1 else Path(data)), questions=questions)
    texts, rows = _read(paths, files)
    if spec.kind == "passages":
        if not rows and texts[0].startswith('{"'):  # JSON lines under the name of a text file
            texts, rows = _read(paths, replace(files, format="jsonl"))
        return Task(spec, spec.name, str(path), passages=tuple(_passages(texts, path, rows=rows))[:limit])
    text = _running(spec, texts) if rows else "\n\n".join(texts)
    if spec.unit != "word" and len(raw := text.encode()) == _WHOLE:
        text = _end(raw)
    return Task(spec, spec.name, str(path), text=text)


def _end(raw: bytes) -> str:
    return raw[-_TEST:].decode("utf-8", "ignore")


def _own(name: str, limit: int | None) -> Task:
    """Read a file with questions of one's own."""
    path = Path(name.removeprefix(OWN))
    questions = tuple(read_questions("own", [path])[:limit])
    return Task(
        TaskSpec(name, kind="choices", form="own"), f"{OWN}{absolute(str(path))}", str(path), questions=questions
    )


def _at(name: str, how: FileOptions) -> Task:
    """Read the text file or pregenerated dataset at a path."""
    path = Path(name)
    if path.is_dir():
        return Task(TaskSpec(name, kind="blocks"), absolute(name), str(path), packed=load_packed_dataset(name))
    texts, _ = _read([path], ReadOptions(text_column=how.text_column, format=how.input_format))
    texts = [text for text in texts if text.strip()]
    if len(texts) > 1:
        say(f"{path}: {len(texts)} texts, measured as one with an empty line between them")
    return Task(TaskSpec(name), absolute(name), str(path), text="\n\n".join(texts))


def _read(paths: list[Path], how: ReadOptions) -> tuple[list[str], bool]:
    """Return the texts of files, and whether they are rows of tables."""
    texts = [text for path in paths for text in read_documents(path, how)]
    if not any(text.strip() for text in texts):
        raise DataError(f"{paths[0]} contains no text")
    return texts, how.notes.formats != {"text"}


def _from_rows(spec: TaskSpec, source: HubSplit, limit: int | None) -> Task:
    """Read a task from the Hub."""
    parts = []
    try:
        for part in (one.source for one in spec.parts if one.source is not None):
            rows = dataset_rows(part.name, part.configuration, part.split, parquet=part.parquet)
            parts.append((part, rows))
    except TinyGPT2Error as error:
        raise DataError(
            f"{spec.name}: {error.message}", f"use --task-data {spec.files[0]}, or check HF_ENDPOINT and the network"
        ) from error
    rows = parts[0][1]
    if spec.kind == "passages":
        return Task(spec, spec.name, str(source), passages=tuple(str(row["text"]) for row in rows[:limit]))
    if spec.kind == "choices":
        make = _cbt_row if spec.form == "cbt" else partial(question_of, spec.form)
        questions = tuple(
            make(row, f"{part}, row {number}") for part, rows in parts for number, row in enumerate(rows[:limit], 1)
        )
        return Task(spec, spec.name, str(source), questions=questions)
    return Task(spec, spec.name, str(source), text=_running(spec, [str(row[spec.column]) for row in rows]))


def _running(spec: TaskSpec, rows: list[str]) -> str:
    """Join a dataset's rows to the text of the original file."""
    if spec.joined == "rows":
        return "".join(row or " \n" for row in rows)
    return "".join(f" {row.strip()} \n" for row in rows) if spec.joined == "lines" else "".join(rows)


def _passages(texts: list[str], path: Path, *, rows: bool) -> Iterator[str]:
    """Yield LAMBADA's passages: rows, or the lines of a text."""
    lines = texts if rows else [line.removesuffix("\r") for line in texts[0].removesuffix("\n").split("\n")]
    for number, passage in enumerate(lines, 1):
        if " " not in passage.strip():
            raise DataError(f"{path}, {'row' if rows else 'line'} {number}: expected a passage of at least two words")
        yield passage


def _questions(spec: TaskSpec, paths: list[Path], how: ReadOptions) -> list[Question]:
    """Read the questions of a task."""
    if spec.form != "cbt":
        return read_questions(spec.form, paths)
    with open_file(paths[0]) as stream:
        parquet = stream.read(4) == b"PAR1"
    if parquet:
        return [_cbt_row(row, where) for where, row in chain.from_iterable(map(table_rows, paths))]
    return list(_cbt_blocks(paths, how))


def _cbt_blocks(paths: list[Path], how: ReadOptions) -> Iterator[Question]:
    """Yield CBT's questions. A block is twenty numbered sentences, then a question, its answer and the candidates."""
    texts, _ = _read(paths, how)
    for number, block in enumerate(re.split(r"\n\s*\n", "\n\n".join(texts).strip()), 1):
        lines = [re.sub(r"^\d+ ", "", line) for line in block.split("\n")]
        parts = lines[-1].split("\t")
        options = parts[-1].split("|")
        where = f"{paths[0]}, question {number}"
        yield _cbt_question(lines[:-1], parts[0], parts[1] if len(parts) > 2 else "", options, where)


def _cbt_row(row: dict[str, Any], where: str) -> Question:
    """Make a question from a row of CBT on the Hub."""
    names = ("sentences", "question", "answer", "options")
    if any(row.get(name) is None for name in names):
        raise DataError(f"{where}: expected the columns {', '.join(names)} (found: {', '.join(row)})")
    return _cbt_question(row["sentences"], row["question"], row["answer"], row["options"], where)


def _cbt_question(sentences: list[str], question: str, answer: str, options: list[str], where: str) -> Question:
    """Make a question of CBT: the text before the gap, and each candidate with the text after the gap."""
    if "XXXXX" not in question or answer not in options:
        raise DataError(f"{where}: expected a question with XXXXX, and candidates that include its answer")
    before, after = question.split("XXXXX", 1)
    context = detokenize_cbt(" ".join([*sentences, before]))
    whole = [detokenize_cbt(" ".join([*sentences, before, option, after])) for option in options]
    # detokenization may join the end of the context, such as an opening quote, to a candidate
    shared = next(i for i in range(len(context), -1, -1) if all(text.startswith(context[:i]) for text in whole))
    return Question.after(context[:shared], [text[shared:] for text in whole], options.index(answer))
