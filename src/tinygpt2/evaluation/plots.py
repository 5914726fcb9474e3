"""Models compared: a picture, and beside it a web page with the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tinygpt2.config.evaluation import CONVENTION_NOTES, FIDELITY_NOTE, OTHER_TOKENS_NOTE, PplConfig
from tinygpt2.evaluation.results import Paired, PplResult, PplRow, short_names
from tinygpt2.utils.charts import Chart, Series
from tinygpt2.utils.html_report import chart_section, paragraphs, settings_section, table_section, write_page
from tinygpt2.utils.plotting import draw
from tinygpt2.utils.units import percent


def plot_comparison(result: PplResult, config: PplConfig) -> None:
    """Draw the result as the PNG that --plot names, and write a page of the same name that ends in .html beside it.

    If --plot itself ends in .html, only the page is written.
    """
    path = Path(config.plot or "")
    rows = result.results
    charts, tasks = comparison_charts(rows) + fidelity_charts(rows), short_names([row.task for row in rows])
    title = f"zero-shot perplexity, convention {rows[0].convention}"
    page = path if path.suffix.lower() == ".html" else path.with_name(f"{path.stem}.html")
    if page != path:
        draw(charts, path, title)
    shown = ("reference", "convention", "stride", "batch_size", "precision", "task_data")
    settings = {key: getattr(config, key) for key in shown}
    write_page(page, title, [
        paragraphs(f"{CONVENTION_NOTES[rows[0].convention]}."),
        table_section("Models", *_table(rows)),
        _fidelity_table(rows),
        chart_section("Charts", charts),
        *(_differences(task, name, result.paired) for task, name in tasks.items() if result.paired),
        settings_section("Settings", settings),
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
    for key, label in (("parameters", "parameters"), ("tokens_per_second", "tokens per second")):
        for task, found in by_task.items():
            if key != "parameters" and any(row.accuracy is not None for row in found):
                continue
            ordered = sorted(found, key=lambda row: (row.parameters, row.perplexity))
            series = [
                Series(names[row.model], [(getattr(row, key), row.perplexity)])
                for row in ordered
                if math.isfinite(row.perplexity)
            ]
            if not series:
                continue
            y = f"perplexity per {found[0].unit}"
            title = f"{tasks[task]}, by {'parameters' if key == 'parameters' else 'speed'}"
            charts.append(Chart(title, label, y, series, joined=False, log=True))
    return charts


def fidelity_charts(rows: Sequence[PplRow]) -> list[Chart]:
    """Return charts of KL and agreement: by position in the window and by the reference's confidence, for each task."""
    tasks, names = short_names([row.task for row in rows]), short_names([row.model for row in rows])
    charts = []
    for task, name in tasks.items():
        found = sorted((row for row in rows if row.task == task), key=lambda row: (row.parameters, row.perplexity))
        compared = [(names[row.model], row.fidelity) for row in found if row.fidelity is not None]
        for parts, x in (
            ("by_position", "position in the window"),
            ("by_confidence", "probability of the reference's likeliest token"),
        ):
            for key, y in (("kl", "KL (nats per token)"), ("same_top", "share with the same likeliest token")):
                series = [
                    Series(model, [((part.low + part.high) / 2, getattr(part, key)) for part in getattr(one, parts)])
                    for model, one in compared
                ]
                if series:
                    charts.append(
                        Chart(f"{name}: {'KL' if key == 'kl' else 'agreement'} {parts.replace('_', ' ')}", x, y, series)
                    )
    return charts


def _fidelity_table(rows: Sequence[PplRow]) -> str:
    """Return the comparison with the reference as a table; nothing if there is no reference."""
    tasks, names = short_names([row.task for row in rows]), short_names([row.model for row in rows])
    compared = [(row, row.fidelity) for row in rows if row.fidelity is not None]
    if not compared:
        return ""
    headings = ["model", "task", "KL", "median", "99 %", "reverse KL", "same top", "acceptance", "loss above",
                "calibration", "its own", "compared", "in lumps"]  # fmt: skip
    cells = [
        [
            names[row.model], tasks[row.task], f"{one.kl:.4f}" + (f" ± {one.stderr:.4f}" if one.stderr else ""),
            f"{one.kl_median:.4f}", f"{one.kl_p99:.3f}",
            "-" if one.reverse_kl is None else f"{one.reverse_kl:.4f}", f"{one.same_top:.2%}",
            f"{one.acceptance:.2%}", f"{one.loss_difference:+.4f}", f"{one.calibration_error:.2%}",
            f"{one.reference_calibration_error:.2%}", f"{one.compared}, {one.share:.1%}",
            f"{one.lumped:.2%}" if one.compared == "events" else "-",
        ]
        for row, one in compared
    ]  # fmt: skip
    reference = short_names([compared[0][1].reference]).popitem()[1]
    note = f"{FIDELITY_NOTE}; its own: the reference's."
    if any(one.compared != "tokens" for _, one in compared):
        note += f" {OTHER_TOKENS_NOTE.capitalize()}."
    return table_section(f"Fidelity to {reference}", headings, cells, note)


def _table(rows: Sequence[PplRow]) -> tuple[list[str], list[list[str]], str]:
    """Return the headings and cells of the table, and a note below it."""
    tasks, names = short_names([row.task for row in rows]), short_names([row.model for row in rows])
    several, accuracies = len(tasks) > 1, _accuracies(rows)
    headings = ["model", *["task"] * several, "parameters", *(name for name, _ in accuracies)]
    headings += ["perplexity", "loss (nats/token)", "bits per byte", "tokens/s"]
    cells = [
        [
            names[row.model],
            *[tasks[row.task]] * several,
            f"{row.parameters:,}",
            *(text(row) for _, text in accuracies),
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


def _accuracies(rows: Sequence[PplRow]) -> list[tuple[str, Callable[[PplRow], str]]]:
    """Return the headings and texts of the shares of right answers that any row has."""
    every: list[tuple[str, Callable[[PplRow], str]]] = [
        ("accuracy", lambda row: percent(row.accuracy, row.accuracy_stderr)),
        ("normalised accuracy", lambda row: percent(row.accuracy_norm, row.accuracy_norm_stderr)),
    ]
    return [(heading, text) for heading, text in every if any(text(row) != "-" for row in rows)]


def _differences(task: str, name: str, paired: Sequence[Paired]) -> str:
    """Return the differences on one task as a matrix: the loss of the row's model minus that of the column's."""
    pairs = {(pair.a, pair.b): pair for pair in paired if pair.task == task}
    models = short_names([name for pair in paired for name in (pair.a, pair.b)])
    rows = [[models[a], *(_difference(pairs, a, b) for b in models)] for a in models]
    note = (
        "Loss of the row's model minus that of the column's, in nats per token, or in bits per byte where they predict "
        "different tokens, with its standard error: a negative number means the row's is better."
    )
    return table_section(f"Differences on {name}", ["", *models.values()], rows, note)


def _difference(pairs: dict[tuple[str, str], Paired], a: str, b: str) -> str:
    pair, sign = (pairs[a, b], 1) if (a, b) in pairs else (pairs.get((b, a)), -1)
    if pair is None:
        return "-"
    value, error, unit = pair.difference, pair.stderr, ""
    if value is None:
        value, error, unit = pair.bits_per_byte, pair.bits_per_byte_stderr, " bits per byte"
    if value is None:
        return "different tokens"
    return f"{sign * value:+.4f}" + (f" ± {error:.4f}" if error is not None else "") + unit
