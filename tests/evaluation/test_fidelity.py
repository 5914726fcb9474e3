"""Fidelity against a loop in float64 that takes one window and one target at a time."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.conftest import make_model, sentences
from tests.evaluation.test_conventions import cbt
from tests.utils.test_charts import Page
from tinygpt2 import Fidelity, PplConfig, ppl
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import ModelError
from tinygpt2.evaluation.fidelity import calibration_error


@pytest.fixture(scope="module")
def students(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A copy of the teacher that was shaken, a narrower model, and one with half the positions."""
    from tinygpt2.models.saving import save_model

    root = tmp_path_factory.mktemp("students")
    near = GPT2LMHeadModel.from_pretrained(str(make_model(root / "same", tokenizer_dir)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    save_model(near, root / "near", load_tokenizer(str(tokenizer_dir)), "# test\n")
    make_model(root / "narrow", tokenizer_dir, seed=3, n_layer=2, n_embd=16)
    make_model(root / "short", tokenizer_dir, seed=4, n_positions=16)
    return [root / name for name in ("near", "narrow", "short")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(sentences(30, seed=9), encoding="utf-8")
    return file


def distributions(directory: Path, windows: list[list[int]]) -> list[list[torch.Tensor]]:
    """Log-probabilities of every window's targets, in float64."""
    model = GPT2LMHeadModel.from_pretrained(str(directory)).double().eval()
    with torch.no_grad():
        return [list(model(torch.tensor([one])).logits[0, :-1].log_softmax(-1)) for one in windows]


def ratio(sums: list[float], counts: list[int]) -> tuple[float, float]:
    """Mean over targets, and its standard error over windows."""
    mean, n = sum(sums) / sum(counts), len(sums)
    spread = sum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(n / (n - 1) * spread) / sum(counts)


def naive_calibration(pairs: list[tuple[float, bool]]) -> float:
    total = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = [pair for pair in pairs if low <= pair[0] < high or (number == 14 and pair[0] == 1)]
        if inside:
            hits = sum(hit for _, hit in inside) / len(inside)
            total += len(inside) / len(pairs) * abs(hits - sum(sure for sure, _ in inside) / len(inside))
    return total


def check(found: Fidelity, teacher: Path, student: Path, windows: list[list[int]]) -> None:
    """Compare every figure with that of the loop."""
    per_window: dict[str, list[float]] = {}
    kls, of_teacher, of_student, places = [], [], [], []
    pairs = zip(windows, distributions(teacher, windows), distributions(student, windows), strict=True)
    for window, theirs, ours in pairs:
        sums = dict.fromkeys(("kl", "reverse_kl", "same_top", "acceptance", "loss_difference"), 0.0)
        for at, (target, log_p, log_q) in enumerate(zip(window[1:], theirs, ours, strict=True), 1):
            p, q = log_p.exp(), log_q.exp()
            kls.append(float((p * (log_p - log_q)).sum()))
            same = int(p.argmax()) == int(q.argmax())
            places.append((at, float(p.max()), kls[-1], same))
            sums["kl"] += kls[-1]
            sums["reverse_kl"] += float((q * (log_q - log_p)).sum())
            sums["same_top"] += same
            sums["acceptance"] += sum(min(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            sums["loss_difference"] += float(log_p[target] - log_q[target])
            of_teacher.append((float(p.max()), int(p.argmax()) == target))
            of_student.append((float(q.max()), int(q.argmax()) == target))
        for key, value in sums.items():
            per_window.setdefault(key, []).append(value)
    counts = [len(window) - 1 for window in windows]
    assert found.tokens == len(kls)
    for key, sums_of_windows in per_window.items():
        mean, error = ratio(sums_of_windows, counts)
        assert getattr(found, key) == pytest.approx(mean, rel=1e-6, abs=1e-6), key
        assert getattr(found, "stderr" if key == "kl" else f"{key}_stderr") == pytest.approx(error, rel=1e-4, abs=1e-7)
    assert found.kl_median == pytest.approx(sorted(kls)[len(kls) // 2], rel=0.02)
    assert found.kl_median == pytest.approx(float(np.median(kls)), rel=1e-5, abs=1e-6)
    assert found.kl_p99 == pytest.approx(float(np.percentile(kls, 99)), rel=1e-5, abs=1e-6)
    assert found.calibration_error == pytest.approx(naive_calibration(of_student), abs=1e-6)
    assert found.reference_calibration_error == pytest.approx(naive_calibration(of_teacher), abs=1e-6)
    for parts, column, last in ((found.by_position, 0, max(counts) + 1), (found.by_confidence, 1, 1.0)):
        assert sum(part.tokens for part in parts) == len(kls)
        for part in parts:
            inside = [one for one in places if part.low <= one[column] < part.high or one[column] == part.high == last]
            assert part.tokens == len(inside)
            assert part.kl == pytest.approx(sum(one[2] for one in inside) / len(inside), rel=1e-5, abs=1e-6)
            assert part.same_top == pytest.approx(sum(one[3] for one in inside) / len(inside))


def test_every_figure_equals_the_loop(teacher: Path, students: list[Path], text: Path) -> None:
    result = ppl(PplConfig(model=[str(one) for one in students], reference=str(teacher), task=[str(text)]))
    tokens = load_tokenizer(str(teacher))(text.read_text(encoding="utf-8"))["input_ids"]
    for row, student, size in zip(result.results, students, (32, 32, 16), strict=True):
        windows = [one for at in range(0, len(tokens), size) if len(one := tokens[at : at + size]) > 1]
        assert row.fidelity is not None
        assert row.fidelity.reference == str(teacher)
        check(row.fidelity, teacher, student, windows)
    alone = ppl(PplConfig(model=[str(teacher)], task=[str(text)])).results[0].loss
    near, narrow, _ = (row.fidelity for row in result.results)
    assert near.kl < 0.3 * narrow.kl
    assert near.loss_difference == pytest.approx(result.results[0].loss - alone, abs=1e-6)


def test_chunks_and_batches_change_nothing(
    teacher: Path, students: list[Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured() -> Fidelity:
        config = PplConfig(model=[str(students[1])], reference=str(teacher), task=[str(text)], batch_size=3)
        found = ppl(config).results[0].fidelity
        assert found is not None
        return found

    whole = measured()
    monkeypatch.setattr("tinygpt2.evaluation.fidelity.scoring_chunk", lambda *_: 7)
    monkeypatch.setattr("tinygpt2.evaluation.fidelity.rows_at_once", lambda *_: 3)
    small = measured()
    for key in ("kl", "reverse_kl", "same_top", "acceptance", "loss_difference", "kl_p99", "calibration_error"):
        assert getattr(small, key) == pytest.approx(getattr(whole, key), rel=1e-6, abs=1e-7)


def test_a_model_beside_itself(teacher: Path, text: Path) -> None:
    (row,) = ppl(PplConfig(model=[str(teacher)], reference=str(teacher), task=[str(text)])).results
    found = row.fidelity
    assert found is not None
    assert (found.kl, found.reverse_kl, found.kl_p99, found.loss_difference, found.same_top) == (0, 0, 0, 0, 1)
    assert found.acceptance == pytest.approx(1, abs=1e-6)
    assert found.calibration_error == found.reference_calibration_error
    assert math.copysign(1, found.kl) == 1  # no -0.0


def test_short_precision_is_near(teacher: Path, students: list[Path], text: Path) -> None:
    exact, short = (
        ppl(PplConfig(model=[str(students[0])], reference=str(teacher), task=[str(text)], precision=precision))
        .results[0].fidelity.kl
        for precision in ("fp32", "bf16")
    )  # fmt: skip
    assert short == pytest.approx(exact, rel=0.2)
    assert short != exact


def test_only_right_answers_count(teacher: Path, students: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cbtest_CN_test_2500ex.txt").write_text(cbt(9)[0], encoding="utf-8")
    config = PplConfig(model=[str(students[0])], reference=str(teacher), task=["cbt-cn"], task_data=str(tmp_path))
    (row,) = ppl(config).results
    assert row.fidelity is not None
    assert row.fidelity.tokens == row.tokens


def test_references_that_cannot_be_compared(
    teacher: Path, students: list[Path], text: Path, tmp_path: Path, cli: Callable
) -> None:
    with pytest.raises(
        ModelError, match=r"windows of model .* have 32 tokens, but the reference .* has positions for 16"
    ):
        ppl(PplConfig(model=[str(teacher)], reference=str(students[2]), task=[str(text)]))
    assert cli("ppl", "--model", teacher, "--reference", tmp_path / "none", "--task", text).code == 4


def test_rows_without_tokens_change_nothing(
    teacher: Path, students: list[Path], text: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A model may have more rows than its tokenizer has tokens; each is compared as if it were alone."""
    wide = make_model(tmp_path / "wide", tokenizer_dir, seed=5, n_layer=1, vocab_size=384)
    model = GPT2LMHeadModel.from_pretrained(str(wide))
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(tmp_path / "cut")
    load_tokenizer(str(tokenizer_dir)).save_pretrained(str(tmp_path / "cut"))
    base = {"reference": str(teacher), "task": [str(text)]}
    together = ppl(PplConfig(model=[str(wide), str(students[1]), str(tmp_path / "cut")], **base)).results
    (alone,) = ppl(PplConfig(model=[str(students[1])], **base)).results
    assert [row.fidelity.compared for row in together] == ["tokens"] * 3
    assert together[1].fidelity == alone.fidelity
    assert together[0].fidelity.kl == pytest.approx(together[2].fidelity.kl, rel=1e-6)
    (turned,) = ppl(PplConfig(model=[str(teacher)], reference=str(wide), task=[str(text)])).results
    assert turned.fidelity.reverse_kl == pytest.approx(together[0].fidelity.kl, rel=1e-6)


def test_what_people_see(teacher: Path, students: list[Path], text: Path, tmp_path: Path, cli: Callable) -> None:
    asked = ["ppl", "--model", students[0], "--model", students[1], "--reference", teacher, "--task", text]
    found = cli(*asked, "--json", "--plot", tmp_path / "a.png").json["results"]
    named = {"kl", "kl_median", "kl_p99", "reverse_kl", "same_top", "acceptance", "stderr"}
    assert named < set(found[0]["fidelity"])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert len(page.all("figure")) == 2 + 4
    values = found[1]["fidelity"]
    assert f"{values['kl']:.4f} ± {values['stderr']:.4f}" in page.said("td")
    shown = cli(*asked).out
    assert f"fidelity to m on text.txt, {values['tokens']:,} targets, its own calibration error" in shown
    assert f"{values['kl']:.4f} ± {values['stderr']:.4f}" in shown
    assert "KL(reference || model)" in shown
    rows = list(csv.DictReader(cli(*asked, "--csv").out.splitlines()))
    assert float(rows[1]["fidelity.kl"]) == values["kl"]
    assert "fidelity to m" in cli(*asked, "--markdown").out
    assert "fidelity" not in cli(*asked[:3], "--task", text, "--json").json["results"][0]


def test_calibration_at_the_edges() -> None:
    assert calibration_error(np.ones(4), np.array([1.0, 1.0, 1.0, 0.0])) == pytest.approx(0.25)
    assert calibration_error(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(teacher: Path, students: list[Path], text: Path) -> None:
    one, two = (
        ppl(PplConfig(model=[str(students[0])], reference=str(teacher), task=[str(text)], num_processes=count))
        .results[0].fidelity
        for count in (1, 2)
    )  # fmt: skip
    for key in ("kl", "stderr", "kl_p99", "same_top", "acceptance", "calibration_error"):
        assert getattr(two, key) == pytest.approx(getattr(one, key), rel=1e-6)
