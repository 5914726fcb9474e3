"""Questions of the choice tasks, made from the rows of their data sets by the rules of lm-evaluation-harness 0.4.13.

A row may have the form of the data set's own files or that of its copy on the Hub. The functions below name the task of
the harness whose prompt they write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt2.data.corpus.readers import table_rows
from tinygpt2.errors import DataError
from tinygpt2.utils.files import read_text

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A question: for each candidate the text before it and the text that is scored, and which candidate is right.

    Attributes:
        contexts: the text before each candidate: the same for all, except in `winogrande`.
        endings: what is scored after it.
        right: the index of the right candidate.
        choices: the candidates' texts, by whose lengths the normalised accuracies divide; empty if there are none.
    """

    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    right: int
    choices: tuple[str, ...] = ()

    @classmethod
    def after(cls, context: str, endings: Sequence[str], right: int, choices: Sequence[str] = ()) -> Question:
        """Return a question whose candidates follow the same text."""
        return cls((context,) * len(endings), tuple(endings), right, tuple(choices))


def _spaced(context: str, choices: Sequence[str], right: int) -> Question:
    """Return a question whose candidates follow a text and a space."""
    return Question.after(context, [f" {choice}" for choice in choices], right, choices)


def _hellaswag(row: Row) -> Question:
    """Harness: `hellaswag`."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _spaced(
        _without_wikihow(context), [_without_wikihow(ending) for ending in row["endings"]], int(row["label"])
    )


def _without_wikihow(text: str) -> str:
    """Remove the marks of WikiHow's pages as the harness does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _lettered(row: Row) -> tuple[str, list[str], int]:
    """Return the question, the choices and the right one of a row of ARC or OpenBookQA."""
    if isinstance(row.get("question"), dict):  # the data set's own file
        stem, options = row["question"]["stem"], row["question"]["choices"]
        texts, labels = ([option[key] for option in options] for key in ("text", "label"))
    else:
        stem = row["question_stem"] if "question_stem" in row else row["question"]
        texts, labels = row["choices"]["text"], row["choices"]["label"]
    return stem, list(texts), list(labels).index(row["answerKey"].strip())


def _arc(row: Row) -> Question:
    """Harness: `arc_easy` and `arc_challenge`."""
    stem, choices, right = _lettered(row)
    return _spaced(f"Question: {stem}\nAnswer:", choices, right)


def _openbookqa(row: Row) -> Question:
    """Harness: `openbookqa`."""
    return _spaced(*_lettered(row))


def _piqa(row: Row) -> Question:
    """Harness: `piqa`."""
    return _spaced(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), int(row["label"]))


def _winogrande(row: Row) -> Question:
    """Harness: `winogrande`: the text before the gap with each option, and the same text after it is scored."""
    before, after = row["sentence"].split("_", 1)
    contexts = (before + row["option1"], before + row["option2"])
    return Question(contexts, (f" {after.strip()}",) * 2, {"1": 0, "2": 1}[str(row["answer"])])


def _boolq(row: Row) -> Question:
    """Harness: `boolq`, whose passages begin with their title; in BoolQ's own files it stands apart."""
    passage = f"{row['title']} -- {row['passage']}" if row.get("title") else row["passage"]
    right = row["answer"] if "answer" in row else row["label"]
    return _spaced(f"{passage}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), int(right))


def _blimp(row: Row) -> Question:
    """Harness: `blimp`: two sentences, each after the token that begins a text."""
    return _spaced("", (row["sentence_good"], row["sentence_bad"]), 0)


def _own(row: Row) -> Question:
    """Harness: a task of one's own whose `target_delimiter` is empty."""
    return Question.after(row["context"], row["choices"], int(row["answer"]), row["choices"])


FORMS: dict[str, tuple[Callable[[Row], Question], tuple[str, ...]]] = {
    "hellaswag": (_hellaswag, ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "arc": (_arc, ("question", "choices", "answerKey")),
    "openbookqa": (_openbookqa, ("question_stem", "choices", "answerKey")),
    "piqa": (_piqa, ("goal", "sol1", "sol2", "label")),
    "winogrande": (_winogrande, ("sentence", "option1", "option2", "answer")),
    "boolq": (_boolq, ("passage", "question", "label")),
    "blimp": (_blimp, ("sentence_good", "sentence_bad")),
    "own": (_own, ("context", "choices", "answer")),
}
"""What makes a question of a row, and the columns that it needs, by the form of the rows."""


def question_of(form: str, row: Any, where: str) -> Question:
    """Make a question from a row.

    Args:
        where: the row's file and number, for the error message.

    Raises:
        DataError: a column is missing or has another form, or the right answer is none of the choices.
    """
    make, columns = FORMS[form]
    try:
        question = make(row)
        texts = [*question.contexts, *question.endings]
        fits = len(question.endings) > 1 and 0 <= question.right < len(question.endings)
        if fits and all(isinstance(text, str) for text in texts) and all(question.endings):
            "".join(texts).encode()  # half of a surrogate pair is no text
            return question
        problem = f"the answer {question.right} of {len(question.endings)} choices"
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        missing = [column for column in columns if not isinstance(row, dict) or column not in row]
        problem = f"no {', '.join(missing)}" if missing else f"{type(error).__name__}: {error}"
    raise DataError(f"{where}: expected the columns {', '.join(columns)} of a question with its answer ({problem})")


def read_questions(form: str, paths: Iterable[Path]) -> list[Question]:
    """Read the questions of files of JSON lines or Parquet.

    PIQA's own files have their answers beside them: those of dev.jsonl in dev-labels.lst.

    Raises:
        DataError: a row is no question of this form, or the answers of PIQA are missing.
    """
    questions = []
    for path in paths:
        beside = path.with_name(f"{path.name.split('.')[0]}-labels.lst")
        labels = read_text(beside).split() if form == "piqa" and beside.is_file() else None
        for number, (where, row) in enumerate(table_rows(path)):
            if labels is not None and isinstance(row, dict) and number < len(labels):
                row = {"label": labels[number], **row}
            questions.append(question_of(form, row, where))
    if not questions:
        raise DataError(f"{', '.join(map(str, paths))}: no question")
    return questions
