"""Evaluation texts: the named ones of GPT-2's paper, a text file as it stands, a pregenerated dataset."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tinygpt2.data.dataset import PackedDataset, is_packed_dataset, load_packed_dataset
from tinygpt2.errors import ConfigError, DataError, TinyGPT2Error
from tinygpt2.evaluation.detokenize import Style, detokenize_cbt
from tinygpt2.utils.files import absolute, read_text
from tinygpt2.utils.hub import dataset_rows
from tinygpt2.utils.progress import say, track

ALL = "all"
TextUnit = Literal["word", "character", "byte"]
_WHOLE, _TEST = 100_000_000, 5_000_000  # bytes of enwik8 and text8, and of their last part, which is measured


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set on the Hub.

    Attributes:
        parquet: take it from the Hub's own conversion to Parquet, because the data set itself is a program.
    """

    name: str
    configuration: str | None = None
    split: str = "test"
    parquet: bool = False

    def __str__(self) -> str:
        return ":".join(part for part in (self.name, self.configuration, self.split) if part)


@dataclass(frozen=True)
class TaskSpec:
    """What is known of a kind of text before it is read.

    Attributes:
        kind: a running text, passages whose last word counts (LAMBADA), questions with ten candidates (CBT), or
            pregenerated blocks.
        unit: the canonical unit, over which GPT-2's paper spreads the loss.
        style: what its detokenizer undoes.
        lines: whether the unit counts the end of every line as a word, as word-level models do.
        joined: how the `hf` and `tinygpt2` conventions put its lines together: `rows` as WikiText's on the Hub,
            where a blank line is an empty row and others keep their line end; `lines` without it. Both join with an
            empty line between.
        files: names that it goes by, the preferred first; a folder's name may stand before.
        source: where the Hub has it.
        published: values of OpenAI's gpt2 (124M), with their source.
    """

    name: str
    kind: Literal["text", "passages", "choices", "blocks"] = "text"
    unit: TextUnit = "word"
    style: Style | None = None
    lines: bool = False
    joined: Literal["rows", "lines"] | None = None
    files: tuple[str, ...] = ()
    source: HubSplit | None = None
    published: str = ""


_PAPER = "paper, table 3"
SPECS = {
    spec.name: spec
    for spec in (
        TaskSpec(
            "wikitext", style="wikitext", lines=True, joined="rows", files=("wiki.test.raw",),
            source=HubSplit("Salesforce/wikitext", "wikitext-2-raw-v1"),
            published="29.94 (hf; transformers#13761), 37.37 a word (lm-eval; the same)",
        ),
        TaskSpec(
            "wikitext-2", style="wikitext", lines=True, joined="rows",
            files=("wikitext-2*/wiki.test.tokens", "wikitext-2*/test.txt"),
            source=HubSplit("Salesforce/wikitext", "wikitext-2-v1"), published=f"29.41 a word ({_PAPER})",
        ),
        TaskSpec(
            "wikitext-103", style="wikitext", lines=True, joined="rows",
            files=("wikitext-103*/wiki.test.tokens", "wikitext-103*/test.txt"),
            source=HubSplit("Salesforce/wikitext", "wikitext-103-v1"), published=f"37.50 a word ({_PAPER})",
        ),
        TaskSpec(
            "ptb", style="ptb", lines=True, joined="lines",
            files=("ptb.test.txt", "ptb*/test.txt", "ptb.valid.txt", "ptb*/valid.txt"),
            source=HubSplit("ptb-text-only/ptb_text_only", "penn_treebank", parquet=True),
            published=f"65.85 a word ({_PAPER})",
        ),
        TaskSpec(
            "lambada", kind="passages", files=("lambada_test.jsonl", "lambada_test*.jsonl", "lambada_test*.txt"),
            source=HubSplit("EleutherAI/lambada_openai", "default"),
            published=f"35.13 a word, accuracy 45.99 % ({_PAPER}); 40.06, 32.56 % (lm-eval#2159)",
        ),
        TaskSpec(
            "cbt-cn", kind="choices", files=("cbtest_CN_test_2500ex.txt",), source=HubSplit("cam-cst/cbt", "CN"),
            published=f"accuracy 87.65 % ({_PAPER})",
        ),
        TaskSpec(
            "cbt-ne", kind="choices", files=("cbtest_NE_test_2500ex.txt",), source=HubSplit("cam-cst/cbt", "NE"),
            published=f"accuracy 83.4 % ({_PAPER})",
        ),
        TaskSpec("enwik8", unit="byte", files=("enwik8", "enwik8.txt"), published=f"1.16 bits a byte ({_PAPER})"),
        TaskSpec(
            "text8", unit="character", files=("text8", "text8.txt"), source=HubSplit("afmck/text8"),
            published=f"1.17 bits a character ({_PAPER})",
        ),
        TaskSpec(
            "1bw", style="news", lines=True, joined="lines", files=("news.en.heldout-00000-of-00050",),
            published=f"75.20 a word ({_PAPER})",
        ),
        TaskSpec("openwebtext", kind="blocks", files=("openwebtext*",)),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question of the Children's Book Test: each candidate with what follows it, and which one is right."""

    context: str
    endings: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Task:
    """Something to measure on, read.

    Attributes:
        spec: what kind of text it is.
        name: as it was asked for: a name, or a path.
        source: where it came from.
        text: a running text as its file has it.
        passages, questions, packed: what the other kinds hold.
        optional: whether `all` asked for it, and it may be left out where it does not fit.
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
        """Return the text as the conventions `hf` and `tinygpt2` put it together."""
        if self.spec.kind == "passages":
            return "\n\n".join(self.passages)
        lines = self.text.removesuffix("\n").split("\n")
        if self.spec.joined == "rows":
            return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)
        return "\n\n".join(line.strip() for line in lines) if self.spec.joined == "lines" else self.text


@dataclass(frozen=True)
class TaskInfo:
    """A named task, as `--list-tasks` shows it."""

    name: str
    unit: str
    detokenizer: str
    source: str
    files: str
    published_gpt2: str


@dataclass(frozen=True)
class TaskList:
    """Every named task."""

    tasks: list[TaskInfo]


def task_list() -> TaskList:
    """Describe every named task."""
    units = {"passages": "last word", "choices": "one of ten candidates"}
    return TaskList([
        TaskInfo(
            spec.name, units.get(spec.kind, spec.unit), "cbt" if spec.kind == "choices" else spec.style or "-",
            "a pregenerated dataset" if spec.kind == "blocks" else str(spec.source or "--task-data only"),
            ", ".join(spec.files), spec.published or "-",
        )
        for spec in SPECS.values()
    ])  # fmt: skip


def load_tasks(names: Iterable[str], data: str | None) -> list[Task]:
    """Find evaluation texts.

    Args:
        names: of tasks, `all` of them whose data can be had, or paths of text files and pregenerated datasets.
        data: file or folder with the named tasks' texts, instead of the Hub.

    Raises:
        ConfigError: an unknown name, or `data` without a named task that it could belong to.
        DataError: a text is missing, empty, not UTF-8, or cannot be had from the Hub.
    """
    asked = list(dict.fromkeys(names))
    named = [name for name in asked if name in SPECS or name == ALL]
    if data is not None and not named:
        raise ConfigError(f"--task-data goes with a named task ({', '.join(SPECS)}), not with the path {asked[0]}")
    if data is not None and (len(named) > 1 or ALL in named) and Path(data).is_file():
        raise ConfigError(f"--task-data {data} is one file for several tasks", "give the folder that holds their files")
    tasks: dict[str, Task] = {}
    for name in asked:
        found = _every(data) if name == ALL else [_named(SPECS[name], data) if name in SPECS else _at(name)]
        tasks |= {task.name: task for task in found}
    return list(tasks.values())


def _every(data: str | None) -> list[Task]:
    found = []
    for spec in SPECS.values():
        try:
            found.append(replace(_named(spec, data), optional=True))
        except DataError as error:
            say(f"{spec.name} is left out: {error.message}")
    if not found:
        raise DataError("no task's data can be had", "give --task-data FOLDER with their files")
    return found


def _named(spec: TaskSpec, data: str | None) -> Task:
    if data is None:
        if spec.source is None:
            what = "a pregenerated dataset" if spec.kind == "blocks" else spec.files[0]
            raise DataError(f"{spec.name} is not on the Hub in a form that can be read", f"give --task-data: {what}")
        with track(f"fetch {spec.name} from the Hub", None):
            return _from_rows(spec, spec.source)
    path = _find(spec, Path(data))
    if spec.kind == "blocks":
        return Task(spec, spec.name, str(path), packed=load_packed_dataset(str(path)))
    if spec.kind == "choices":
        return Task(spec, spec.name, str(path), questions=tuple(_questions(_read(path), path)))
    if spec.kind == "passages":
        return Task(spec, spec.name, str(path), passages=tuple(_passages(_read(path), path)))
    if spec.unit != "word" and path.stat().st_size == _WHOLE:  # the cut may go through a character
        return Task(spec, spec.name, str(path), text=path.read_bytes()[-_TEST:].decode("utf-8", "ignore"))
    return Task(spec, spec.name, str(path), text=_read(path))


def _find(spec: TaskSpec, data: Path) -> Path:
    """Return a task's file: `data` itself, or what goes by one of its names below it."""
    if is_packed_dataset(data) if spec.kind == "blocks" else data.is_file():
        return data
    if data.is_dir():
        below = sorted(data.resolve().rglob("*"))
        for name in spec.files:
            for path in below:
                if path.match(name) and (is_packed_dataset(path) if spec.kind == "blocks" else path.is_file()):
                    return path
    what = "a pregenerated dataset" if spec.kind == "blocks" else "file"
    reason = f"no {what} in {data} is called {' or '.join(spec.files)}" if data.is_dir() else f"{data} is no {what}"
    if not data.exists():
        reason = f"no such file: {data}"
    raise DataError(f"{spec.name}: {reason}", "--task-data takes the data itself, or a folder that holds it")


def _at(name: str) -> Task:
    """Read a path: a text file, or a pregenerated dataset."""
    path = Path(name)
    if path.is_dir():
        if not is_packed_dataset(path):
            raise DataError(
                f"{path} is no pregenerated dataset", "give a text file, or make a dataset with tinygpt2 pregenerate"
            )
        return Task(TaskSpec(name, kind="blocks"), absolute(name), str(path), packed=load_packed_dataset(name))
    if not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise DataError(f"no such file: {path}")
        close = difflib.get_close_matches(name, [*SPECS, ALL], n=3)
        meant = f", did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"unknown task {name!r}{meant}", "a path, or a name of tinygpt2 ppl --list-tasks")
    return Task(TaskSpec(name), absolute(name), str(path), text=_read(path))


def _read(path: Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path} holds no text")
    return text


def _from_rows(spec: TaskSpec, source: HubSplit) -> Task:
    """Read a task from the Hub; a text is put back as its file has it."""
    try:
        rows = dataset_rows(source.name, source.configuration, source.split, parquet=source.parquet)
    except TinyGPT2Error as error:
        raise DataError(
            f"{spec.name}: {error.message}", f"give --task-data {spec.files[0]}, or check HF_ENDPOINT and the network"
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
    """Yield LAMBADA's passages: one {"text": ...} a line, or the passage itself."""
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        passage: Any = line.removesuffix("\r")
        if line.startswith("{"):
            try:
                passage = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f'{path}, line {number}: expected {{"text": ...}}') from error
        if " " not in str(passage).strip():
            raise DataError(f"{path}, line {number}: a passage of two words at least is expected")
        yield str(passage)


def _questions(text: str, path: Path) -> Iterator[Question]:
    """Yield CBT's questions: twenty numbered sentences, then the question, its answer and the candidates."""
    for number, block in enumerate(re.split(r"\n\s*\n", text.strip()), 1):
        lines = [re.sub(r"^\d+ ", "", line) for line in block.split("\n")]
        parts = lines[-1].split("\t")
        options = parts[-1].split("|")
        where = f"{path}, question {number}"
        yield _question(lines[:-1], parts[0], parts[1] if len(parts) > 2 else "", options, where)


def _question(sentences: list[str], question: str, answer: str, options: list[str], where: str) -> Question:
    """Put a question together: what stands before the gap, and each candidate with what stands after it."""
    if "XXXXX" not in question or answer not in options:
        raise DataError(f"{where}: no question with XXXXX, its answer and the candidates")
    before, after = question.split("XXXXX", 1)
    context = detokenize_cbt(" ".join([*sentences, before]))
    whole = [detokenize_cbt(" ".join([*sentences, before, option, after])) for option in options]
    # what precedes the gap may be glued to a candidate, an opening quote for one
    shared = next(i for i in range(len(context), -1, -1) if all(text.startswith(context[:i]) for text in whole))
    return Question(context[:shared], tuple(text[shared:] for text in whole), options.index(answer))
