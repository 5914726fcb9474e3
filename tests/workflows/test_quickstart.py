"""quickstart at a scale of seconds: everything it promises, and that it continues."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.utils.test_charts import Page
from tinygpt2 import PplConfig, QuickstartConfig, ppl
from tinygpt2.cli.render import to_json
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


def test_the_cut_before_training_is_measured_as_the_others(run: tuple) -> None:
    out, result = run
    paths = [str(out / name) for name in ("student", "truncated", "baseline-truncated")]
    measured = ppl(PplConfig(model=paths, task=[str(out / "data")], batch_size=4))
    student, cut, text_only = measured.results
    assert (result.cut.model, result.cut.perplexity) == (paths[1], cut.perplexity)
    assert result.gains["cut"].loss == pytest.approx(cut.loss - student.loss, abs=1e-12)
    assert result.gains["truncated"].loss == pytest.approx(text_only.loss - student.loss, abs=1e-12)
    pair = measured.paired[0]
    assert (result.gains["cut"].loss, result.gains["cut"].stderr) == (-pair.difference, pair.stderr)
    report = Path(result.report).read_text(encoding="utf-8")
    assert f"| cut, before training | {result.cut.perplexity:.2f} | 1 | {result.cut.parameters:,} |" in report
    assert f"{abs(result.gains['cut'].loss):.4f} ± {pair.stderr:.4f} nats per token" in report


def test_models_of_one_shape_have_one_speed(run: tuple) -> None:
    result = run[1]
    speeds = {row.tokens_per_second for row in (result.student, result.cut, *result.baselines.values())}
    assert len(speeds) == 1
    assert result.teacher.tokens_per_second not in speeds


def test_the_page_holds_the_table_the_curves_and_the_samples(run: tuple) -> None:
    out, result = run
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    names = list(result.rows)
    assert [said for said in page.said("th") if said in names] == names
    assert [said for said in page.said("h3") if said in names] == names
    assert all(f"{row.perplexity:.2f}" in page.said("td") for row in result.rows.values())
    charts = [json.loads(figure["data-chart"]) for figure in page.all("figure")]
    assert [series["name"] for chart in charts for series in chart["series"]] == [
        "distilled", "text only", "random start", "teacher"
    ]  # fmt: skip
    levels = dict(charts[0]["levels"])
    assert float(levels["cut, before training"]) == pytest.approx(math.log(result.cut.perplexity), abs=1e-3)
    assert str(out) not in text
    for link in page.all("a"):
        assert (out / link["href"]).is_file()
    assert len(page.all("a")) == 4


def test_the_json_keeps_its_keys(run: tuple) -> None:
    found = to_json(run[1])
    assert {"teacher", "student", "baselines", "seconds", "report"} <= set(found)
    assert set(found["baselines"]) == {"truncated", "random"}
    keys = {"model", "parameters", "perplexity", "bytes", "tokens_per_second"}
    assert all(keys <= set(row) for row in (found["teacher"], found["student"], *found["baselines"].values()))


def test_the_run_of_an_older_version_continues(run: tuple, scale: QuickstartSizes, tmp_path: Path) -> None:
    """Its journal has the measurements under another name and without the cut."""
    shutil.copytree(run[0], tmp_path / "q")
    file = tmp_path / "q" / "quickstart.json"
    journal = json.loads(file.read_text(encoding="utf-8"))
    models = journal["stages"].pop("measurements")["result"]["models"]
    journal["stages"]["figures"] = {"seconds": 1.5, "result": {name: models[name] for name in MODELS}}
    file.write_text(json.dumps(journal), encoding="utf-8")
    result = quickstart(QuickstartConfig(out=str(tmp_path / "q")), scale)
    assert result.cut.perplexity == run[1].cut.perplexity
    assert result.baselines["random"].perplexity == run[1].baselines["random"].perplexity


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
    for stage in ("student", "baseline-truncated", "baseline-random", "measurements"):
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
