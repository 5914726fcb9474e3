"""Models with different tokens beside each other, against loops in float64 that take one target at a time."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import make_model, sentences
from tests.evaluation.test_fidelity import distributions, ratio
from tinygpt2 import PplConfig, TrainTokenizerConfig, ppl, train_tokenizer
from tinygpt2.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def other(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of its own."""
    root = tmp_path_factory.mktemp("other")
    train_tokenizer(TrainTokenizerConfig(source=[str(corpus)], vocab_size=290, out=str(root / "t")))
    return make_model(root / "other", root / "t", seed=7, vocab_size=290, n_layer=2, n_embd=16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [sentences(2, seed) for seed in range(12)]
    file.write_text("\n".join([*lines[:5], "", "", *lines[5:], ""]), encoding="utf-8")
    return file


def line_losses(directory: Path, text: str) -> list[float]:
    """The summed loss of the targets that begin in each line, window by window."""
    tokenizer = load_tokenizer(str(directory))
    tokens = tokenizer(text)["input_ids"]
    lines = [tokenizer.decode(tokens[:at]).count("\n") for at in range(len(tokens))]
    windows = [one for at in range(0, len(tokens), 32) if len(one := tokens[at : at + 32]) > 1]
    sums, at = [0.0] * (text.count("\n") + 1), 0
    for window, logs in zip(windows, distributions(directory, windows), strict=True):
        for place, log in enumerate(logs, 1):
            sums[lines[at + place]] -= float(log[window[place]])
        at += 32
    return sums


def test_bits_per_byte_line_by_line(teacher: Path, other: Path, text: Path) -> None:
    result = ppl(PplConfig(model=[str(teacher), str(other)], task=[str(text)]))
    (pair,), (a, b) = result.paired, result.results
    assert (pair.difference, pair.stderr, pair.over) == (None, None, "line")
    content = text.read_text(encoding="utf-8")
    theirs, ours = line_losses(teacher, content), line_losses(other, content)
    bytes_ = [len(line.encode()) + 1 for line in content.split("\n")]
    mean, error = ratio([(x - y) / math.log(2) for x, y in zip(theirs, ours, strict=True)], bytes_)
    scale = sum(bytes_) / len(content.encode())
    assert pair.parts == len(bytes_)
    assert pair.bits_per_byte == pytest.approx(mean * scale, rel=1e-5)
    assert pair.bits_per_byte_stderr == pytest.approx(error * scale, rel=1e-4)
    assert pair.bits_per_byte == pytest.approx(a.bits_per_byte - b.bits_per_byte, rel=1e-9)


def test_the_same_tokens_pair_by_window(teacher: Path, tokenizer_dir: Path, text: Path, tmp_path: Path) -> None:
    same = make_model(tmp_path / "same", tokenizer_dir, seed=5)
    (pair,) = ppl(PplConfig(model=[str(teacher), str(same)], task=[str(text)])).paired
    row = ppl(PplConfig(model=[str(teacher)], task=[str(text)])).results[0]
    scale = row.tokens / row.bytes / math.log(2)
    assert pair.over == "window"
    assert pair.bits_per_byte == pytest.approx(pair.difference * scale, rel=1e-12)
    assert pair.bits_per_byte_stderr == pytest.approx(pair.stderr * scale, rel=1e-12)


@pytest.mark.parametrize("convention", ["hf", "gpt2-paper", "lm-eval"])
def test_every_convention_and_passages(teacher: Path, other: Path, text: Path, tmp_path: Path, convention: str) -> None:
    (tmp_path / "lambada_test.txt").write_text("\n".join(sentences(1, seed) for seed in range(30)), encoding="utf-8")
    (tmp_path / "wiki.test.raw").write_text(
        "".join(f" = T{seed} = \n \n {sentences(2, seed)} \n" for seed in range(6)), encoding="utf-8"
    )
    asked = PplConfig(
        model=[str(teacher), str(other)], task=["lambada", str(text), "wikitext"], task_data=str(tmp_path),
        convention=convention,
    )  # fmt: skip
    result = ppl(asked)
    for pair, parts in zip(result.paired, (30, 15, None), strict=True):
        a, b = (row for row in result.results if row.task == pair.task)
        assert pair.bits_per_byte == pytest.approx(a.bits_per_byte - b.bits_per_byte, rel=1e-9)
        assert pair.bits_per_byte_stderr > 0
        assert parts is None or pair.parts == parts
    assert [pair.over for pair in result.paired] == ["text", "line", "line"]


def test_what_people_see_of_pairs(teacher: Path, other: Path, text: Path, tmp_path: Path, cli: Callable) -> None:
    asked = ["ppl", "--model", teacher, "--model", other, "--task", text]
    (pair,) = cli(*asked, "--json", "--plot", tmp_path / "a.html").json["paired"]
    value = f"{-pair['bits_per_byte']:+.4f} ± {pair['bits_per_byte_stderr']:.4f}"
    shown = cli(*asked).out
    assert value in shown
    assert "in bits per byte ± standard error over lines" in " ".join(shown.split())
    assert "n/a" not in shown
    rows = list(csv.DictReader(cli(*asked, "--csv").out.splitlines()))
    assert rows[1]["above m"] == ""
    assert float(rows[1]["above m, bits per byte"]) == -pair["bits_per_byte"]
    assert float(rows[1]["above m, bits per byte, stderr"]) == pair["bits_per_byte_stderr"]
    assert f"{value} bits per byte" in (tmp_path / "a.html").read_text(encoding="utf-8")
