"""Charts that compare models: which there are, what they hold, and that everything lies inside the axes."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from tests.utils.test_charts import Page
from tinygpt2 import Paired, PplConfig, PplResult, PplRow
from tinygpt2.evaluation.plots import comparison_charts, plot_comparison
from tinygpt2.utils.plotting import plot_may_fail

TASKS = ("wikitext", "lambada", "/texts/Hound.txt")


def row(number: int, task: str) -> PplRow:
    figures = dict.fromkeys(("loss", "bits_per_character", "bits_per_byte", "byte_perplexity", "word_perplexity"), 1.0)
    sizes = dict.fromkeys(("units", "tokens", "words", "characters", "bytes"), 1000)
    accuracy = 0.5 if task == "lambada" else None
    return PplRow(
        model=f"/home/me/models/model-{number}", task=task, convention="hf", perplexity=90.0 + number % 3, stderr=0.1,
        accuracy=accuracy, accuracy_without_stop_words=None, unit="token", stride=None, seconds=1.0, source="here",
        tokens_per_second=1000.0 / (number + 1), parameters=1_000_000 * (1 + number // 2), **figures, **sizes,
    )  # fmt: skip


def result(models: int, tasks: tuple[str, ...]) -> PplResult:
    rows = [row(number, task) for task in tasks for number in range(models)]
    paired = [
        Paired(row(a, task).model, row(b, task).model, task, None if task == "lambada" else 0.25, 0.05)
        for task in tasks
        for a, b in combinations(range(models), 2)
    ]
    return PplResult(rows, paired)


@pytest.mark.parametrize("models", [1, 2, 5, 8])
@pytest.mark.parametrize("tasks", [TASKS[:1], TASKS])
def test_charts_pictures_and_pages(models: int, tasks: tuple[str, ...], tmp_path: Path) -> None:
    made = result(models, tasks)
    charts = comparison_charts(made.results)
    expected = ["wikitext, by parameters", "lambada, by parameters", "Hound.txt, by parameters", "wikitext, by speed",
                "Hound.txt, by speed"]  # fmt: skip
    assert [chart.title for chart in charts] == (expected if len(tasks) > 1 else expected[::3])
    for chart in charts:
        assert not chart.joined
        assert sorted(one.name for one in chart.series) == sorted(f"model-{number}" for number in range(models))
        points = [point for one in chart.series for point in one.points]
        assert all(chart.x_range()[0] < x < chart.x_range()[1] for x, _ in points)
        assert all(chart.y_range()[0] < y < chart.y_range()[1] for _, y in points)
    sizes = [one.points[0][0] for one in charts[0].series]
    assert sizes == sorted(sizes)
    plot_comparison(made, PplConfig(task=list(tasks), plot=str(tmp_path / "a.png")))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("figure")) == len(charts)
    cells = page.said("td")
    pairs = models * (models - 1) // 2 * sum(task != "lambada" for task in tasks)
    assert (cells.count("+0.2500 ± 0.0500"), cells.count("-0.2500 ± 0.0500")) == (pairs, pairs)
    assert ("different tokens" in cells) == (models > 1 and "lambada" in tasks)
    assert "/home/me" not in text
    assert ("accuracy" in page.said("th")) == ("lambada" in tasks)
    assert cells.count("50.00%") == models * ("lambada" in tasks)


def test_what_cannot_be_drawn_is_left_out_and_loses_nothing(tmp_path: Path) -> None:
    """A perplexity per word can be infinite where a text has no spaces."""
    rows = [replace(row(0, "novel"), perplexity=math.inf), row(1, "novel")]
    assert [[one.name for one in chart.series] for chart in comparison_charts(rows)] == [["model-1"]] * 2
    plot_comparison(PplResult(rows[:1], []), PplConfig(task=["novel"], plot=str(tmp_path / "a.png")))
    assert (tmp_path / "a.html").is_file()
    with plot_may_fail("b.png"):
        raise OSError(28, "No space left on device")
