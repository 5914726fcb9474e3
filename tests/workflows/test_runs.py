"""`runs`, `show` and the reports of runs: on made files, and on runs of the real commands."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.utils.test_charts import Page
from tinygpt2 import ConfigError, RunsConfig, ShowConfig, runs, show
from tinygpt2.utils.charts import Chart
from tinygpt2.utils.locks import holder_of, only_writer
from tinygpt2.workflows.curves import plot_curves, run_charts
from tinygpt2.workflows.report import card_figures, write_run_report

TERMS = {"attention": 20.0, "hidden": 6.0, "prediction": 2.0, "ce": 5.0}


def make_run(
    out: Path, steps: int = 50, total: int | None = 100, terms: tuple[str, ...] = ("prediction",), **record: object
) -> Path:
    """Write the files of a run: metrics of each tenth step, the first with figures before training, options, record."""
    out.mkdir(parents=True)
    rows: list[dict] = []
    for step in range(10, steps + 1, 10):
        parts = {f"loss/{name}": TERMS[name] * math.exp(-step / 50) for name in terms}
        row = {"step": step, "tokens": step * 1000, "loss": sum(parts.values()), **parts, "learning_rate": 0.001}
        row |= {"tokens_per_second": 500.0, **({"total_steps": total} if total else {})}
        if step % 50 == 0:
            row |= {"eval/loss": 4.5, "eval/perplexity": 90.0, "eval/stderr": 0.02}
        rows.append(row | ({} if rows else {"before/loss": 5.0, "before/stderr": 0.02, "teacher/loss": 4.0}))
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"teacher": "/home/me/gpt2", "data": "/home/me/d", "prediction_loss": "forward_kl", "temperature": 1.0}
    (out / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    (out / "run.json").write_text(json.dumps({"command": "distill", **record}), encoding="utf-8")
    return out


def lock(out: Path, process: int, host: str, age: float = 0.0) -> None:
    """Write the lock file that a process would hold."""
    file = out.parent / f".{out.name}.lock"
    file.write_text(f"{process}\n{host}\n", encoding="utf-8")
    os.utime(file, (time.time() - age,) * 2)


def the(found: list) -> object:
    (one,) = found
    return one


def titles(charts: list[Chart]) -> list[str]:
    return [chart.title for chart in charts]


def test_states(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here, elsewhere = socket.gethostname(), "another-machine"
    make_run(tmp_path / "done", 100, result={"steps": 100, "loss": 0.5, "eval": {"loss": 4.25, "perplexity": 70.1}})
    make_run(tmp_path / "deep" / "below" / "interrupted")
    make_run(tmp_path / "failed", failed="loss is NaN at step 51")
    lock(make_run(tmp_path / "running"), os.getpid(), here)
    lock(make_run(tmp_path / "killed"), ended.pid, here)
    lock(make_run(tmp_path / "reused"), os.getpid(), here, age=1e6)  # another process has got the number since
    lock(make_run(tmp_path / "far"), 1, elsewhere)
    lock(make_run(tmp_path / "silent"), 1, elsewhere)
    os.utime(tmp_path / "silent" / "metrics.jsonl", (time.time() - 1e5,) * 2)
    for name in ("run.json", "config.yaml"):
        os.utime(tmp_path / "silent" / name, (time.time() - 1e5,) * 2)
    old = make_run(tmp_path / "old", total=None)  # as 0.1.0 wrote it
    (old / "model.safetensors").write_bytes(b"")
    longer = make_run(tmp_path / "longer")  # done once, and then made longer
    (longer / "model.safetensors").write_bytes(b"")
    found = {Path(run.path).name: run for run in runs(RunsConfig(path=str(tmp_path))).runs}
    assert {name: run.state for name, run in found.items()} == {
        "done": "done", "interrupted": "interrupted", "failed": "failed", "running": "running",
        "killed": "interrupted", "reused": "interrupted", "far": "running", "silent": "maybe running",
        "old": "done", "longer": "interrupted",
    }  # fmt: skip
    assert (found["running"].host, found["running"].process) == (here, os.getpid())
    assert (found["far"].host, found["killed"].host) == (elsewhere, None)
    assert found["running"].seconds_left == pytest.approx(50 * 1000 / 500, abs=5)
    assert found["silent"].seconds_left is None
    assert found["failed"].problem == "loss is NaN at step 51"
    one = found["interrupted"]
    assert (one.step, one.total_steps, one.tokens, one.perplexity, one.eval_loss) == (50, 100, 50_000, 90.0, 4.5)
    assert (found["done"].loss, found["done"].perplexity) == (0.5, 70.1)
    assert list(found)[-1] == "silent"  # the one that wrote last comes first


def test_a_checkpoint_counts_as_progress(tmp_path: Path) -> None:
    out = make_run(tmp_path / "a")
    for name in ("step-40", "step-57", ".step-60", "step-x"):
        (out / "checkpoints" / name).mkdir(parents=True)
    run = the(runs(RunsConfig(path=str(out))).runs)
    assert (run.checkpoint, run.step) == (57, 57)


def test_a_held_lock_is_seen_and_a_released_one_is_not(tmp_path: Path) -> None:
    out = make_run(tmp_path / "a")
    with only_writer(out):
        holder = holder_of(out)
        assert holder is not None
        assert (holder.process, holder.host) == (os.getpid(), socket.gethostname())
        assert the(runs(RunsConfig(path=str(tmp_path))).runs).state == "running"
    assert holder_of(out) is None
    assert the(runs(RunsConfig(path=str(tmp_path))).runs).state == "interrupted"


def test_damaged_files_are_no_obstacle(tmp_path: Path) -> None:
    out = make_run(tmp_path / "a")
    (out / "run.json").write_text("{", encoding="utf-8")
    (out / "config.yaml").write_text("[", encoding="utf-8")
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 60, "lo')
    run = the(runs(RunsConfig(path=str(tmp_path))).runs)
    assert (run.command, run.state, run.step) == ("training", "interrupted", 50)
    assert titles(run_charts(out))[1] == "predictions: distance to the teacher"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json").write_text("{}", encoding="utf-8")  # it has just begun
    assert len(runs(RunsConfig(path=str(tmp_path))).runs) == 2
    assert run_charts(tmp_path / "new") == []
    Page(write_run_report(tmp_path / "new").read_text(encoding="utf-8"))


def test_every_objective_has_a_chart_of_its_own_and_no_line_is_drawn_twice(tmp_path: Path) -> None:
    one = run_charts(make_run(tmp_path / "one", 100))
    assert titles(one) == [
        "held-out cross-entropy", "KL to the teacher", "learning rate", "speed, without evaluation"
    ]  # fmt: skip
    assert one[0].levels == {"before training": 5.0, "teacher": 4.0}
    assert one[0].series[0].points == [(0.0, 5.0), (50_000.0, 4.5), (100_000.0, 4.5)]
    assert one[0].series[0].errors == [0.02] * 3
    assert {one[0].y, one[1].y} == {"nats per token"}
    several = run_charts(make_run(tmp_path / "several", 100, terms=tuple(TERMS)))
    by_title = {chart.title: chart for chart in several}
    assert len(several) == len(by_title) == 7
    assert [series.name for series in by_title["cross-entropy"].series] == ["held out", "training"]
    assert "nats" not in by_title["loss: weighted sum of the objectives"].y
    assert "nats" not in by_title["hidden states: distance to the teacher"].y
    alone = titles(run_charts(make_run(tmp_path / "alone", 100, terms=("ce",))))
    assert alone == ["cross-entropy", "learning rate", "speed, without evaluation"]


def test_the_chart_says_which_divergence_at_which_temperature(tmp_path: Path) -> None:
    out = make_run(tmp_path / "a")
    (out / "config.yaml").write_text("prediction_loss: reverse_kl\ntemperature: 2.0\n", encoding="utf-8")
    chart = run_charts(out)[1]
    assert (chart.title, chart.y) == ("reverse KL to the teacher", "nats per token at temperature 2, times 4")


def test_curves_without_the_rows_that_are_optional(tmp_path: Path) -> None:
    out = make_run(tmp_path / "a", 100)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        {key: None if key == "loss/prediction" else value for key, value in json.loads(line).items()} for line in lines
    ]
    for row in rows:
        for key in ("eval/stderr", "before/loss", "teacher/loss"):
            row.pop(key, None)
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    charts = run_charts(out)
    assert charts[0].levels == {}
    assert charts[0].series[0].errors == []
    assert "KL to the teacher" not in titles(charts)  # NaN in every row
    assert plot_curves(out)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_shows_figures_and_settings_without_the_machines_folders(tmp_path: Path) -> None:
    out = make_run(tmp_path / "student", 100, result={"steps": 100, "eval": {"loss": 4.5, "perplexity": 90.0}})
    (out / "README.md").write_text("# x\n| | |\n|---|---|\n| parameters | 1,000 |\n| a \\| &lt;b> | `x` |\n")
    assert card_figures(out) == {"parameters": "1,000", "a | <b>": "x"}
    text = write_run_report(out).read_text(encoding="utf-8")
    page = Page(text)
    assert page.said("h1") == ["distill: student"]
    assert page.said("p")[0].startswith("Done after 100 steps and 100,000 tokens. Held-out perplexity: 90.00.")
    assert {"parameters", "a | <b>", "teacher"} <= set(page.said("th"))
    assert {"gpt2", "d", "forward_kl"} <= set(page.said("td"))
    assert "/home/me" not in text
    assert str(tmp_path) not in text
    assert write_run_report(out).read_text(encoding="utf-8") == text


def test_show_draws_and_writes(tmp_path: Path, cli: Callable) -> None:
    out = make_run(tmp_path / "a", 100, terms=("prediction", "ce"))
    outcome = cli("show", out)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "distill a: interrupted at step 100 of 100, nothing saved yet, held-out perplexity 90.00"
    assert max(map(len, lines)) <= max(100, len(str(out)) + 50)
    assert any("\u2800" < sign < "\u2900" for sign in outcome.out)
    assert "--- held out   --- training   - - before training   - - teacher" in outcome.out
    assert (out / "curves.png").is_file()
    Page((out / "report.html").read_text(encoding="utf-8"))
    found = cli("show", out, "--json").json
    assert found["picture"] == str(out / "curves.png")
    assert found["run"]["total_steps"] == 100
    assert [chart["title"] for chart in found["curves"]] == titles(show(ShowConfig(path=str(out))).curves)


def test_show_of_a_run_that_is_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "report.html")

    monkeypatch.setattr("tinygpt2.workflows.show.write_run_report", refuse)
    outcome = cli("show", make_run(tmp_path / "a"))
    assert outcome.code == 0
    assert "not written: report.html: Permission denied" in outcome.err
    assert "curves.png written in" in outcome.out


def test_lists_for_people_and_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("runs").out == "no training runs here\n"
    lock(make_run(tmp_path / "x" / "a"), os.getpid(), socket.gethostname())
    make_run(tmp_path / "x" / "b", failed="out of memory")
    said = cli("runs").out
    assert f"running on {socket.gethostname()}/{os.getpid()}, step 50 of 100, " in said
    assert " left " in said
    assert "failed at step 50 of 100" in said
    assert "b failed: out of memory" in said
    found = cli("runs", "x", "--json").json["runs"]
    assert {run["path"] for run in found} == {str(tmp_path / "x" / "a"), str(tmp_path / "x" / "b")}
    assert cli("runs", "nowhere").code == 2
    missing = cli("show", tmp_path)
    assert missing.code == 2
    assert "holds no training run" in missing.err
    with pytest.raises(ConfigError, match="no directory"):
        runs(RunsConfig(path="nowhere"))


def test_both_answer_without_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    code = f"""
import sys
from tinygpt2.cli import app
for arguments in (["runs", {str(tmp_path)!r}], ["show", {str(tmp_path / "a")!r}]):
    try:
        app.main(arguments)
    except SystemExit as end:
        assert end.code == 0, arguments
    heavy = {{"torch", "transformers", "datasets", "accelerate", "pyarrow"}} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_real_runs_leave_what_is_read(data: Path, teacher: Path, tmp_path: Path, cli: Callable) -> None:
    """A run that ends, and one that fails: their records, their reports, and what the two commands say."""
    good = ["distill", "--teacher", teacher, "--student", teacher, "--data", data, "--out", tmp_path / "good"]
    assert cli(*good, "--max-steps", 3, "--log-every", 1, "--eval-every", 2).code == 0
    broken = ["pretrain", "--model", teacher, "--data", data, "--out", tmp_path / "bad", "--max-steps", 30]
    assert cli(*broken, "--learning-rate", 1e30, "--log-every", 1, "--grad-clip", 1e30).code == 5
    found = {Path(run["path"]).name: run for run in cli("runs", tmp_path, "--json").json["runs"]}
    assert (found["good"]["state"], found["good"]["step"], found["good"]["total_steps"]) == ("done", 3, 3)
    assert found["good"]["perplexity"] > 1
    assert (found["bad"]["state"], found["bad"]["total_steps"]) == ("failed", 30)
    assert found["bad"]["problem"]
    record = json.loads((tmp_path / "good" / "run.json").read_text(encoding="utf-8"))
    assert record["result"]["steps"] == 3
    assert str(tmp_path) not in json.dumps(record["result"])
    text = (tmp_path / "good" / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert {"held-out loss, perplexity: this model", "max_steps"} <= set(Page(text).said("th"))
    assert (tmp_path / "good" / "curves.png").is_file()
    assert cli("show", tmp_path / "bad").code == 0
