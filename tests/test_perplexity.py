"""Perplexity against a loop that is too simple to be wrong."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt2 import PplConfig, PregenerateConfig, ppl, pregenerate
from tinygpt2.dataset import load_packed
from tinygpt2.errors import ConfigError, DataError, ModelError
from tinygpt2.model import load_model
from tinygpt2.perplexity import Scores, score, windows
from tinygpt2.tasks import load_task
from tinygpt2.tokenizer import encode, load_tokenizer

from .conftest import make_model, sentences


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
    file.write_text(sentences(40, seed=99) + " <|endoftext|> the end", encoding="utf-8")
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
    assert row.word_perplexity == pytest.approx(math.exp(total / len(text.split())), rel=1e-4)
    assert (row.words, row.bytes, row.stride) == (len(text.split()), len(text.encode()), stride or 32)


def test_a_dataset_is_scored_block_by_block(teacher: Path, data: Path) -> None:
    row = ppl(PplConfig(model=[str(teacher)], task=[str(data)])).results[0]
    model, _ = load_model(str(teacher))
    blocks = load_packed(str(data)).test
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
    assert sliding.tokens - plain.tokens < 32
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


def test_batch_size_changes_nothing(teacher: Path) -> None:
    model, _ = load_model(str(teacher))
    tokens = np.random.default_rng(0).integers(0, 320, 500)
    spans = list(windows(500, 32, 20))
    one, many = (score(model, tokens, spans, size) for size in (1, 64))
    np.testing.assert_allclose(one.sums, many.sums, rtol=1e-5)


def test_wikitext_has_its_published_number_of_tokens(shared_data: Path) -> None:
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    for source in (shared_data / "wikitext-2" / "wiki.test.raw", shared_data / "wikitext-2"):
        text = load_task("wikitext", str(source)).text
        assert len(encode(tokenizer, [text])[0]) == 287_644


def test_bad_tasks(teacher: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    make_model(tmp_path / "bare", None)
    make_model(tmp_path / "short", None, n_positions=16)
    (tmp_path / "text.txt").write_text("the cat sat")
    cases = [
        (ConfigError, "did you mean wikitext", {"task": "wikitxt"}),
        (DataError, "no such file", {"task": "nowhere.txt"}),
        (DataError, "no such file", {"task": "wikitext", "task_data": str(tmp_path / "x")}),
        (DataError, "no text", {"task": str(tmp_path / "empty.txt")}),
        (DataError, "1 tokens long", {"task": str(tmp_path / "one.txt")}),
        (DataError, "not UTF-8", {"task": str(tmp_path / "bad.txt")}),
        (DataError, "no pregenerated dataset", {"task": str(tmp_path)}),
        (ConfigError, "beyond the window", {"task": str(tmp_path / "text.txt"), "stride": 33}),
        (ConfigError, "--task-data", {"task": str(data), "task_data": str(tmp_path)}),
        (ModelError, "no tokenizer", {"task": str(tmp_path / "text.txt"), "model": str(tmp_path / "bare")}),
        (ConfigError, "16 positions", {"task": str(data), "model": str(tmp_path / "short")}),
    ]
    for kind, part, values in cases:
        with pytest.raises(kind, match=part):
            ppl(PplConfig(**{"model": str(teacher), **values}))
