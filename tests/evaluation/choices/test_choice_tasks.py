"""Every choice task in every published form against a float64 loop over transformers' logits, one candidate at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.conftest import make_model
from tests.evaluation.choices.files import FORMS, Asked, lines, write, write_own
from tinygpt2 import PplConfig, ppl
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.evaluation.choices import branches
from tinygpt2.evaluation.choices.paradigms import PARADIGMS
from tinygpt2.evaluation.conventions import ModelTokenizer, tokenize_task
from tinygpt2.evaluation.named_tasks import SPECS
from tinygpt2.evaluation.scoring import Scorer
from tinygpt2.evaluation.tasks import Task, load_tasks
from tinygpt2.models.loading import load_model

POSITIONS = 96


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for most contexts, though not for the longest."""
    return make_model(tmp_path_factory.mktemp("choices") / "m", tokenizer_dir, n_positions=POSITIONS)


@cache
def exact(directory: Path) -> tuple[GPT2LMHeadModel, Any]:
    """The model in float64, and its tokenizer."""
    return GPT2LMHeadModel.from_pretrained(str(directory)).double().eval(), load_tokenizer(str(directory))


def naive_sum(directory: Path, context: str, ending: str) -> float:
    """Log-probability of an ending after a context, by the harness' rules."""
    model, tokenizer = exact(directory)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if context == "":
        known, scored = [tokenizer.eos_token_id], encode(ending)
    else:
        spaces = len(context) - len(context.rstrip())
        known = encode(context.rstrip())
        scored = encode(context.rstrip() + context[len(context) - spaces :] + ending)[len(known) :]
    tokens = (known + scored)[-(POSITIONS + 1) :]
    with torch.no_grad():
        logs = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    return sum(float(logs[at - 1, tokens[at]]) for at in range(len(tokens) - len(scored), len(tokens)))


def sums_of(directory: Path, task: Task, budget: int = 2048) -> np.ndarray:
    """The sum of every candidate, in one row after the other."""
    loaded, folder = load_model(str(directory))
    reader = ModelTokenizer("m", loaded.config, load_tokenizer(str(folder)))
    tokenized = tokenize_task(task, reader, "hf", None)
    scorer = Scorer(loaded, "fp32", torch.device("cpu"))
    return -scorer(tokenized.tokens, tokenized.spans, budget, candidates=tokenized.candidates).sums


def check(directory: Path, name: str, data: Path | None, asked: list[Asked]) -> None:
    """Compare sums and accuracies with the loop."""
    (task,) = load_tasks([name], data and str(data))
    assert [question.right for question in task.questions] == [one.right for one in asked]
    assert [list(zip(q.contexts, q.endings, strict=True)) for q in task.questions] == [one.candidates for one in asked]
    wanted = [[naive_sum(directory, *candidate) for candidate in one.candidates] for one in asked]
    np.testing.assert_allclose(sums_of(directory, task), np.concatenate(wanted), rtol=1e-6)
    (row,) = ppl(PplConfig(model=[str(directory)], task=[name], task_data=data and str(data))).results
    hits = [int(np.argmax(sums)) == one.right for sums, one in zip(wanted, asked, strict=True)]
    assert row.accuracy == pytest.approx(sum(hits) / len(hits))
    assert row.accuracy_stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(hits)))
    for share, size in ((row.accuracy_norm, len), (row.accuracy_bytes, lambda text: len(text.encode()))):
        if asked[0].choices is None:
            assert share is None
            continue
        best = [
            int(np.argmax([a / size(choice) for a, choice in zip(sums, one.choices, strict=True)])) == one.right
            for sums, one in zip(wanted, asked, strict=True)
        ]
        assert share == pytest.approx(sum(best) / len(best))
    right = sum(sums[one.right] for sums, one in zip(wanted, asked, strict=True))
    assert row.loss * row.tokens == pytest.approx(-right, rel=1e-6)


@pytest.mark.parametrize("form", ["own", "hub"])
@pytest.mark.parametrize("name", FORMS)
def test_sums_and_accuracies_equal_the_loop(model: Path, tmp_path: Path, name: str, form: str) -> None:
    asked = write(tmp_path, name, form, 1 if name == "blimp" else 12)
    check(model, name, tmp_path, asked)


def test_questions_of_one_s_own(model: Path, tmp_path: Path) -> None:
    asked = write_own(tmp_path / "story.jsonl", 20)
    check(model, f"choice:{tmp_path / 'story.jsonl'}", None, asked)
    (row,) = ppl(PplConfig(model=[str(model)], task=[f"choice:{tmp_path / 'story.jsonl'}"])).results
    assert (row.task, row.source) == (f"choice:{tmp_path / 'story.jsonl'}", str(tmp_path / "story.jsonl"))


def test_batches_change_nothing_and_contexts_are_computed_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "hellaswag", "own", 10)
    (task,) = load_tasks(["hellaswag"], str(tmp_path))
    seen: list[int] = []
    forward = branches.collect_activations
    monkeypatch.setattr(
        branches,
        "collect_activations",
        lambda model, ids, **more: (seen.append(ids.numel()), forward(model, ids, **more))[1],
    )
    one, many = sums_of(model, task, 1), sums_of(model, task, 4096)
    np.testing.assert_allclose(one, many, rtol=1e-6)
    tokenizer = load_tokenizer(str(model))
    alone = sum(
        len(tokenizer(context + ending)["input_ids"]) - 1
        for question in task.questions
        for context, ending in zip(question.contexts, question.endings, strict=True)
    )
    assert sum(seen[:10]) < 0.5 * alone


def test_a_limit_takes_the_first_questions_and_passages(model: Path, tmp_path: Path) -> None:
    write(tmp_path, "piqa", "own", 9)
    write(tmp_path, "blimp", "own", 3)
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "the cat sat"}\n' * 5, encoding="utf-8")
    piqa, blimp, lambada = load_tasks(["piqa", "blimp", "lambada"], str(tmp_path), limit=2)
    assert (len(piqa.questions), len(blimp.questions), len(lambada.passages)) == (2, 2 * len(PARADIGMS), 2)
    assert piqa.questions == load_tasks(["piqa"], str(tmp_path))[0].questions[:2]
    with pytest.raises(ConfigError, match="--text-column x has no effect"):
        ppl(PplConfig(model=[str(model)], task=["piqa"], task_data=str(tmp_path), text_column="x"))
    (tmp_path / "own.jsonl").write_text('{"context": "a", "choices": ["b", "\\ud83d"], "answer": 0}', encoding="utf-8")
    with pytest.raises(DataError, match=r"own.jsonl:1: expected .*UnicodeEncodeError"):
        ppl(PplConfig(model=[str(model)], task=[f"choice:{tmp_path / 'own.jsonl'}"]))
    (tmp_path / "text.txt").write_text("the cat sat", encoding="utf-8")
    with pytest.raises(ConfigError, match="--limit has no effect"):
        ppl(PplConfig(model=[str(model)], task=[str(tmp_path / "text.txt")], limit=2))


def test_conventions_give_the_same_accuracy(model: Path, tmp_path: Path) -> None:
    write(tmp_path, "arc-easy", "own", 12)
    rows = [
        ppl(PplConfig(model=[str(model)], task=["arc-easy"], task_data=str(tmp_path), convention=convention)).results[0]
        for convention in ("hf", "lm-eval", "gpt2-paper")
    ]
    assert len({(row.accuracy, row.accuracy_norm, row.accuracy_bytes, row.loss) for row in rows}) == 1
    with pytest.raises(ConfigError, match="--convention tinygpt2 does not support the task arc-easy"):
        ppl(PplConfig(model=[str(model)], task=["arc-easy"], task_data=str(tmp_path), convention="tinygpt2"))


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"context": "a", "choices": [" b", " c"]}, r"expected the columns context, choices, answer .*\(no answer\)"),
        ({"context": "a", "choices": [" b", " c"], "answer": 2}, "the answer 2 of 2 choices"),
        ({"context": "a", "choices": [" b", " c"], "answer": -1}, "the answer -1 of 2 choices"),
        ({"context": "a", "choices": [" b"], "answer": 0}, "the answer 0 of 1 choices"),
        ({"context": "a", "choices": [" b", 3], "answer": 0}, "expected the columns"),
        ({"context": 1, "choices": [" b", " c"], "answer": 0}, "expected the columns"),
        ({"context": "a", "choices": [" b", ""], "answer": 0}, "expected the columns"),
        ([1], "no context, choices, answer"),
        ({"context": "a", "choices": [" b", " c" * 200], "answer": 0}, r"tokens after its context, but .* 1 to 96"),
    ],
)
def test_faulty_rows_are_named(model: Path, tmp_path: Path, row: object, part: str) -> None:
    good = {"context": "a", "choices": [" b", " c"], "answer": 1}
    (tmp_path / "q.jsonl").write_text(lines([good]) + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=part) as caught:
        ppl(PplConfig(model=[str(model)], task=[f"choice:{tmp_path / 'q.jsonl'}"]))
    assert "q.jsonl" in str(caught.value)


def test_faulty_files(model: Path, tmp_path: Path, cli: Callable) -> None:
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text("{\n", encoding="utf-8")
    for name, part in (("empty", "no question"), ("bad", "bad.jsonl:1: not valid JSON"), ("none", "no such file")):
        outcome = cli("ppl", "--model", model, "--task", f"choice:{tmp_path / name}.jsonl")
        assert outcome.code == 3
        assert part in outcome.err
    write(tmp_path, "piqa", "own", 4)
    (tmp_path / "piqa" / "dev-labels.lst").write_text("0\n1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"dev.jsonl:3: expected the columns goal, sol1, sol2, label .*\(no label\)"):
        load_tasks(["piqa"], str(tmp_path))
    with pytest.raises(DataError, match=r"blimp: .* has no file named adjunct_island.jsonl"):
        load_tasks(["blimp"], str(tmp_path))


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `datasets` returns is what the Parquet files hold."""
    import pyarrow.parquet as pq

    def rows(name: str, configuration: str | None, split: str, *, parquet: bool) -> list[dict]:
        assert not parquet
        folder = tmp_path / name.split("/")[1] / (configuration or "data")
        (file,) = [*folder.glob(f"{split}-*.parquet"), *(tmp_path / str(configuration)).glob(f"{split}-*.parquet")]
        return pq.read_table(file).to_pylist()

    for name in FORMS:
        write(tmp_path, name, "hub", 2)
    monkeypatch.setattr("tinygpt2.evaluation.tasks.dataset_rows", rows)
    for name in FORMS:
        (there,), (here,) = load_tasks([name], None), load_tasks([name], str(tmp_path))
        assert there.questions == here.questions
        assert there.source == str(SPECS[name].source)


def test_what_people_see(model: Path, tmp_path: Path, cli: Callable) -> None:
    write(tmp_path, "hellaswag", "own", 12)
    asked = ["ppl", "--model", model, "--task", "hellaswag", "--task-data", tmp_path]
    (row,) = cli(*asked, "--limit", 8, "--json").json["results"]
    assert {"accuracy", "accuracy_norm", "accuracy_stderr"} < set(row)
    assert round(row["accuracy"] * 8, 6) in range(9)
    shown = cli(*asked).out
    assert "normalised" in shown
    listed = {task["name"]: task for task in cli("ppl", "--list-tasks", "--json").json["tasks"]}
    assert set(FORMS) < set(listed)
    assert "31.14" in listed["hellaswag"]["published_gpt2"]
    assert cli("ppl", "--model", model, "--task", "helaswag").err.count("did you mean 'hellaswag'") == 1
