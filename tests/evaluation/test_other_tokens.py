"""Models with different tokens beside each other, against loops in float64 that take one target at a time."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.alignment.test_pieces import components
from tests.conftest import make_model, sentences
from tests.evaluation.test_fidelity import distributions, ratio
from tinygpt2 import (
    Fidelity,
    PplConfig,
    PregenerateConfig,
    TrainTokenizerConfig,
    TruncateStudentConfig,
    ppl,
    pregenerate,
    train_tokenizer,
    truncate_student,
)
from tinygpt2.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of its own."""
    root = tmp_path_factory.mktemp("other")
    text = sentences(30, 1) + sentences(60, 2)[::-1]  # so that its merges are not those of the corpus
    (root / "text.txt").write_text(text, encoding="utf-8")
    train_tokenizer(TrainTokenizerConfig(source=[str(root / "text.txt")], vocab_size=290, out=str(root / "t")))
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


@dataclass
class Naive:
    """Predictions of a reference and a model on windows, one target at a time.

    `rows` holds for each target that compares: the window, the reference's probabilities of the model's tokens (or of
    its own), the model's logarithms, the target, and the reference's token that begins there (or None).
    """

    whole: Any
    small: Any
    content: str
    windows: list[list[int]]
    reference: list[Any]
    model: list[list[torch.Tensor]]

    @classmethod
    def of(cls, reference: Path, model: Path, content: str) -> Naive:
        whole, small = (load_tokenizer(str(one)) for one in (reference, model))
        tokens = small(content)["input_ids"]
        windows = [one for at in range(0, len(tokens), 32) if len(one := tokens[at : at + 32]) > 1]
        theirs = [whole(small.decode(window)) for window in windows]
        states = distributions(reference, [one["input_ids"] for one in theirs])
        return cls(
            whole, small, content, windows, list(zip(theirs, states, strict=True)), distributions(model, windows)
        )

    def begins(self, tokenizer: Any, tokens: list[int]) -> list[int]:
        sizes = [len(name) for name in tokenizer.convert_ids_to_tokens(tokens)]  # a letter for each byte
        return [0, *itertools.accumulate(sizes)][:-1]

    def edges(self, number: int) -> tuple[int, int]:
        """Where the first complete word begins, and where the last one ends."""
        text = self.small.decode(self.windows[number])
        first = max(1, re.match(r"\s*(\w+|[^\w\s]+)?", text).end())
        last = len(text)
        if number + 1 < len(self.windows):
            last -= re.match(r"\s*(\w+|[^\w\s]+)?\s*", text[::-1]).end()
        return first, last

    def borders(self, number: int) -> Iterator[tuple[int, int, int]]:
        """Yield each common border of a window: its byte, and the places of both tokens."""
        window, (theirs, _) = self.windows[number], self.reference[number]
        places = {at: place for place, at in enumerate(self.begins(self.whole, theirs["input_ids"]))}
        first, last = self.edges(number)
        for place, at in enumerate(self.begins(self.small, window)):
            if at in places and first <= at <= last:
                yield at, place, places[at]

    def events(self) -> list[tuple[set[int], set[int]]]:
        pairs = {(self.whole.eos_token_id, self.small.eos_token_id)}
        for number, window in enumerate(self.windows):
            theirs, last = self.reference[number][0]["input_ids"], self.edges(number)[1]
            pairs |= {(theirs[b], window[a]) for at, a, b in self.borders(number) if at < last}
        for tokenizer in (self.whole, self.small):
            for name, token in tokenizer.get_vocab().items():
                text = tokenizer.decode([token])
                if "\ufffd" in text or name == tokenizer.eos_token:
                    continue
                both = [one(text)["input_ids"] for one in (self.whole, self.small)]
                theirs, ours = (
                    dict(zip(self.begins(one, ids), ids, strict=True))
                    for one, ids in zip((self.whole, self.small), both, strict=True)
                )
                pairs |= {(theirs[at], ours[at]) for at in theirs.keys() & ours.keys()}
        return components(sorted(pairs))

    def over_events(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, int, float, float]]:
        """Yield for each target its window, both distributions, the target's event, and what lumps and nothing have."""
        parts = self.events()
        for number, window in enumerate(self.windows):
            for _, a, b in self.borders(number):
                target = [index for index, (_, ours) in enumerate(parts) if window[a] in ours]
                if not a or not target:
                    continue
                p, q = self.reference[number][1][b - 1].exp(), self.model[number][a - 1].exp()
                sums = torch.stack([p[sorted(theirs)].sum() for theirs, _ in parts])
                own = torch.stack([q[sorted(ours)].sum() for _, ours in parts])
                left, sums = 1 - sums.sum(), sums / sums.sum()
                lumped = sum(float(mass) for mass, (_, ours) in zip(sums, parts, strict=True) if len(ours) > 1)
                rest = (1 - own.sum()).clamp(min=0)
                yield number, sums, torch.cat([own, rest[None]]), target[0], lumped, float(left)

    def over_tokens(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, int, float, float]]:
        """The same for a model whose tokens are the reference's cut by rank."""
        vocabulary = self.whole.get_vocab()
        pieces = {
            token: [one.id for one in self.small.backend_tokenizer.model.tokenize(name)]
            for name, token in vocabulary.items()
        }
        pieces[self.whole.eos_token_id] = [self.small.eos_token_id]
        for number, window in enumerate(self.windows):
            theirs, states = self.reference[number]
            words, place = theirs.word_ids(), 0
            for b, token in enumerate(theirs["input_ids"]):
                for inside, piece in enumerate(pieces[token]):
                    assert window[place] == piece or words[b] in (words[0], words[-1])
                    cut = number + 1 < len(self.windows) and words[b] == words[-1]
                    begins = b == 0 or words[b - 1] != words[b]
                    if words[b] != words[0] and (not cut or (begins and not inside)):
                        p, read = states[b - 1].exp(), pieces[token][:inside]
                        sums = torch.zeros(len(self.small), dtype=torch.float64)
                        for other, path in pieces.items():
                            if path[:inside] == read and len(path) > inside:
                                sums[path[inside]] += p[other]
                        yield number, sums / sums.sum(), self.model[number][place - 1].exp(), window[place], 0.0, 0.0
                    place += 1
                    if cut and place >= len(window):
                        break


def check_across(found: Fidelity, naive: Naive, rows: list[Any]) -> None:
    """Compare every figure with that of the loop."""
    targets = sum(len(window) - 1 for window in naive.windows)
    assert found.tokens == len(rows)
    assert found.share == pytest.approx(len(rows) / targets)
    assert found.reverse_kl is None
    sums = {key: [0.0] * len(naive.windows) for key in ("kl", "same_top", "acceptance", "loss_difference")}
    counts, kls = [0] * len(naive.windows), []
    for number, p, q, target, _, _ in rows:
        kls.append(float(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=False) if a > 0)))
        sums["kl"][number] += kls[-1]
        sums["same_top"][number] += int(p.argmax()) == int(q.argmax())
        sums["acceptance"][number] += sum(min(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=False))
        sums["loss_difference"][number] += math.log(p[target] / q[target])
        counts[number] += 1
    for key, values in sums.items():
        mean, error = ratio(values, counts)
        assert getattr(found, key) == pytest.approx(mean, rel=1e-4, abs=1e-6), key
        assert getattr(found, "stderr" if key == "kl" else f"{key}_stderr") == pytest.approx(error, rel=1e-3, abs=1e-7)
    assert found.kl_median == pytest.approx(float(np.median(kls)), rel=1e-4)
    assert found.lumped == pytest.approx(sum(row[4] for row in rows) / len(rows), rel=1e-4, abs=1e-7)
    assert found.left_out == pytest.approx(sum(row[5] for row in rows) / len(rows), rel=1e-4, abs=1e-6)
    assert sum(part.tokens for part in found.by_position) == len(rows)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text whose letters are bytes."""
    file = tmp_path_factory.mktemp("plain") / "plain.txt"
    text = "\n".join(sentences(3, seed) for seed in range(20, 26))
    file.write_text(text.replace("日本", "sun").replace("naïve", "naive"), encoding="utf-8")
    return file


def test_events_of_other_tokens(teacher: Path, other: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    naive = Naive.of(teacher, other, plain.read_text(encoding="utf-8"))
    rows = list(naive.over_events())
    for chunk, batch in ((10**6, 3), (7, 5)):
        monkeypatch.setattr("tinygpt2.evaluation.other_tokens.scoring_chunk", lambda *_, chunk=chunk: chunk)
        asked = PplConfig(model=[str(other)], reference=str(teacher), task=[str(plain)], batch_size=batch)
        found = ppl(asked).results[0].fidelity
        assert (found.compared, found.reference) == ("events", str(teacher))
        check_across(found, naive, rows)


def test_what_is_beyond_the_references_positions_is_not_compared(teacher: Path, other: Path, plain: Path) -> None:
    found = ppl(PplConfig(model=[str(teacher)], reference=str(other), task=[str(plain)])).results[0].fidelity
    assert 0 < found.share < 0.9
    assert max(part.low for part in found.by_position) < 32
    strided = PplConfig(model=[str(teacher)], reference=str(other), task=[str(plain)], stride=24)
    assert ppl(strided).results[0].fidelity.share < 0.9  # a stride is one of the model's windows alone


def test_sums_of_a_rank_cut(teacher: Path, plain: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    truncate_student(TruncateStudentConfig(teacher=str(teacher), vocab_size=290, num_layers=2, out=str(cut)))
    found = ppl(PplConfig(model=[str(cut)], reference=str(teacher), task=[str(plain)])).results[0].fidelity
    naive = Naive.of(teacher, cut, plain.read_text(encoding="utf-8"))
    assert (found.compared, found.lumped, found.left_out) == ("sums", 0, 0)
    check_across(found, naive, list(naive.over_tokens()))


def test_what_people_see_of_other_tokens(
    teacher: Path, other: Path, plain: Path, data: Path, corpus: Path, tmp_path: Path, cli: Callable
) -> None:
    asked = ["ppl", "--model", other, "--model", teacher, "--reference", teacher, "--task", plain]
    found = cli(*asked, "--json", "--plot", tmp_path / "a.html").json["results"]
    assert [one["fidelity"]["compared"] for one in found] == ["events", "tokens"]
    assert {"share", "lumped", "left_out"} < set(found[0]["fidelity"])
    shown = cli(*asked).out
    assert f"events, {found[0]['fidelity']['share']:.1%}" in shown
    assert "other tokens than the reference's" in shown
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert f"events, {found[0]['fidelity']['share']:.1%}" in page
    # a dataset in the model's tokens: the reference reads its text
    pregenerate(
        PregenerateConfig(source=str(corpus), tokenizer=str(other), out=str(tmp_path / "d"), sequence_length=32)
    )
    outcome = cli("ppl", "--model", other, "--reference", teacher, "--task", tmp_path / "d", "--json")
    assert outcome.json["results"][0]["fidelity"]["share"] > 0.3
    (tmp_path / "lambada_test.txt").write_text("\n".join(sentences(1, seed) for seed in range(30)), encoding="utf-8")
    words = ["ppl", "--model", other, "--reference", teacher, "--task", "lambada", "--task-data", tmp_path, "--json"]
    assert cli(*words).json["results"][0]["fidelity"]["share"] > 0.3
    bare = make_model(tmp_path / "bare", None, vocab_size=320)
    refused = cli("ppl", "--model", other, "--reference", bare, "--task", tmp_path / "d")
    assert refused.code == 4
