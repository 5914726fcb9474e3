"""What `quickstart` returns, and its report as Markdown and as a web page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tinygpt2.data.corpus.sources import PYTHON_DOCS
from tinygpt2.utils.charts import Chart
from tinygpt2.utils.files import write_text
from tinygpt2.utils.html_report import (
    REPORT,
    chart_section,
    link_section,
    paragraphs,
    settings_section,
    table_section,
    text_section,
    write_page,
)
from tinygpt2.utils.plotting import draw
from tinygpt2.workflows.curves import CURVES, compared_runs

MARKDOWN = "report.md"
PROMPT = "The following example shows how to"
RUNS = ("teacher", "student", "baseline-truncated", "baseline-random")
"""The directories of the training runs; the cut itself is in `CUT`."""
CUT = "truncated"
_HEADINGS = ("model", "held-out perplexity", "layers", "parameters", "on disk", "greedy tokens/s")


@dataclass(frozen=True)
class QuickstartSizes:
    """Sizes of the run; with the defaults it takes a few minutes on two cores."""

    vocab_size: int = 2048
    sequence_length: int = 128
    n_layer: int = 4
    n_embd: int = 160
    n_head: int = 5
    student_layers: int = 1
    teacher_tokens: int = 900_000
    student_tokens: int = 100_000
    batch_size: int = 4
    learning_rate: float = 2e-3
    new_tokens: int = 60
    source: str = PYTHON_DOCS


@dataclass(frozen=True)
class ModelSummary:
    """One row of the report's table.

    Attributes:
        bytes: the size of the weights on disk.
        tokens_per_second: the speed of greedy decoding, the best of several runs in turns. Models of the same shape
            share one figure, because they differ only by noise.
        sample: a generated text that continues `PROMPT`.
    """

    model: str
    layers: int
    parameters: int
    perplexity: float
    bytes: int
    tokens_per_second: float
    sample: str


@dataclass(frozen=True)
class Gain:
    """How much lower the student's held-out loss is than another model's, and the standard error, in nats per token.

    Both models predict the same tokens; the standard error is that of the paired difference over the blocks.
    """

    loss: float
    stderr: float | None


@dataclass(frozen=True)
class QuickstartResult:
    """The models that `quickstart` trained, with their measurements.

    Attributes:
        cut: the student before its training.
        baselines: `truncated` started from the same weights as the student, `random` from random ones.
        gains: of the student over `cut`, `truncated` and `random`.
        seconds: the time of all stages.
        report: the path of report.md; report.html is beside it.
    """

    teacher: ModelSummary
    student: ModelSummary
    cut: ModelSummary
    baselines: dict[str, ModelSummary]
    gains: dict[str, Gain]
    seconds: float
    report: str

    @property
    def summary(self) -> str:
        """The text of the report."""
        return Path(self.report).read_text(encoding="utf-8")

    @property
    def rows(self) -> dict[str, ModelSummary]:
        """The models by the names that the report gives them."""
        return {
            "teacher": self.teacher,
            "student (distilled)": self.student,
            "cut, before training": self.cut,
            "baseline: same cut, text only": self.baselines["truncated"],
            "baseline: random start, text only": self.baselines["random"],
        }


def write_reports(result: QuickstartResult, scale: QuickstartSizes, place: str, card: tuple[float, int] | None) -> None:
    """Write report.md, report.html and curves.png.

    Args:
        place: the directory of the results as the user typed it.
        card: the cut's perplexity in its own model card, and on how many blocks it was measured.
    """
    out = Path(result.report).parent
    charts, notes = _charts(result, out), [" ".join(_gains(result)), *_notes(result, card)]
    draw(charts, out / CURVES)
    write_text(out / MARKDOWN, _markdown(result, scale, notes, place))
    cells = [[name, *_cells(row)] for name, row in result.rows.items()]
    write_page(out / REPORT, "quickstart", [
        paragraphs(*_story(scale)),
        table_section("Models", _HEADINGS, cells, *notes),
        chart_section("Held-out loss", charts),
        text_section("Samples (temperature 0.8, top-p 0.9)", PROMPT, {k: row.sample for k, row in result.rows.items()}),
        link_section("Reports of the training runs", _links(out)),
        settings_section("Settings", asdict(scale)),
    ])  # fmt: skip


def _links(out: Path) -> dict[str, str]:
    """Return the reports of the training runs; those of older versions have none."""
    return {name: f"{name}/{REPORT}" for name in RUNS if (out / name / REPORT).is_file()}


def _charts(result: QuickstartResult, out: Path) -> list[Chart]:
    """Return the charts of the held-out loss: what starts from the cut beside the cut and the teacher."""
    levels = {"cut, before training": result.cut, "teacher": result.teacher}
    losses = {name: math.log(row.perplexity) for name, row in levels.items()}
    start = {"distilled": out / RUNS[1], "text only": out / RUNS[2]}
    return [
        compared_runs(start, losses, "student and baseline from the same cut"),
        compared_runs({"random start": out / RUNS[3]}, {}, "baseline from random weights"),
        compared_runs({"teacher": out / RUNS[0]}, {}, "teacher"),
    ]


def _cells(row: ModelSummary) -> list[str]:
    size, speed = f"{row.bytes / 1e6:.1f} MB", f"{row.tokens_per_second:,.0f}"
    return [f"{row.perplexity:.2f}", str(row.layers), f"{row.parameters:,}", size, speed]


def _story(scale: QuickstartSizes) -> list[str]:
    return [
        "This run trained four models on Python's documentation.",
        f"The teacher was trained on {scale.teacher_tokens:,} tokens. The student was cut from the teacher "
        f"({scale.student_layers} of its {scale.n_layer} layers) and then distilled on {scale.student_tokens:,} "
        "tokens.",
        "Two baselines have the student's shape, but learned from the text alone, without the teacher. They saw the "
        "same tokens as the student, with the same optimizer, learning rate and schedule.",
    ]


def _gains(result: QuickstartResult) -> Iterator[str]:
    """Yield sentences that say what distillation gained."""
    others = {
        "cut": "that of the cut before training",
        "truncated": "that of the baseline with the same cut that learned from the text alone",
    }
    for name, other in others.items():
        gain = result.gains[name]
        error = f" ± {gain.stderr:.4f}" if gain.stderr is not None else ""
        more = "lower" if gain.loss >= 0 else "higher"
        unclear = gain.stderr is not None and abs(gain.loss) < 2 * gain.stderr
        yield (
            f"The student's held-out loss is {abs(gain.loss):.4f}{error} nats per token {more} than {other}"
            f"{', which is no clear difference' if unclear else ''}."
        )
    before, after = result.cut.perplexity, result.baselines["truncated"].perplexity
    if after > before:
        yield f"Learning from the text alone made the cut worse: its perplexity went from {before:.2f} to {after:.2f}."


def _notes(result: QuickstartResult, card: tuple[float, int] | None) -> Iterator[str]:
    """Yield sentences about how the figures were measured."""
    yield (
        "The number after ± is the standard error of the paired difference over the held-out blocks. Lower loss and "
        "perplexity are better. All models were measured on all held-out documents, which were not used for "
        f"training. All stages together took {result.seconds:.0f} seconds."
    )
    if card is not None and f"{card[0]:.2f}" != f"{result.cut.perplexity:.2f}":
        yield (
            f"{CUT}/README.md gives {card[0]:.2f} as the cut's perplexity, because it was measured on only {card[1]} "
            "of the held-out blocks."
        )
    yield (
        "Tokens/s is the best of several runs in which the models took turns. Models of the same shape share one "
        "figure, because they differ only by noise."
    )


def _markdown(result: QuickstartResult, scale: QuickstartSizes, notes: list[str], place: str) -> str:
    table = [_HEADINGS, ["---"] * len(_HEADINGS), *([name, *_cells(row)] for name, row in result.rows.items())]
    samples = [f"**{name}**\n\n> {' '.join((PROMPT + row.sample).split())}\n" for name, row in result.rows.items()]
    paragraphs_, out = "\n\n".join, Path(place)
    student, length = out / RUNS[1], scale.sequence_length
    return f"""# quickstart

{paragraphs_(_story(scale))}

{chr(10).join(f"| {' | '.join(line)} |" for line in table)}

{paragraphs_(notes)}

![held-out loss of the four runs]({CURVES})

The same figures with curves that show their values under the pointer: [{REPORT}]({REPORT}).

## Samples (temperature 0.8, top-p 0.9)

{chr(10).join(samples)}
## What to try next

Try the student with your own prompts:

    tinygpt2 generate --model {student} --interactive

Distil this teacher on your own text (a file, a directory or .jsonl):

    tinygpt2 pregenerate my-texts/ --tokenizer {out / "tokenizer"} --sequence-length {length} --out my-data
    tinygpt2 distill --teacher {out / RUNS[0]} --student {out / CUT} --data my-data --out my-student

Use GPT-2 itself as the teacher (`gpt2` is loaded from the Hub; offline, give a local directory instead):

    tinygpt2 pregenerate my-texts/ --tokenizer gpt2 --out gpt2-data
    tinygpt2 truncate-student --teacher gpt2 --num-layers 6 --refit --data gpt2-data --out gpt2-cut
    tinygpt2 distill --teacher gpt2 --student gpt2-cut --data gpt2-data --out gpt2-small
"""
