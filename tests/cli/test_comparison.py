"""The table of `ppl` at several widths, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tinygpt2 import PplConfig
from tinygpt2.cli.app import asks_for_json
from tinygpt2.cli.output.comparison import Comparison, as_csv, as_markdown, render_ppl
from tinygpt2.cli.output.tables import Column, fitted, print_note, print_table, total_width
from tinygpt2.errors import ConfigError
from tinygpt2.evaluation.results import Paired, PplResult, PplRow

MODELS = ["/r/novels-6x256", "/r/cut", "/r/student", "/r/random", "/q/student", "/r/m5", "/r/m6", "/r/m7"]
TASKS = ["wikitext", "lambada", "/t/corpus/Doyle_Hound_1902.txt"]


def row(model: str, task: str, loss: float) -> PplRow:
    word = 0.4123 if task == "lambada" else None
    return PplRow(
        model=model, task=task, convention="hf", perplexity=math.exp(loss), loss=loss, stderr=0.0121,
        bits_per_character=2.1, bits_per_byte=2.0, byte_perplexity=4.0, word_perplexity=1234.5, accuracy=word,
        accuracy_without_stop_words=word, unit="token", units=400, tokens=12345 if word is None else 400, words=9000,
        characters=52000, bytes=52100, stride=256, seconds=3.0, tokens_per_second=2198.4,
        parameters=6_900_000 // (1 + MODELS.index(model)), source=f"/t/{task}",
    )  # fmt: skip


def result(models: int, tasks: int) -> PplResult:
    rows = [row(model, task, 4.5 + 0.1 * at) for at, model in enumerate(MODELS[:models]) for task in TASKS[:tasks]]
    loss = {(one.model, one.task): one.loss for one in rows}
    paired = [
        Paired(a, b, task, loss[a, task] - loss[b, task], 0.0011)
        for task in TASKS[:tasks]
        for a, b in combinations(MODELS[:models], 2)
    ]
    return PplResult(rows, paired)


def printed(what: PplResult, width: int, *, terminal: bool = True) -> list[str]:
    file = io.StringIO()
    render_ppl(what, Console(file=file, width=width, force_terminal=terminal, color_system=None, highlight=False))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("models", "tasks"), [(1, 1), (3, 1), (3, 2), (1, 3), (8, 3)])
def test_the_table_fits_the_window(models: int, tasks: int, width: int) -> None:
    lines = printed(result(models, tasks), width)
    assert max(len(line.rstrip()) for line in lines) <= width
    shown = Comparison(result(models, tasks))
    heads = [at for at, line in enumerate(lines) if "perplexity " in line and "bits/byte" in line]
    assert len(heads) == (1 if models == 1 else tasks)
    for name in shown.models.values() if models > 1 else []:
        assert sum(line.startswith(f"{name} ") for line in lines) >= tasks
    assert any("accuracy" in line for line in lines) == (tasks > 1)


def test_models_of_one_name_are_told_apart() -> None:
    assert list(Comparison(result(5, 1)).models.values()) == ["novels-6x256", "cut", "r/student", "random", "q/student"]


def test_what_all_rows_share_is_in_the_caption() -> None:
    lines = printed(result(3, 2), 120)
    assert lines[0] == "perplexity per token on wikitext, 12,345 targets, convention hf, stride 256"
    assert "targets" not in lines[1]
    one = printed(result(1, 3), 200)
    assert one[0] == "perplexity per token of novels-6x256 (6.9M parameters), convention hf, stride 256"
    assert one[1].split()[-1] == "targets"  # differ from task to task


def test_differences_from_the_first_model_and_of_all_pairs() -> None:
    lines = printed(result(3, 1), 80)
    student = next(line for line in lines if line.startswith("student"))
    assert "+0.2000 ± 0.0011" in student
    assert "2.3M  33%" in student
    matrix = lines[next(at for at, line in enumerate(lines) if line.startswith("loss of the row's")) + 1 :]
    assert matrix[0].split() == ["novels-6x256", "cut"]
    assert matrix[2].split("  ")[-1].strip() == "+0.1000 ± 0.0011"
    assert not any("loss of the row's" in line for line in printed(result(8, 1), 80))  # is too wide
    assert not any("loss of the row's" in line for line in printed(result(2, 1), 200))  # says nothing new


def test_models_that_cannot_be_compared() -> None:
    both = result(2, 1)
    apart = PplResult(both.results, [Paired(MODELS[0], MODELS[1], TASKS[0], None, None)])
    lines = printed(apart, 80)
    assert next(line for line in lines if line.startswith("cut")).split()[2] == "n/a"
    assert any(line.startswith("n/a: the models predict different tokens") for line in lines)
    assert as_csv(apart).splitlines()[2].endswith(",,,,")


def test_lines_of_pipes_are_at_most_200_characters() -> None:
    lines = printed(result(8, 3), 200, terminal=False)
    assert max(map(len, lines)) <= 200
    assert not any("not shown" in line for line in printed(result(3, 1), 200, terminal=False))


def test_csv_has_all_pairs() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(result(3, 2)))))
    assert [one["model"] for one in rows] == [model for model in MODELS[:3] for _ in range(2)]
    assert float(rows[4]["above cut"]) == pytest.approx(0.1)
    assert float(rows[0]["above student"]) == pytest.approx(-0.2)
    assert rows[0]["above novels-6x256"] == ""
    assert rows[2]["above student, stderr"] == "0.0011"
    assert "above" not in as_csv(result(1, 2)).splitlines()[0]


def test_markdown_names_task_and_model_in_each_row() -> None:
    lines = as_markdown(result(3, 2)).splitlines()
    assert lines[0].startswith("| task | model | perplexity |")
    assert [line.split(" | ")[0] for line in lines[2:8]] == ["| wikitext"] * 3 + ["| lambada"] * 3
    assert {line.count("|") for line in lines[:8]} == {lines[0].count("|")}


def test_the_least_important_columns_go_first() -> None:
    columns = [Column("a", ["x" * 10]), Column("b", ["y" * 10], 1), Column("c", ["z" * 10], 3), Column("d", ["w"], 2)]
    assert [column.heading for column in fitted(columns, 40)] == ["a", "b", "c", "d"]
    assert [column.heading for column in fitted(columns, 36)] == ["a", "b", "d"]
    assert [column.heading for column in fitted(columns, 5)] == ["a"]
    assert total_width(columns) == 31 + 6
    file = io.StringIO()
    print_table([Column("name", ["一二三 " + "x" * 300], left=True)], Console(file=file, width=200))
    assert "x" * 300 in file.getvalue()  # in a pipe, nothing is cut


def test_notes_break_between_words() -> None:
    file = io.StringIO()
    print_note("a-b " * 60 + "/path/" + "x" * 90, Console(file=file, width=80), indent="  ")
    lines = file.getvalue().splitlines()
    assert all(len(line) <= 80 or "/path/" in line for line in lines)
    assert "".join(lines).replace(" ", "") == "a-b" * 60 + "/path/" + "x" * 90


@pytest.mark.parametrize(
    ("values", "format_"),
    [({}, "table"), ({"csv": True}, "csv"), ({"markdown": True}, "md"), ({"output_format": "json"}, "json"),
     ({"csv": True, "output_format": "csv"}, "csv"), ({"csv": False, "output_format": "md"}, "md"),
     ({"csv": "true"}, "csv")],
)  # fmt: skip
def test_the_old_switches_are_short_forms(values: dict, format_: str) -> None:
    config = PplConfig(task=["x"], **values)
    assert config.output_format == format_
    again = yaml.safe_load(config.to_yaml())
    assert (again["output_format"], "csv" in again, "markdown" in again) == (format_, False, False)
    assert PplConfig(**again) == config.model_copy(update={"csv": False, "markdown": False})


@pytest.mark.parametrize(
    "values", [{"csv": True, "markdown": True}, {"csv": True, "output_format": "md"}, {"csv": True, "list_tasks": True}]
)
def test_formats_that_contradict(values: dict) -> None:
    with pytest.raises(ConfigError):
        PplConfig(**{"task": ["x"], **values})


def test_the_format_of_the_command_line_and_of_files(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("task: x\ncsv: true\n")

    def chosen(*arguments: str) -> str:
        return yaml.safe_load(cli("ppl", "--config", file, *arguments, "--print-config").out)["output_format"]

    assert chosen() == "csv"
    assert chosen("--markdown") == chosen("--output-format", "md") == "md"
    assert chosen("--json") == "json"
    assert chosen("--no-csv") == "table"
    wrong = cli("ppl", "--task", "x", "--csv", "--json")
    assert wrong.code == 2
    assert wrong.json["error"]["message"] == "--csv, --json cannot be combined: give one of them"
    failed = cli("ppl", "--model", tmp_path / "nowhere", "--task", file, "--output-format", "json")
    assert failed.json["error"]["code"] == failed.code == 4
    assert cli("ppl", "--list-tasks", "--output-format=json").json["tasks"]
    assert not asks_for_json(["ppl", "--output-format", "csv"])
