"""Made-up files of every choice task in the forms in which the data sets are published, and what the harness asks."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import WORDS, sentences
from tinygpt2.evaluation.choices.paradigms import PARADIGMS

LETTERS = "ABCDE"


@dataclass(frozen=True)
class Asked:
    """What a model is asked: each candidate's context and ending, the texts that norms divide by, the right one."""

    candidates: list[tuple[str, str]]
    choices: list[str] | None
    right: int


def phrase(pick: random.Random, least: int = 1, most: int = 5) -> str:
    return " ".join(pick.choices(WORDS, k=pick.randint(least, most)))


def _asked(context: str, choices: list[str], right: int) -> Asked:
    return Asked([(context, f" {choice}") for choice in choices], choices, right)


def _hellaswag(pick: random.Random) -> tuple[dict, dict, Asked]:
    endings = [f"{phrase(pick)}." for _ in range(4)]
    first, second, right = phrase(pick, 3, 9), phrase(pick, 1, 2), pick.randrange(4)
    row = {"ind": 1, "activity_label": "Sitting", "ctx_a": f"[header] how to sit [title] {first}.", "ctx_b": second,
           "ctx": "", "endings": [f" [step] {endings[0]}  ", *endings[1:]], "source_id": "x", "split": "val",
           "split_type": "indomain"}  # fmt: skip
    context = f"Sitting:  how to sit. {first}. {second.capitalize()}".replace("  ", " ")
    endings[0] = f" {endings[0]}"  # what the harness leaves of the mark
    return {**row, "label": right}, {**row, "label": str(right)}, _asked(context, endings, right)


def _lettered(pick: random.Random, most: int) -> tuple[str, list[str], list[str], int]:
    count = pick.randint(3, most)
    labels = [str(i + 1) for i in range(count)] if pick.random() < 0.3 else list(LETTERS[:count])
    return f"{phrase(pick, 3, 8)}?", [phrase(pick) for _ in range(count)], labels, pick.randrange(count)


def _arc(pick: random.Random) -> tuple[dict, dict, Asked]:
    stem, texts, labels, right = _lettered(pick, 5)
    options = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    own = {"id": "a", "question": {"stem": stem, "choices": options}, "answerKey": labels[right]}
    hub = {"id": "a", "question": stem, "choices": {"text": texts, "label": labels}, "answerKey": labels[right]}
    return own, hub, _asked(f"Question: {stem}\nAnswer:", texts, right)


def _openbookqa(pick: random.Random) -> tuple[dict, dict, Asked]:
    stem, texts, labels, right = _lettered(pick, 4)
    options = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    own = {"id": "a", "question": {"stem": stem, "choices": options}, "answerKey": labels[right]}
    hub = {"id": "a", "question_stem": stem, "choices": {"text": texts, "label": labels}, "answerKey": labels[right]}
    return own, hub, _asked(stem, texts, right)


def _piqa(pick: random.Random) -> tuple[dict, dict, Asked]:
    row, right = {"goal": phrase(pick, 2, 6), "sol1": phrase(pick), "sol2": phrase(pick)}, pick.randrange(2)
    asked = _asked(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], right)
    return {**row, "label": right}, {**row, "label": right}, asked


def _winogrande(pick: random.Random) -> tuple[dict, dict, Asked]:
    before, after, right = f"{phrase(pick)} ", f" {phrase(pick)}.", pick.randrange(2)
    options = [phrase(pick, 1, 2) for _ in range(2)]
    row = {"qID": "q", "sentence": f"{before}_{after}", "option1": options[0], "option2": options[1],
           "answer": str(right + 1)}  # fmt: skip
    asked = Asked([(before + option, f" {after.strip()}") for option in options], None, right)
    return row, {key: value for key, value in row.items() if key != "qID"}, asked


def _boolq(pick: random.Random) -> tuple[dict, dict, Asked]:
    title, passage, question = phrase(pick, 1, 2), sentences(2, pick.randrange(99)), phrase(pick, 2, 5)
    right = pick.randrange(2)
    own = {"question": question, "title": title, "passage": passage, "answer": bool(right)}
    hub = {"question": question, "passage": f"{title} -- {passage}", "idx": 0, "label": right}
    context = f"{title} -- {passage}\nQuestion: {question}?\nAnswer:"
    return own, hub, _asked(context, ["no", "yes"], right)


def _blimp(pick: random.Random) -> tuple[dict, dict, Asked]:
    start = phrase(pick, 1, 3).capitalize()
    good, bad = f"{start} {phrase(pick)}.", f"{start} {phrase(pick)}."
    row = {"sentence_good": good, "sentence_bad": bad, "UID": "x", "pair_id": 0}
    return row, row, Asked([("", f" {good}"), ("", f" {bad}")], [good, bad], 0)


def _own(pick: random.Random) -> tuple[dict, dict, Asked]:
    count = pick.randint(2, 4)
    context, choices = f"{phrase(pick, 2, 7)}{pick.choice(['', ' '])}", [f" {phrase(pick)}" for _ in range(count)]
    right = pick.randrange(count)
    row = {"context": context, "choices": choices, "answer": right}
    return row, row, Asked([(context, choice) for choice in choices], choices, right)


FORMS = {
    "hellaswag": (_hellaswag, "hellaswag_val.jsonl", "hellaswag/data/validation-00000-of-00001.parquet"),
    "arc-easy": (_arc, "ARC-Easy/ARC-Easy-Test.jsonl", "ai2_arc/ARC-Easy/test-00000-of-00001.parquet"),
    "arc-challenge": (_arc, "ARC-Challenge-Test.jsonl", "ai2_arc/ARC-Challenge/test-00000-of-00001.parquet"),
    "piqa": (_piqa, "piqa/dev.jsonl", "piqa/data/validation-00000-of-00001.parquet"),
    "winogrande": (_winogrande, "winogrande_1.1/dev.jsonl", "winogrande_xl/validation-00000-of-00001.parquet"),
    "openbookqa": (_openbookqa, "OpenBookQA/Data/Main/test.jsonl", "main/test-00000-of-00001.parquet"),
    "boolq": (_boolq, "BoolQ/dev.jsonl", "super_glue/boolq/validation-00000-of-00001.parquet"),
    "blimp": (_blimp, "{}.jsonl", "{}/train-00000-of-00001.parquet"),
}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def write(root: Path, task: str, form: str, count: int, seed: int = 0) -> list[Asked]:
    """Write a task's files below a folder, in its `own` form or that of the `hub`; return what is asked."""
    make, own_name, hub_name = FORMS[task]
    everything: list[Asked] = []
    for number, part in enumerate(PARADIGMS if task == "blimp" else [""]):
        pick = random.Random(f"{task} {seed} {number}")
        made = [make(pick) for _ in range(count)]
        path = root / (own_name if form == "own" else hub_name).format(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "hub":
            pq.write_table(pa.Table.from_pylist([hub for _, hub, _ in made]), path)
        else:
            rows = [own for own, _, _ in made]
            if task == "piqa":  # its answers have a file of their own
                path.with_name("dev-labels.lst").write_text("".join(f"{row.pop('label')}\n" for row in rows))
            path.write_text(lines(rows), encoding="utf-8")
        everything += [asked for _, _, asked in made]
    return everything


def write_own(path: Path, count: int, seed: int = 0) -> list[Asked]:
    """Write a file of one's own questions; return what is asked."""
    made = [_own(random.Random(f"own {seed} {number}")) for number in range(count)]
    path.write_text(lines([row for row, _, _ in made]), encoding="utf-8")
    return [asked for _, _, asked in made]
