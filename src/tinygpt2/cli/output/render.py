"""Print results for people or as one JSON object on standard output, and errors on standard error."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tinygpt2.cli.output.comparison import render_ppl
from tinygpt2.cli.output.curves import render_runs, render_show
from tinygpt2.cli.output.facts import fields_of, plan_group, print_facts
from tinygpt2.cli.output.live_text import render_generate
from tinygpt2.cli.output.tables import PIPED_WIDTH, Column, print_note, print_table, short_path
from tinygpt2.cli.output.text_evaluation import render_text_evaluation
from tinygpt2.errors import InterruptedRunError, TinyGPT2Error
from tinygpt2.utils.terminal import json_line, open_console, printable
from tinygpt2.utils.units import duration, number, short_count, size

if TYPE_CHECKING:
    from rich.console import Console


def print_result(result: Any, *, as_json: bool) -> None:
    """Print the result of a command, a dataclass."""
    if as_json:
        print_json(to_json(result))
    else:
        render = RENDER.get(type(result).__name__, print_facts)
        render(result, open_console(width=None if sys.stdout.isatty() else PIPED_WIDTH))
    sys.stdout.flush()


def print_error(error: TinyGPT2Error, *, as_json: bool) -> None:
    """Print an expected failure: its message and, if there is one, its hint.

    With --json the error goes to standard output as one JSON object.
    """
    if as_json:
        body = {"code": error.exit_code, "message": error.message, "hint": error.hint}
        print_json({"error": body})
        sys.stdout.flush()
    else:
        _print_failure(error, open_console(stderr=True))


def _print_failure(error: TinyGPT2Error, console: Console) -> None:
    """Print what happened and what helps. A run that was stopped and saved is no error."""
    from rich.text import Text

    stopped = error.exit_code == InterruptedRunError.exit_code
    lines = [("" if stopped else "error: ", error.message, "bold yellow" if stopped else "bold red")]
    lines += [("hint: ", error.hint, "bold")] if error.hint else []
    for label, text, style in lines:
        if not console.is_terminal:
            console.print(label + text, markup=False)
            continue
        shown = Text(printable(label + text, console.file))
        shown.stylize(style, 0, len(label or text))
        console.print(shown)


def print_json(value: Any) -> None:
    """Print a value of JSON's types as one line."""
    sys.stdout.write(json_line(json.dumps(value, ensure_ascii=False, allow_nan=False), sys.stdout) + "\n")


def to_json(value: Any) -> Any:
    """Return a result in JSON's types. NaN and infinite values become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields_of(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _facts(**how: Any) -> Callable[[Any, Console], None]:
    """Return a function that prints the fields of a result; see `print_facts`."""
    return lambda result, console: print_facts(result, console, **how)


def _render_tasks(result: Any, console: Console) -> None:
    for task in result.tasks:
        console.print(task.name, style="bold", markup=False)
        for field in dataclasses.fields(task)[1:]:
            text = f"  {field.name.replace('_', ' '):<15} {getattr(task, field.name)}"
            print_note(text, console, indent=" " * 18)


def _render_cut(result: Any, console: Console) -> None:
    labels = {
        "model": "student", "parameters": "parameters", "teacher_parameters": "teacher's parameters",
        "perplexity": "held-out perplexity", "student": "student before training",
    }  # fmt: skip
    print_facts(dataclasses.replace(result, importance=None), console, labels)
    if (importance := result.importance) is None:
        return
    console.print()
    title = f"by how much the loss ({importance.loss:.4f} nats per token) rises without each block"
    print_note(title, console, style="bold")
    removed = {one.removed: number for number, one in enumerate(importance.rounds, 1)}
    blocks = range(len(importance.influence))
    fates = [f"removed in round {removed[block]}" if block in removed else "kept" for block in blocks]
    rounds = {1: importance.rounds[0].costs, len(importance.rounds): importance.rounds[-1].costs}
    columns = [
        Column("block", [str(block) for block in blocks], left=True),
        *(Column(f"in round {at}", [number(costs.get(block)) for block in blocks]) for at, costs in rounds.items()),
        Column("block influence", [number(value) for value in importance.influence], 3),
        Column("", fates, 1, left=True),
    ]
    print_table(columns, console)


def _render_search(result: Any, console: Console) -> None:
    drafts = result.score.speedup is not None
    found = result.candidates
    last = [one.trained or one.fitted or one.quick for one in found]
    several = result.vocabularies is not None
    columns = [
        Column("layers", [str(one.n_layer) for one in found]),
        *(
            Column(heading, [number(getattr(one, key)) for one in found])
            for heading, key in (("width", "n_embd"), ("heads", "n_head"), ("inner", "n_inner"))
        ),
        *([Column("tokens", [number(one.vocab_size) for one in found])] if several else []),
        Column("parameters", [short_count(one.parameters) for one in found], 2),
        Column("weights", [size(one.bytes) for one in found], 3),
        Column("ms" if several else "ms/token", [f"{one.milliseconds:.2f}" for one in found], 1),
        *(
            Column(heading, ["" if score is None else f"{score.loss:.4f}" for score in scores], rank)
            for heading, scores, rank in (
                ("quick fit", [one.quick for one in found], 4),
                ("whole fit", [one.fitted for one in found], 1),
                ("distilled", [one.trained for one in found], 0),
            )
        ),
    ]
    if drafts:
        columns.append(Column("accepted", [f"{score.acceptance:.1%}" for score in last]))
        columns.append(Column("speedup", [f"{score.speedup:.2f}" for score in last]))
    print_table(columns, console)
    print_note(f"losses in {result.unit} above the teacher's on the same {'text' if several else 'blocks'}", console)
    if several:
        print_note(
            "after a fit they compare shapes with equally many tokens, after distillation all; ms are for the text of "
            "one of the teacher's tokens",
            console,
        )
    console.print()
    labels = {
        "model": "student", "parameters": "parameters", "teacher_parameters": "teacher's parameters", "n_embd": "width",
        "n_head": "heads", "n_inner": "inner units", "vocab_size": "tokens", "bytes": "weights",
        "milliseconds": "ms for the same text" if several else "ms per token",
        "teacher_milliseconds": "teacher's ms per token", "perplexity": "held-out perplexity",
        "bits_per_byte": "held-out bits per byte", "unit": "losses in",
        "score": "beside the teacher", "loss": "loss", "steps": "steps of distillation",
        "tokens": "tokens of distillation",
    }  # fmt: skip
    print_facts(result, console, labels, hidden=("candidates", "rounds", "vocabularies"))
    if (rounds := result.rounds) is not None:
        print_note(
            f"cut in one round its loss is {rounds.one.loss:.4f}, in {rounds.rounds} rounds {rounds.several.loss:.4f}, "
            f"after {result.steps} steps in both cases: the better one was kept",
            console,
        )


def _render_presets(result: Any, console: Console) -> None:
    found = result.presets
    columns = [
        Column("name", [one.name for one in found], left=True),
        Column("parameters", [number(one.parameters) for one in found]),
        *(
            Column(heading, [number(getattr(one, key)) for one in found])
            for heading, key in (("layers", "n_layer"), ("heads", "n_head"), ("width", "n_embd"))
        ),
        Column("positions", [number(one.n_positions) for one in found], 1),
    ]
    print_table(columns, console)
    console.print()
    for preset in found:
        print_note(f"{preset.name}: {preset.source}", console, indent="  ")


def _render_verify(result: Any, console: Console) -> None:
    console.print(f"{short_path(result.path)}: {result.kind}, {'ok' if result.ok else 'faulty'}", markup=False)
    for line in [*result.problems, *(f"note: {note}" for note in result.notes)]:
        print_note(f"- {line}", console, indent="  ")
    if (agreement := result.reference) is not None:
        same = "the same" if agreement.same_greedy_text else "different"
        console.print("compared with the reference implementation:")
        for line in (
            f"logits differ by at most {agreement.logits:.2g} (the largest is {agreement.largest_logit:.3g})",
            f"hidden states differ by at most {agreement.states:.2g} (the largest is {agreement.largest_state:.3g})",
            f"greedy texts of {agreement.greedy_tokens} tokens are {same}",
        ):
            console.print(f"  {line}", markup=False)
    if result.export is not None:
        from tinygpt2.exporting.export import check_rows

        _print_rows(check_rows(result.export), console)
    if result.copies is not None:
        lines = _copied_blocks(result.copies) if result.copies else ["no tensor is an exact copy of a teacher's tensor"]
        for line in lines:
            print_note(line, console, indent="  ")


def _copied_blocks(copies: dict[str, str]) -> Iterator[str]:
    """Yield a line for each part of a student that has exact copies of tensors of a part of the teacher."""
    parts: dict[str, list[str]] = {}
    for name, origin in copies.items():
        here, there = (re.sub(r"transformer\.h\.(\d+)\..*", r"block \1", key) for key in (name, origin))
        parts.setdefault(here, []).append(there)
    for here, origins in parts.items():
        for there in dict.fromkeys(origins):
            count = f" ({origins.count(there)} tensors)" if here.startswith("block") else ""
            yield f"{here} is a copy of the teacher's {there}{count}"


def _render_push(result: Any, console: Console) -> None:
    columns = [
        Column("file", [file.path for file in result.files], left=True),
        Column("size", [size(file.bytes) for file in result.files]),
    ]
    print_table(columns, console)
    what = "would be uploaded" if result.dry_run else "uploaded"
    total = size(sum(file.bytes for file in result.files))
    console.print(f"\n{what} to {result.url}: {len(result.files)} files, {total}", markup=False, soft_wrap=True)


def _render_budget(result: Any, console: Console) -> None:
    found = result.candidates
    columns = [
        Column("model", [short_path(one.student) for one in found], left=True),
        Column("parameters", [short_count(one.parameters) for one in found]),
        Column("tokens/s", [number(one.tokens_per_second) for one in found], 3),
        Column("steps", [number(one.steps) for one in found]),
        Column("tokens", [short_count(one.tokens) for one in found], 2),
        Column("passes", [number(one.passes) for one in found], 4),
        Column("tokens/parameter", [number(one.tokens / one.parameters) for one in found], 5),
        Column("learning rate", [f"{one.learning_rate:.3g}" for one in found], 6),
        Column("evaluation", [duration(one.evaluation_seconds) for one in found], 1),
    ]
    print_table(columns, console)
    time = duration(60 * result.minutes)
    console.print(f"\nchosen for {time} in {result.precision}: {short_path(result.chosen)}", markup=False)
    if result.search_seconds is not None:
        about = duration(result.search_seconds)
        console.print(f"about {about} of it to find the best student with as many parameters", markup=False)
    for command in result.commands:
        console.print(command, markup=False, soft_wrap=True)
    if result.prediction is not None:
        for line in _prediction(result.prediction):
            console.print(line, markup=False, soft_wrap=True)
    proposal = next(one.batch_tokens for one in found if one.student == result.chosen)
    source = "a tenth of the critical batch size by Kaplan et al. 2020, arXiv:2001.08361"
    console.print(f"for a run of this length, try --batch-tokens {proposal} ({source})", markup=False, soft_wrap=True)


def _prediction(one: Any) -> Iterator[str]:
    """Say what the pilots predict."""
    if one.loss is not None:
        low, high = (math.exp(one.loss + sign * one.error) for sign in (-1, 1))
        found = f"{one.loss:.3f} +- {one.error:.3f} nats/token"
        yield f"predicted held-out loss: {found}, a perplexity of {low:.1f} to {high:.1f}"
    if one.target_tokens is not None:
        minutes = duration(60 * one.target_minutes)
        yield f"the target is predicted after {short_count(one.target_tokens)} tokens, in {minutes}"
    if one.pilots:
        runs = ", ".join(f"{loss:.3f} after {short_count(tokens)}" for tokens, loss in one.pilots)
        yield f"held-out losses of the pilots: {runs} tokens"
    if one.note is not None:
        yield one.note


def _render_export(result: Any, console: Console) -> None:
    from tinygpt2.exporting.export import figures

    _print_rows({"written to": short_path(result.out), **figures(result)}, console)


def _print_rows(rows: dict[str, str], console: Console) -> None:
    width = max(map(len, rows))
    for label, value in rows.items():
        console.print(f"{label:<{width}}  {value}", markup=False, soft_wrap=True)


def _render_bench(result: Any, console: Console) -> None:
    rows = result.results
    columns = [
        Column("model", [short_path(one.model) for one in rows], left=True),
        Column("by", [one.engine for one in rows], 5, left=True),
        Column("weights", [one.precision for one in rows], left=True),
        Column("batch", [number(one.batch) for one in rows]),
        Column("first token", [f"{1000 * one.first_token_seconds:,.1f} ms" for one in rows], 2),
        Column("tokens/s", [f"{one.tokens_per_second:,.0f}" for one in rows]),
        Column("transformers", [f"{one.transformers_tokens_per_second:,.0f}" for one in rows], 1),
        Column("ratio", [f"{one.tokens_per_second / one.transformers_tokens_per_second:.2f}" for one in rows], 1),
        Column("read per token", [size(one.bytes_per_token) for one in rows], 4),
        Column("of bandwidth", [f"{one.bandwidth_share:.0%}" for one in rows], 3),
    ]
    print_table(columns, console)
    console.print(f"\nmemory bandwidth: {result.bandwidth / 1e9:,.1f} GB/s", markup=False)


def _render_quickstart(result: Any, console: Console) -> None:
    console.print(result.summary, markup=False)


RENDER: dict[str, Callable[[Any, Console], None]] = {
    "PplResult": render_ppl,
    "TaskList": _render_tasks,
    "TruncateStudentResult": _render_cut,
    "CutSearchResult": _render_search,
    "PresetList": _render_presets,
    "EvaluateTextResult": render_text_evaluation,
    "GenerateResult": render_generate,
    "BenchResult": _render_bench,
    "PushResult": _render_push,
    "VerifyResult": _render_verify,
    "ExportResult": _render_export,
    "QuickstartResult": _render_quickstart,
    "BudgetPlan": _render_budget,
    "RunPlan": _facts(group=plan_group),
    "RunList": render_runs,
    "ShowResult": render_show,
}
