"""The result of `evaluate-text` as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tinygpt2.cli.output.live_text import render_statistics
from tinygpt2.cli.output.tables import Column, print_note, print_table

if TYPE_CHECKING:
    from rich.console import Console

_NOTE = (
    "judged: loss of the judge on what the model wrote; loss: of the model on the true continuations; judge: of the "
    "judge on the same; nats per token, ± standard error over prompts. excess: by how much KL(judge || model) is "
    "larger after the model's own tokens than after those of the data"
)


def render_text_evaluation(result: Any, console: Console) -> None:
    """Print losses, statistics of the texts, and the excess error by the number of tokens."""
    from tinygpt2.evaluation.results import short_names

    rows, names = result.results, short_names([one.model for one in result.results])
    columns = [
        Column("model", [names[one.model] for one in rows], left=True),
        Column("prompts", [str(one.prompts) for one in rows], rank=1),
        Column("judged", _figures((one.judged_loss, one.judged_stderr) for one in rows)),
        Column("loss", _figures((one.loss, one.stderr) for one in rows)),
        Column("judge", _figures((one.judge_loss, one.judge_stderr) for one in rows)),
    ]
    if any(one.rouge_l is not None for one in rows):
        columns.append(Column("ROUGE-L", _figures((one.rouge_l, one.rouge_l_stderr) for one in rows)))
    print_table(columns, console)
    console.print()
    render_statistics({names[one.model]: one.statistics for one in rows}, console)
    console.print()
    marks = sorted({point.tokens for one in rows for point in one.excess})
    found = [{point.tokens: f"{point.excess:+.1%}" for point in one.excess} for one in rows]
    print_table(
        [
            Column("excess", [names[one.model] for one in rows], left=True),
            *(Column(f"{mark} tokens", [known.get(mark, "-") for known in found]) for mark in marks),
        ],
        console,
    )
    print_note(_NOTE, console)


def _figures(pairs: Iterable[tuple[float | None, float | None]]) -> list[str]:
    return [
        "-" if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
        for value, error in pairs
    ]
