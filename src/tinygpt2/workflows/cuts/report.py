"""The model card, the picture and the page of a search for a target."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tinygpt2.compression.sizes import Shape
from tinygpt2.config.compression import TruncateStudentConfig
from tinygpt2.models.card import cut_metadata, model_card
from tinygpt2.utils.charts import Chart, Series
from tinygpt2.utils.files import shared_name
from tinygpt2.utils.html_report import (
    REPORT,
    chart_section,
    paragraphs,
    settings_section,
    table_section,
    write_page,
)
from tinygpt2.utils.plotting import draw
from tinygpt2.utils.units import duration, size
from tinygpt2.workflows.cuts.results import CutCandidate, CutSearchResult, CutVocabulary
from tinygpt2.workflows.cuts.scoring import CutScore

PICTURE = "front.png"


def search_card(config: TruncateStudentConfig, result: CutSearchResult, commit: str | None) -> str:
    """Return the model card of a student that was searched for."""
    figures = {
        "parameters": f"{result.parameters:,}",
        "teacher's parameters": f"{result.teacher_parameters:,}",
        "target": result.target,
        "blocks kept (counted from 0)": ", ".join(map(str, result.layers)),
        "hidden size, heads, inner units": f"{result.n_embd}, {result.n_head}, {result.n_inner}",
        "tokens": f"{result.vocab_size:,}",
        f"milliseconds for {time_unit(result)}, decoded alone": (
            f"{result.milliseconds:.3g} (teacher {result.teacher_milliseconds:.3g})"
        ),
        "distillation since the cut": f"{result.steps} steps, {result.tokens:,} tokens",
        f"loss above the teacher's ({result.unit})": f"{result.score.loss:.4f}",
    }
    if result.vocabularies is not None:
        figures["vocabularies that were looked at"] = ", ".join(map(described_vocabulary, result.vocabularies))
    if commit is not None:
        figures["revision of the teacher"] = commit
    if result.score.speedup is not None:
        figures["share of drafted tokens that the teacher accepts"] = f"{result.score.acceptance:.1%}"
        figures["expected speedup as the teacher's draft"] = f"{result.score.speedup:.2f}"
    if (perplexity := result.perplexity) is not None:
        figures["held-out perplexity"] = f"{perplexity.student:,.2f} (teacher {perplexity.teacher:,.2f})"
        figures["measured on"] = perplexity.described(config)
    if (bits := result.bits_per_byte) is not None:
        figures["held-out bits per byte"] = f"{bits.student:.4f} (teacher {bits.teacher:.4f}, on the same bytes)"
        figures["measured on"] = f"{bits.sequences} blocks of the test split of {shared_name(config.data or '')}"
    plural = "" if len(result.layers) == 1 else "s"
    rounds = result.rounds
    several = rounds is not None and rounds.several is result.score
    how = (
        f"A GPT-2 with {len(result.layers)} layer{plural} and hidden size {result.n_embd}, cut from "
        f"{shared_name(config.teacher)}"
        + (f" in {rounds.rounds} rounds" if rounds is not None and several else "")
        + f" and distilled for {result.steps} steps. It is the best of {len(result.candidates)} shapes for the target "
        f"{result.target}; {REPORT} compares them."
    )
    metadata = cut_metadata(config, commit, None if perplexity is None else perplexity.student)
    return model_card(Path(config.out).name, how, figures, f"truncate-student {config.flags(shared=True)}", metadata)


def described(shape: Shape) -> str:
    """Return a shape in words."""
    return f"{shape.n_layer} x {shape.n_embd}, {shape.n_head} heads, {shape.n_inner} inner"


def described_vocabulary(one: CutVocabulary) -> str:
    """Return a vocabulary in words."""
    return f"{one.vocab_size:,} ({one.tokens_per_byte:.3f} tokens per byte)"


def time_unit(result: CutSearchResult) -> str:
    """Return what all times of a search are for."""
    return "a token" if result.vocabularies is None else "the text of one of the teacher's tokens"


def write_pictures(config: TruncateStudentConfig, result: CutSearchResult) -> None:
    """Write the front as a picture, and beside it a page with the table of all candidates."""
    out, title = Path(config.out), f"Students of {shared_name(config.teacher)} for {result.target}"
    charts = front_charts(result)
    draw(charts, out / PICTURE, title)
    rounds = result.rounds
    write_page(out / REPORT, title, [
        paragraphs(
            f"{len(result.candidates)} shapes were looked at in {duration(result.seconds)}. The student has "
            f"{len(result.layers)} layers, hidden size {result.n_embd}, {result.n_head} heads, {result.n_inner} "
            f"inner units and {result.vocab_size:,} tokens. Losses are {result.unit} above the teacher's on the same "
            "text.",
            "" if result.vocabularies is None else
            f"Vocabularies: {', '.join(map(described_vocabulary, result.vocabularies))}. {_VOCABULARY_NOTE}",
            "" if rounds is None else
            f"In one round its loss is {rounds.one.loss:.4f}, in {rounds.rounds} rounds {rounds.several.loss:.4f}, "
            f"after {result.steps} steps in both cases.",
        ),
        chart_section("Front", charts),
        table_section("Shapes", *candidate_table(result), _NOTE),
        settings_section("Settings", {"target": result.target, "for": config.purpose, "data": config.data,
                                      "calibration sequences": config.calibration_sequences or "default"}),
    ])  # fmt: skip


_VOCABULARY_NOTE = (
    "A fit does not teach the tokens of a smaller vocabulary, so the losses after it compare shapes of one vocabulary; "
    "those after distillation compare all. Times are for the text of one of the teacher's tokens."
)
_NOTE = (
    "Quick fit: on a quarter of the calibration texts. The best shapes, at most two of each depth while there are "
    "others, were fitted on all texts and then distilled for some steps. Every vocabulary has equally many of them."
)


def front_charts(result: CutSearchResult) -> list[Chart]:
    """Return charts of the loss against the bytes of the weights, and against the time for a token.

    With several vocabularies, each has a series of its own. What was only fitted on all texts is then left out.
    """
    stages = {"quick fit": "quick", "whole fit": "fitted", "after distillation": "trained"}
    charts = []
    for x, label in (("bytes", "MB of weights"), ("milliseconds", f"milliseconds for {time_unit(result)}")):
        scale = 1e-6 if x == "bytes" else 1.0
        series = [
            Series(f"{name}{tokens}", [(scale * getattr(one, x), _loss(getattr(one, key))) for one in having])
            for name, key in stages.items()
            for tokens, having in _having(result, key)
        ]
        series.append(Series("the student", [(scale * getattr(result, x), result.score.loss)]))
        charts.append(Chart(f"Loss by {label}", label, f"{result.unit} above the teacher", series, joined=False))
    return charts


def _having(result: CutSearchResult, key: str) -> Iterator[tuple[str, list[CutCandidate]]]:
    """Yield the candidates with a score, by their vocabulary if there are several, and what to add to their name."""
    having = [one for one in result.candidates if getattr(one, key) is not None]
    sizes = [one.vocab_size for one in result.vocabularies or []]
    if len(sizes) < 2:
        yield "", having
    elif key != "fitted":
        for tokens in sizes:
            yield f", {tokens:,} tokens", [one for one in having if one.vocab_size == tokens]


def _loss(score: CutScore) -> float:
    return score.loss


def candidate_table(result: CutSearchResult) -> tuple[list[str], list[list[str]]]:
    """Return headings, and a row of texts for each candidate, the best first."""
    drafts = result.score.speedup is not None
    several = result.vocabularies is not None
    time = "ms" if several else "ms per token"
    headings = ["shape", *(["tokens"] if several else []), "parameters", "weights", time]
    headings += ["quick fit", "whole fit", "after distillation"]
    rows = [
        [
            described(one.shape),
            *([f"{one.vocab_size:,}"] if several else []),
            f"{one.parameters:,}", size(one.bytes), f"{one.milliseconds:.2f}",
            *("" if score is None else f"{score.loss:.4f}" for score in (one.quick, one.fitted, one.trained)),
            *([_drafted(one)] if drafts else []),
        ]
        for one in result.candidates
    ]  # fmt: skip
    return [*headings, *(["accepted, speedup"] if drafts else [])], rows


def _drafted(one: CutCandidate) -> str:
    last = one.trained or one.fitted or one.quick
    return f"{last.acceptance:.1%}, {last.speedup:.2f}"
