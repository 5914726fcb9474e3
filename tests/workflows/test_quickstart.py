"""quickstart at a scale of seconds: everything it promises, and that it continues."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

from tinygpt2 import QuickstartConfig
from tinygpt2.errors import ConfigError
from tinygpt2.training.metrics import read_metrics
from tinygpt2.workflows.quickstart import QuickstartSizes, quickstart

MODELS = ("teacher", "student", "baseline-truncated", "baseline-random")


@pytest.fixture(scope="module")
def scale(corpus: Path) -> QuickstartSizes:
    return QuickstartSizes(
        vocab_size=300, sequence_length=64, n_layer=3, n_embd=16, n_head=2, student_layers=1, teacher_tokens=4000,
        student_tokens=2000, new_tokens=8, source=str(corpus),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(scale: QuickstartSizes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    out = tmp_path_factory.mktemp("quickstart") / "q"
    return out, quickstart(QuickstartConfig(out=str(out)), scale)


def test_it_makes_four_models_a_report_and_a_picture(run: tuple) -> None:
    out, result = run
    for name in MODELS:
        model = GPT2LMHeadModel.from_pretrained(str(out / name))
        assert model.config.n_layer == (3 if name == "teacher" else 1)
        assert len(AutoTokenizer.from_pretrained(str(out / name))) == 300
    rows = [result.teacher, result.student, result.baselines["truncated"], result.baselines["random"]]
    for name, row in zip(MODELS, rows, strict=True):
        assert row.model == str(out / name)
        assert row.bytes == (out / name / "model.safetensors").stat().st_size
        assert row.perplexity > 1
        assert row.tokens_per_second > 0
    report = Path(result.report).read_text(encoding="utf-8")
    for row in rows:
        assert f"{row.perplexity:.2f}" in report
        assert f"{row.parameters:,}" in report
    assert "--teacher gpt2" in report
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_students_saw_the_same_tokens_at_the_same_rate(run: tuple) -> None:
    out, _ = run
    rows = {name: read_metrics(out / name) for name in MODELS[1:]}
    schedules = {
        name: [(row["step"], row["tokens"], row["learning_rate"]) for row in found if "learning_rate" in row]
        for name, found in rows.items()
    }
    assert schedules["student"] == schedules["baseline-truncated"] == schedules["baseline-random"]


def test_a_second_run_continues_and_redoes_nothing(run: tuple, scale: QuickstartSizes) -> None:
    out, first = run
    before = {path: path.stat().st_mtime_ns for name in MODELS for path in (out / name).rglob("*")}
    again = quickstart(QuickstartConfig(out=str(out)), scale)
    assert again == first
    assert before == {path: path.stat().st_mtime_ns for path in before}
    journal = json.loads((out / "quickstart.json").read_text())
    for stage in ("student", "baseline-truncated", "baseline-random", "figures"):
        del journal["stages"][stage]
    (out / "quickstart.json").write_text(json.dumps(journal))
    shutil.rmtree(out / "baseline-random")
    resumed = quickstart(QuickstartConfig(out=str(out)), scale)
    assert resumed.student.perplexity == first.student.perplexity
    assert resumed.baselines["random"].perplexity == first.baselines["random"].perplexity


def test_a_foreign_directory_or_another_seed_is_refused(run: tuple, scale: QuickstartSizes, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="a quickstart run with another seed"):
        quickstart(QuickstartConfig(out=str(run[0]), seed=1), scale)
    with pytest.raises(ConfigError, match="not empty and does not contain a quickstart run"):
        quickstart(QuickstartConfig(out=str(corpus)), scale)
