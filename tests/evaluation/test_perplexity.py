"""Perplexity against a loop that is too simple to be wrong."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from tests.conftest import make_model, sentences
from tests.utils.test_charts import Page
from tinygpt2 import PplConfig, PregenerateConfig, ppl, pregenerate
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.encoding import encode
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import ConfigError, DataError, ModelError
from tinygpt2.evaluation.conventions import ModelTokenizer, _continued
from tinygpt2.evaluation.results import short_names
from tinygpt2.evaluation.scoring import Scorer, Scores, Window, batches, windows
from tinygpt2.models.loading import load_model


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(2, 12), st.integers(1, 12))
def test_every_token_with_context_is_a_target_once(count: int, size: int, stride: int) -> None:
    stride = min(stride, size)
    targets = []
    for window in windows(count, size, stride):
        assert 0 <= window.start < window.stop <= count
        assert window.stop - window.start <= size
        assert window.first >= 1
        targets += range(window.start + window.first, window.stop)
    left_out = set(range(0, count, size)) if stride == size else {0} & set(range(count))
    assert targets == [token for token in range(count) if token not in left_out]


def naive_losses(model: torch.nn.Module, tokens: list[int], size: int, stride: int) -> list[float]:
    """One token at a time, float64, no batching, no chunks."""
    model = model.double()
    losses, scored = [], 0
    for start in range(0, len(tokens), stride):
        stop = min(start + size, len(tokens))
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:stop]])).logits[0]
        for position in range(max(scored, start + 1), stop):
            losses.append(-float(logits[position - 1 - start].log_softmax(-1)[tokens[position]]))
        scored = stop
        if stop == len(tokens):
            break
    model.float()
    return losses


@pytest.mark.parametrize("stride", [None, 8, 31])
def test_a_text_equals_the_naive_loop(teacher: Path, tmp_path: Path, stride: int | None) -> None:
    file = tmp_path / "text.txt"
    file.write_text(sentences(40, seed=99) + " <|endoftext|> the end. 却说孔明", encoding="utf-8")
    row = ppl(PplConfig(model=[str(teacher)], task=[str(file)], stride=stride, batch_size=3)).results[0]
    model, _ = load_model(str(teacher))
    text = file.read_text(encoding="utf-8")
    tokens = encode(load_tokenizer(str(teacher)), [text])[0]
    losses = naive_losses(model, tokens, 32, stride or 32)
    total = sum(losses)
    assert row.tokens == len(losses)
    assert row.loss == pytest.approx(total / len(losses), rel=1e-6)
    assert row.perplexity == pytest.approx(math.exp(total / len(losses)), rel=1e-5)
    assert row.bits_per_byte == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-6)
    assert row.bits_per_character == pytest.approx(total / math.log(2) / len(text), rel=1e-6)
    assert row.word_perplexity == pytest.approx(math.exp(total / len(text.split())), rel=1e-4)
    sizes = len(text.split()), len(text), len(text.encode())
    assert ((row.words, row.characters, row.bytes), row.stride) == (sizes, stride or 32)
    assert row.characters < row.bytes


def test_a_dataset_is_scored_block_by_block(teacher: Path, data: Path) -> None:
    row = ppl(PplConfig(model=[str(teacher)], task=[str(data)])).results[0]
    model, _ = load_model(str(teacher))
    blocks = load_packed_dataset(str(data)).test
    losses = [x for i in range(len(blocks)) for x in naive_losses(model, blocks.row(i).tolist(), 32, 32)]
    assert row.tokens == len(losses) == len(blocks) * 31
    assert row.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_overlapping_blocks_are_scored_as_the_text_they_came_from(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    rows = []
    for name, stride in (("plain", 32), ("sliding", 8)):
        config = PregenerateConfig(
            source=str(corpus), tokenizer=str(teacher), out=str(tmp_path / name), sequence_length=32, stride=stride
        )
        pregenerate(config)
        rows.append(ppl(PplConfig(model=[str(teacher)], task=[str(tmp_path / name)])).results[0])
    plain, sliding = rows
    assert 0 <= sliding.tokens - plain.tokens < 32
    assert sliding.loss == pytest.approx(plain.loss, rel=0.02)


def test_standard_error_and_pairs(teacher: Path, tokenizer_dir: Path, data: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", tokenizer_dir, seed=5)
    result = ppl(PplConfig(model=[str(teacher), str(other)], task=[str(data)]))
    a, b = result.results
    (pair,) = result.paired
    assert (pair.a, pair.b) == (str(teacher), str(other))
    assert pair.difference == pytest.approx(a.loss - b.loss, rel=1e-6)
    assert 0 < pair.stderr < a.stderr + b.stderr
    generator = np.random.default_rng(0)
    sums = generator.normal(30, 3, 400)
    assert Scores(sums, np.full(400, 10)).stderr == pytest.approx(sums.std(ddof=1) / 10 / math.sqrt(400), rel=1e-9)
    assert Scores(sums[:1], np.array([10])).stderr is None


def test_windows_of_other_sizes_do_not_pair(teacher: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(sentences(40, seed=1), encoding="utf-8")
    short = make_model(tmp_path / "short", tokenizer_dir, n_positions=16)
    (pair,) = ppl(PplConfig(model=[str(teacher), str(short)], task=[str(file)])).paired
    assert pair.difference is None
    assert pair.bits_per_byte is not None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batch_size_changes_nothing(teacher: Path, precision: str) -> None:
    model, _ = load_model(str(teacher))
    tokens = np.random.default_rng(0).integers(0, 320, 500)
    spans = [*windows(500, 32, 20), Window(3, 9, 2), Window(100, 107, 1)]
    scorer = Scorer(model, precision, torch.device("cpu"))
    one, many = (scorer(tokens, spans, budget) for budget in (1, 2000))
    np.testing.assert_allclose(one.sums, many.sums, rtol=1e-5 if precision == "fp32" else 2e-2)
    assert one.counts.tolist() == many.counts.tolist() == [span.targets for span in spans]


def test_no_batch_is_beyond_its_budget_and_none_is_lost() -> None:
    generator = np.random.default_rng(1)
    spans = [Window(0, int(stop)) for stop in generator.integers(2, 90, 200)]
    made = list(batches(list(map(len, spans)), 300))
    assert sorted(index for batch in made for index in batch) == list(range(200))
    for batch in made:
        assert len(batch) * max(spans[index].stop for index in batch) <= 300


def test_short_precision_is_near(teacher: Path, data: Path) -> None:
    exact, short = (
        ppl(PplConfig(model=[str(teacher)], task=[str(data)], precision=precision)).results[0]
        for precision in ("fp32", "bf16")
    )
    assert short.loss == pytest.approx(exact.loss, rel=5e-3)
    assert short.loss != exact.loss


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(sentences(60, seed=3), encoding="utf-8")
    (tmp_path / "lambada_test.txt").write_text("\n".join(sentences(1, seed) for seed in range(30)), encoding="utf-8")
    one, two = (
        ppl(
            PplConfig(
                model=[str(teacher)], task=[str(tmp_path / "text.txt"), "lambada"], task_data=str(tmp_path),
                num_processes=processes, stride=20,
            )
        ).results
        for processes in (1, 2)
    )  # fmt: skip
    for alone, shared in zip(one, two, strict=True):
        assert shared.loss == pytest.approx(alone.loss, rel=1e-6)
        assert (shared.tokens, shared.accuracy, shared.task) == (alone.tokens, alone.accuracy, alone.task)


def test_pictures_and_tables(teacher: Path, tokenizer_dir: Path, data: Path, tmp_path: Path, cli: Callable) -> None:
    other = make_model(tmp_path / "other", tokenizer_dir, seed=5, n_layer=1)
    asked = ["ppl", "--model", teacher, "--model", other, "--task", data]
    outcome = cli(*asked, "--plot", tmp_path / "out.png", "--csv")
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader(outcome.out.splitlines()))
    assert [row["model"] for row in rows] == [str(teacher), str(other)]
    assert float(rows[0]["perplexity"]) == ppl(PplConfig(model=[str(teacher)], task=[str(data)])).results[0].perplexity
    assert int(rows[1]["parameters"]) < int(rows[0]["parameters"])
    measured = ppl(PplConfig(model=[str(teacher), str(other)], task=[str(data)]))
    lines = cli(*asked, "--markdown").out.splitlines()
    assert {line.count("|") for line in lines[:4]} == {lines[0].count("|")}
    assert f"from {data}" in "\n".join(lines[4:])
    assert cli(*asked, "--markdown", "--csv").code == 2
    assert cli(*asked, "--csv", "--json").code == 2
    text = (tmp_path / "out.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {f"{row.perplexity:,.2f} per token" for row in measured.results} <= set(page.said("td"))
    (pair,) = measured.paired
    assert {f"{pair.difference:+.4f} ± {pair.stderr:.4f}", f"{-pair.difference:+.4f} ± {pair.stderr:.4f}"} <= set(
        page.said("td")
    )
    assert str(tmp_path) not in text
    assert cli(*asked, "--plot", tmp_path / "only.html").code == 0
    assert sorted(file.name for file in tmp_path.glob("only*")) == ["only.html"]
    assert cli(*asked, "--plot", tmp_path / "nowhere" / "out.png").code == 2
    assert cli(*asked, "--plot", tmp_path).code == 2
    assert "convention hf" in cli(*asked).out
    listed = cli("ppl", "--list-tasks", "--json").json["tasks"]
    assert {"wikitext", "cbt-ne", "openwebtext"} < {task["name"] for task in listed}
    assert "37.37" in cli("ppl", "--list-tasks").out


def test_the_same_model_twice_is_measured_once(teacher: Path, data: Path) -> None:
    result = ppl(PplConfig(model=[str(teacher)] * 2, task=[str(data)] * 2))
    assert len(result.results) == 1
    assert not result.paired


def test_bad_tasks(teacher: Path, tokenizer_dir: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    make_model(tmp_path / "bare", None)
    make_model(tmp_path / "narrow", tokenizer_dir, vocab_size=300)
    make_model(tmp_path / "short", None, n_positions=16)
    (tmp_path / "text.txt").write_text("the cat sat")
    cases = [
        (ConfigError, "did you mean 'wikitext'", {"task": "wikitxt"}),
        (ConfigError, "--task is required", {"task": []}),
        (DataError, "no such file", {"task": "nowhere.txt"}),
        (DataError, "no such file", {"task": "wikitext", "task_data": str(tmp_path / "x")}),
        (DataError, "no text", {"task": str(tmp_path / "empty.txt")}),
        (DataError, "1 tokens long", {"task": str(tmp_path / "one.txt")}),
        (DataError, "not UTF-8", {"task": str(tmp_path / "bad.txt")}),
        (DataError, "is not a pregenerated dataset", {"task": str(tmp_path)}),
        (ConfigError, "--stride 33 is larger than the window", {"task": str(tmp_path / "text.txt"), "stride": 33}),
        (ConfigError, "--task-data", {"task": str(data), "task_data": str(tmp_path)}),
        (ConfigError, "do not overlap", {"task": str(tmp_path / "text.txt"), "stride": 8, "convention": "lm-eval"}),
        (ModelError, "the model has only 300", {"task": str(tmp_path / "text.txt"), "model": str(tmp_path / "narrow")}),
        (ModelError, "no tokenizer", {"task": str(tmp_path / "text.txt"), "model": str(tmp_path / "bare")}),
        (ConfigError, "16 positions", {"task": str(data), "model": str(tmp_path / "short")}),
    ]
    for kind, part, values in cases:
        with pytest.raises(kind, match=part):
            ppl(PplConfig(**{"model": str(teacher), **values}))


@pytest.mark.parametrize("task", ["text", "dataset"])
def test_a_loss_that_is_not_finite_is_an_error(teacher: Path, data: Path, tmp_path: Path, task: str) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    asked = str(data) if task == "dataset" else str(tmp_path / "text.txt")
    for name, value, message in (
        ("transformer.wte.weight", math.nan, "transformer.wte.weight"),
        ("transformer.ln_f.bias", 3e38, "is NaN or infinite, although the weights are finite"),
    ):
        shutil.copytree(teacher, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors[name][...] = value
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=message):
            ppl(PplConfig(model=[str(tmp_path / name)], task=[asked]))


def test_a_text_is_encoded_in_parts_where_that_is_the_same(teacher: Path, tmp_path: Path) -> None:
    model, directory = load_model(str(teacher), hollow=True)
    tokenizer = load_tokenizer(str(directory))
    text = sentences(9000, seed=5) + "\n\n  <|endoftext|> 却说孔明  " + "a" * 300_000 + "  end"
    fast = ModelTokenizer("m", model.config, tokenizer)
    assert fast.encoder.reproduced
    assert fast.tokens([text, ""])[0].tolist() == encode(tokenizer, [text])[0]
    tokenizer.add_tokens(["cat sat"])  # found inside any text, so it cannot be cut
    slow = ModelTokenizer("m", model.config.__class__(vocab_size=321), tokenizer)
    assert not slow.encoder.reproduced
    assert slow.tokens([text])[0].tolist() == encode(tokenizer, [text])[0]


def test_the_token_before_a_text_is_one_that_the_model_has(teacher: Path, tokenizer_dir: Path) -> None:
    model, _ = load_model(str(teacher), hollow=True)
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert ModelTokenizer("m", model.config, tokenizer).prefix == 0
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert ModelTokenizer("m", model.config, tokenizer).prefix == 0  # <s> has no row
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="must precede a text"):
        _ = ModelTokenizer("m", model.config, tokenizer).prefix


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/r/a/teacher", "/r/b/student"], ["teacher", "student"]),
        (["/r/a/m", "/r/b/m"], ["a/m", "b/m"]),
        (["a/gpt2", "b/gpt2"], ["a/gpt2", "b/gpt2"]),
        (["wikitext", "/x/wikitext"], ["wikitext", "x/wikitext"]),
        (["x/wikitext", "/x/wikitext"], ["x/wikitext", "/x/wikitext"]),
        (["a//b", "a/b"], ["a//b", "a/b"]),
        (["openai-community/gpt2"], ["gpt2"]),
        (["/", "gpt2", "gpt2"], ["/", "gpt2", "gpt2"]),
        ([], []),
    ],
)
def test_short_names_tell_all_names_apart(names: list[str], short: list[str]) -> None:
    assert [short_names(names)[name] for name in names] == short


def test_passages_leave_room_for_a_start_token(tokenizer_dir: Path) -> None:
    tokenizer, sizes = load_tokenizer(str(tokenizer_dir)), SimpleNamespace(vocab_size=320, n_positions=16)
    text = ["the cat sat on the mat " * 9], [" happy"]
    lengths = []
    for start in (False, True):
        if start:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
            )
        _, (window,) = _continued("t", ModelTokenizer("m", sizes, tokenizer), *text)
        lengths.append(window.stop - window.start)
    assert lengths == [17, 16]  # the last token is only predicted
