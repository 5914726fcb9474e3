"""Pairs of prompt and response become blocks that hold several, and train as each pair alone would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import make_model, sentences
from tests.objectives.test_objectives import RUN
from tinygpt2 import (
    ConfigError,
    DataError,
    DistillConfig,
    FinetuneConfig,
    PplConfig,
    PregenerateConfig,
    TeachConfig,
    VerifyConfig,
    distill,
    finetune,
    ppl,
    pregenerate,
    teach,
    verify,
)
from tinygpt2.data.batches.packing import best_fit
from tinygpt2.data.dataset import Blocks, PackedDataset, load_packed_dataset
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.models.loading import load_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.training.step import Step, evaluate

LENGTH = 48
Pair = dict[str, str]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return [
        {"q": sentences(1, seed)[: 8 + 3 * (seed % 9)], "a": sentences(1, 100 + seed)[: 4 + 5 * (seed % 7)]}
        for seed in range(60)
    ]


@pytest.fixture(scope="module")
def source(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return file


def made(source: Path, tokenizer_dir: Path, out: Path, **options: object) -> PackedDataset:
    base = {"prompt_column": "q", "response_column": "a", "sequence_length": LENGTH, "test_fraction": 0.2}
    pregenerate(PregenerateConfig(source=str(source), tokenizer=str(tokenizer_dir), out=str(out), **(base | options)))
    return load_packed_dataset(str(out))


@pytest.fixture(scope="module")
def packed(source: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return made(source, tokenizer_dir, tmp_path_factory.mktemp("packed") / "d")


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "m", tokenizer_dir, n_layer=2, n_embd=16, n_head=2, n_positions=64)


def alone(blocks: Blocks) -> list[tuple[list[int], list[int]]]:
    """Every document of every block: its tokens, and the places of the targets that count."""
    found = []
    for index in range(len(blocks)):
        batch, place = blocks.batch([index]), 0
        real = (batch.lengths or [LENGTH])[0]
        for length in batch.documents[0]:
            part = slice(place, min(place + length, real))
            found.append((batch.input_ids[0, part].tolist(), np.flatnonzero(batch.counted[0, part]).tolist()))
            place += length
    return found


def test_blocks_hold_whole_pairs_and_count_responses_with_their_ends(
    pairs: list[Pair], packed: PackedDataset, tokenizer_dir: Path
) -> None:
    tokenizer, expected = load_tokenizer(str(tokenizer_dir)), []
    for pair in pairs:
        before, answer = (tokenizer.encode(text, add_special_tokens=False) for text in (pair["q"] + "\n", pair["a"]))
        ids = [*before, *answer, tokenizer.eos_token_id]
        expected.append((ids, list(range(len(before), len(ids)))))
    found = alone(packed.train) + alone(packed.test)
    assert sorted(found) == sorted(expected)
    assert len(alone(packed.test)) == 12
    assert len(packed.train) < len(alone(packed.train)) / 2
    counts = packed.manifest["splits"]["train"]
    assert counts["targets"] == sum(packed.train.targets(range(len(packed.train))))
    assert counts["padding_tokens"] == len(packed.train) * LENGTH - counts["tokens"]
    assert verify(VerifyConfig(path=str(packed.name))).problems == []


def test_best_fit_wastes_little_and_loses_nothing() -> None:
    lengths = np.random.default_rng(1).integers(1, 65, 500).tolist()
    blocks = best_fit(lengths, 64)
    assert sorted(number for block in blocks for number in block) == list(range(500))
    assert max(sum(lengths[number] for number in block) for block in blocks) <= 64
    assert len(blocks) < 1.05 * sum(lengths) / 64


def one_by_one(step: Step, documents: list[tuple[list[int], list[int]]]) -> tuple[float, float, list[torch.Tensor]]:
    """Cross-entropy, forward KL and the gradients of their sum, one document at a time, by transformers' own models."""
    student, teacher = step.student, step._teacher[0].model
    total = sum(len(counted) for _, counted in documents)
    student.zero_grad()
    ce, kl = 0.0, 0.0
    for ids, counted in documents:
        row, places = torch.tensor([ids]), [place - 1 for place in counted]
        own = student(row).logits[0, places].log_softmax(-1)
        with torch.no_grad():
            other = teacher(row).logits[0, places].log_softmax(-1)
        losses = -own[range(len(places)), row[0, counted]].sum(), (other.exp() * (other - own)).sum()
        (sum(losses) / total).backward()
        ce, kl = ce + losses[0].item() / total, kl + losses[1].item() / total
    return ce, kl, [parameter.grad.clone() for parameter in student.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_pairs_learn_what_each_pair_alone_learns(
    packed: PackedDataset, model: Path, teacher: Path, tokenizer_dir: Path, tmp_path: Path, checkpointing: bool
) -> None:
    wide = make_model(tmp_path / "t", tokenizer_dir, n_positions=64, seed=5)
    config = RUN.model_copy(update={"gradient_checkpointing": checkpointing})
    step = Step(load_model(str(model))[0], load_model(str(wide))[0], LossWeights(prediction=1.0, ce=1.0), config)
    step.train()
    for module in step.student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    step._teacher[0].eval()
    batch = packed.train.batch(range(len(packed.train)))
    loss, terms = step(**batch._asdict())
    loss.backward()
    found = [parameter.grad.clone() for parameter in step.student.parameters()]
    ce, kl, gradients = one_by_one(step, alone(packed.train))
    assert float(terms["ce"]) == pytest.approx(ce, rel=1e-5)
    assert float(terms["prediction"]) == pytest.approx(kl, rel=1e-5)
    for ours, reference in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_evaluation_counts_the_same_targets(packed: PackedDataset, model: Path) -> None:
    from accelerate import Accelerator

    step = Step(load_model(str(model))[0].eval(), None, LossWeights(), RUN).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, counted in alone(packed.test):
            row = torch.tensor([ids])
            found = step.student(row).logits[0].double().log_softmax(-1)
            total -= sum(float(found[place - 1, ids[place]]) for place in counted)
            count += len(counted)
    assert evaluate(Accelerator(cpu=True), step, packed.test, 2).loss == pytest.approx(total / count, rel=1e-5)
    (row,) = ppl(PplConfig(model=[str(model)], task=[packed.name])).results
    assert (row.loss, row.tokens) == (pytest.approx(total / count, rel=1e-5), count)


def test_finetune_and_distill_on_pairs(
    source: Path, packed: PackedDataset, model: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 3, "micro_batch_size": 2, "learning_rate": 0.01, "log_every": 1, "dropout": 0.0}
    columns = {"prompt_column": "q", "response_column": "a", "sequence_length": LENGTH, "test_fraction": 0.2}
    tuned = finetune(FinetuneConfig(model=str(model), data=str(source), out=str(tmp_path / "m"), **options, **columns))
    assert load_packed_dataset(str(tmp_path / "m" / "data")).content == packed.content
    rows = [json.loads(line) for line in (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()]
    assert tuned.eval.loss < rows[0]["before/loss"]
    shared = {"teacher": str(model), "student": str(model), "data": packed.name}
    distill(DistillConfig(out=str(tmp_path / "d"), **shared, **options))
    rows = [json.loads(line) for line in (tmp_path / "d" / "metrics.jsonl").read_text().splitlines()]
    assert next(row["loss"] for row in rows if row["step"] == 1) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ConfigError, match="has pairs, does not fit --attention-weight"):
        distill(DistillConfig(out=str(tmp_path / "a"), recipe="tinygpt2", **shared, **options))


def test_a_teachers_cache_of_pairs_holds_what_the_teacher_says(
    packed: PackedDataset, model: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    wide = make_model(tmp_path / "t", tokenizer_dir, n_positions=64, seed=5)
    options = {
        "student": str(model), "data": packed.name, "max_steps": 4, "micro_batch_size": 2, "learning_rate": 0.01,
        "log_every": 1, "dropout": 0.0,
    }  # fmt: skip
    teach(TeachConfig(teacher=str(wide), data=packed.name, out=str(tmp_path / "taught"), teacher_cache_kind="top"))
    several = {
        "none": {"teacher": str(wide)},
        "states": {"teacher": str(wide), "teacher_cache": str(tmp_path / "cached")},
        "filled": {"teacher": str(wide), "teacher_cache": str(tmp_path / "c"), "teacher_cache_kind": "top"},
        "alone": {"teacher_cache": str(tmp_path / "taught")},
    }
    losses = {}
    for name, how in several.items():
        distill(DistillConfig(out=str(tmp_path / name), **how, **options))
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows if row["step"]]
    assert losses["states"] == pytest.approx(losses["none"], rel=0.02)  # bfloat16
    assert losses["alone"] == pytest.approx(losses["filled"], rel=1e-4)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_format_of_rows(
    pairs: list[Pair], packed: PackedDataset, tokenizer_dir: Path, tmp_path: Path, kind: str
) -> None:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / f"pairs.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(pairs), file)
    elif kind == "csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["q", "a"])
            writer.writeheader()
            writer.writerows(pairs)
    else:
        text = json.dumps(pairs) if kind == "json" else "\n".join(map(json.dumps, pairs))
        file.write_text(text, encoding="utf-8")
    assert made(file, tokenizer_dir, tmp_path / "d").content == packed.content


def chat(*texts: str, system: str = "") -> dict[str, list[dict[str, str]]]:
    messages = [{"role": "system", "content": system}] if system else []
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [*messages, *({"role": r, "content": t} for r, t in zip(roles, texts, strict=False))]}


def test_chats_are_known_by_their_messages_and_count_every_answer(tokenizer_dir: Path, tmp_path: Path) -> None:
    file, template = tmp_path / "chats.jsonl", tmp_path / "template.txt"
    rows = [chat("a cat?", "the mat.", "and the dog?", "ran.", "why?", system="be sad"), chat("the", "log")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    template.write_text("Q: {prompt} A:{response}!\n", encoding="utf-8")
    options = {"prompt_column": None, "response_column": None, "test_fraction": 0, "template": str(template)}
    packed, tokenizer = made(file, tokenizer_dir, tmp_path / "d", **options), load_tokenizer(str(tokenizer_dir))
    found = {
        tokenizer.decode(ids): tokenizer.decode([ids[place] for place in counted])
        for ids, counted in alone(packed.train)
    }
    end = tokenizer.eos_token
    assert found == {
        f"Q: be sad\na cat? A:the mat.!{end}Q: and the dog? A:ran.!{end}": f"the mat.!{end}ran.!{end}",
        f"Q: the A:log!{end}": f"log!{end}",
    }
    batch = packed.train.batch([0])
    answers = [tokenizer.decode(batch.input_ids[0, first:stop]) for _, first, stop in batch.answers(0)]
    assert sorted(answers) == sorted([f"the mat.!{end}", f"ran.!{end}", f"log!{end}"])


def test_long_pairs_lose_the_beginning_of_their_prompts(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "long.jsonl"
    rows = [
        {"q": sentences(20, 1), "a": "the cat"},
        {"q": "x", "a": sentences(30, 2)},
        {"q": "a", "a": "dog"},
        {"q": "b", "a": ""},
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    packed, tokenizer = made(file, tokenizer_dir, tmp_path / "d", test_fraction=0), load_tokenizer(str(tokenizer_dir))
    found = sorted(alone(packed.train), key=lambda one: len(one[0]))
    assert [len(ids) for ids, _ in found][1:] == [LENGTH]
    assert tokenizer.decode(found[1][0]).endswith(f"{sentences(20, 1)[-30:]}\nthe cat{tokenizer.eos_token}")
    assert (packed.manifest["pairs_cut"], packed.manifest["pairs_left_out"]) == (1, 1)
    assert packed.manifest["empty_documents"] == 1


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"q": "x", "b": "y"}, {}, r"no 'q' and 'a' \(found: q, b\)"),
        ({"q": "x", "a": 7}, {}, "neither a text nor a list of messages"),
        ({"q": "x", "a": "y" * 1000}, {}, "no pairs in"),
        ({"q": "x", "a": "y"}, {"stride": 8}, "--stride does not fit pairs"),
        ({"q": "x", "a": "y"}, {"format": "jsonl"}, "--format jsonl does not fit pairs"),
        ({"text": "x"}, {"prompt_column": None, "response_column": None, "template": "T"}, "--template has no effect"),
        ({"q": "x", "a": "y"}, {"template": "T"}, r"does not have \{prompt\} and then \{response\}"),
        ({"messages": [{"role": "user"}]}, {"prompt_column": None, "response_column": None}, "neither a text nor"),
    ],
)
def test_wrong_pairs_are_named(tokenizer_dir: Path, tmp_path: Path, row: dict, options: dict, message: str) -> None:
    file, template = tmp_path / "rows.jsonl", tmp_path / "T"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    template.write_text("{response} {prompt}", encoding="utf-8")
    if "template" in options:
        options = options | {"template": str(template)}
    with pytest.raises((ConfigError, DataError), match=message):
        made(file, tokenizer_dir, tmp_path / "d", test_fraction=0, **options)


def test_plain_text_among_pairs_is_named(source: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cloned"
    folder.mkdir()
    (folder / "data.jsonl").write_bytes(source.read_bytes())
    (folder / "README.md").write_text("# A dataset\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"README.md is plain text, and pairs are read from rows of 'q' and 'a'"):
        made(folder, tokenizer_dir, tmp_path / "d")
    (tmp_path / "strings.json").write_text('["the cat"]', encoding="utf-8")
    with pytest.raises(DataError, match=r"no 'q' and 'a' \(found: str\)"):
        made(tmp_path / "strings.json", tokenizer_dir, tmp_path / "e")


def test_few_pairs_hold_one_out(pairs: list[Pair], tokenizer_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs[:9])), encoding="utf-8")
    packed = made(file, tokenizer_dir, tmp_path / "d", test_fraction=0.05)
    assert (len(alone(packed.train)), len(alone(packed.test))) == (8, 1)


def test_one_column_alone_is_refused(cli: Callable, source: Path, tmp_path: Path) -> None:
    outcome = cli("finetune", "--model", "m", "--data", source, "--out", tmp_path / "o", "--prompt-column", "q")
    assert outcome.code == 2
    assert "--response-column is missing" in outcome.err
    columns = ["--prompt-column", "q", "--response-column", "a", "--template", tmp_path / "none.txt"]
    outcome = cli("finetune", "--model", "m", "--data", source, "--out", tmp_path / "o", *columns)
    assert "none.txt" in outcome.err
