"""Models compared: a picture, and beside it a web page with the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinygpt2.config.evaluation import CONVENTION_NOTES, PplConfig
from tinygpt2.evaluation.results import Paired, PplResult, PplRow, short_names
from tinygpt2.utils.charts import Chart, Series
from tinygpt2.utils.html_report import chart_section, paragraphs, settings_section, table_section, write_page
from tinygpt2.utils.plotting import draw


def plot_comparison(result: PplResult, config: PplConfig) -> None:
    """Draw the result as the PNG that --plot names, and write a page of the same name that ends in .html beside it.

    If --plot itself ends in .html, only the page is written.
    """
    path = Path(config.plot or "")
    rows = result.results
    charts = comparison_charts(rows)
    title = f"zero-shot perplexity, convention {rows[0].convention}"
    page = path if path.suffix.lower() == ".html" else path.with_name(f"{path.stem}.html")
    if page != path:
        draw(charts, path, title)
    settings = {**config.model_dump(exclude={"model", "task", "plot", "csv", "markdown", "list_tasks"})}
    write_page(page, title, [
        paragraphs(f"{CONVENTION_NOTES[rows[0].convention]}."),
        table_section("Models", *_table(rows)),
        table_section("Differences between models", *_differences(result.paired)),
        chart_section("Charts", charts),
        settings_section("Settings", {key: value for key, value in settings.items() if value is not False}),
    ])  # fmt: skip


def comparison_charts(rows: Sequence[PplRow]) -> list[Chart]:
    """Return charts of perplexity, one point for each model: against parameters, and then against speed.

    There is no chart of the speed on a task in which only some tokens are predicted (LAMBADA, CBT), because its
    tokens/s counts only those.
    """
    tasks = short_names([row.task for row in rows])
    names = short_names([row.model for row in rows])
    by_task = {task: [row for row in rows if row.task == task] for task in dict.fromkeys(row.task for row in rows)}
    charts = []
    for key, label in (("parameters", "parameters"), ("tokens_per_second", "tokens per second, measured here")):
        for task, found in by_task.items():
            if key != "parameters" and any(row.accuracy is not None for row in found):
                continue
            ordered = sorted(found, key=lambda row: (row.parameters, row.perplexity))
            series = [Series(names[row.model], [(getattr(row, key), row.perplexity)]) for row in ordered]
            y = f"perplexity per {found[0].unit}"
            charts.append(Chart(tasks[task], label, y, series, joined=False, log=True))
    return charts


def _table(rows: Sequence[PplRow]) -> tuple[list[str], list[list[str]], str]:
    """Return the headings and cells of the table, and a note below it."""
    tasks, names = short_names([row.task for row in rows]), short_names([row.model for row in rows])
    several = len(tasks) > 1
    headings = [
        "model",
        *["task"] * several,
        "parameters",
        "perplexity",
        "loss (nats/token)",
        "bits per byte",
        "tokens/s",
    ]
    cells = [
        [
            names[row.model],
            *[tasks[row.task]] * several,
            f"{row.parameters:,}",
            f"{row.perplexity:,.2f} per {row.unit}",
            f"{row.loss:.4f}" + (f" ± {row.stderr:.4f}" if row.stderr is not None else ""),
            f"{row.bits_per_byte:.4f}",
            f"{row.tokens_per_second:,.0f}",
        ]
        for row in rows
    ]
    sizes = {tasks[row.task]: f"{row.words:,} words, {row.bytes:,} bytes" for row in rows}
    texts = "; ".join(f"{name}: {size}" for name, size in sizes.items())
    return headings, cells, f"Texts: {texts}. The number after ± is the standard error over windows."


def _differences(paired: Sequence[Paired]) -> tuple[list[str], list[list[str]], str]:
    """Return headings and cells of the differences of each pair of models, and a note below them."""
    names = short_names([name for pair in paired for name in (pair.a, pair.b)])
    tasks = short_names([pair.task for pair in paired])
    cells = [
        [
            f"{names[pair.a]} - {names[pair.b]}",
            tasks[pair.task],
            "different tokens"
            if pair.difference is None
            else f"{pair.difference:+.4f}" + (f" ± {pair.stderr:.4f}" if pair.stderr is not None else ""),
        ]
        for pair in paired
    ]
    note = "A negative difference means that the first model predicts better. The number after ± is its standard error."
    return ["models", "task", "difference of the losses (nats/token)"], cells, note
