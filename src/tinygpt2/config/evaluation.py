"""Options of `ppl` and `evaluate-text`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tinygpt2.config.base import option
from tinygpt2.config.common import DECODING, MAX_SEED, Precision
from tinygpt2.config.data import FileOptions
from tinygpt2.config.decoding import SamplingOptions
from tinygpt2.config.models import DeviceOptions, ModelOptions
from tinygpt2.errors import ConfigError

OutputFormat = Literal["table", "csv", "md", "json"]
_SHORT_FORMS = {"csv": "csv", "markdown": "md", "json": "json"}

Convention = Literal["hf", "gpt2-paper", "lm-eval", "tinygpt2"]

CONVENTION_NOTES: dict[Convention, str] = {
    "hf": "perplexity per token; each token that has an earlier one in its window is predicted once",
    "gpt2-paper": "perplexity per word, character or byte of the original text; every token is predicted, the first "
    "one after end-of-text; the text is detokenized",
    "lm-eval": "as lm-evaluation-harness: page by page, every token is predicted; per word of the page before it is "
    "detokenized",
    "tinygpt2": "as TinyGPT2's calc_ppl: perplexity per token; a window's mean loss over n - 1 targets counts n times",
}

FIDELITY_NOTE = (
    "KL, median, 99 %: KL(reference || model) in nats per token; same top: both have the same likeliest token; "
    "acceptance: sum of min(p, q), the model's sampled tokens that the reference would accept; loss above: loss of the "
    "model minus that of the reference; calibration: expected calibration error of the likeliest token's probability; "
    "± standard error over windows"
)

OTHER_TOKENS_NOTE = (
    "other tokens than the reference's: predictions are compared for the given share of the targets. sums: the "
    "reference's predictions, summed to the model's tokens, are exact; events: both predictions are summed over events "
    "where tokens of both begin, and KL is at most that of tokens; in lumps: the reference's probability in events of "
    "several tokens; left out: the reference's probability of tokens that never begin where one of the model's does"
)


class PplConfig(ModelOptions, DeviceOptions, FileOptions):
    """Options of `ppl`."""

    model: list[str] = option(
        "Model: a local directory or a Hub id. Repeat it to compare several.",
        default=["gpt2"],
        path=True,
        metavar="PATH|ID",
    )
    reference: str | None = option(
        "Also say how close the models' predictions are to those of this model (KL, agreement, calibration): a local "
        "directory or a Hub id. With other tokens, predictions are compared where tokens of both begin. It and all "
        "models are in memory at once.",
        default=None,
        path=True,
        metavar="PATH|ID",
    )
    task: list[str] = option(
        "What to measure on: a named task, `all` of them, a text file, a pregenerated dataset, or choice:FILE.jsonl "
        "with questions of your own. Repeatable.",
        default=[],
        path=True,
        metavar="TASK|PATH",
        required="without --list-tasks",
    )
    task_data: str | None = option(
        "File or folder with the texts of the named tasks.", default=None, shown="the Hub", path=True
    )
    limit: int | None = option(
        "Use only the first N questions or passages of each task (of BLiMP, of each paradigm).",
        default=None,
        ge=1,
        metavar="N",
        shown="all of them",
    )
    list_tasks: bool = option("List the named tasks and exit.", default=False)
    convention: Convention = option(
        "Which tokens are counted, and the unit of perplexity; see docs/perplexity.md.", default="hf"
    )
    stride: int | None = option(
        "Tokens from the start of one window to the start of the next. Smaller gives more context, and takes longer.",
        default=None,
        ge=1,
        shown="the window",
    )
    batch_size: int | None = option(
        "Windows in one forward pass.", default=None, ge=1, shown="as many as hold 2,048 tokens; 32,768 on a GPU"
    )
    precision: Precision = option("Number format of the weights and the arithmetic.", default="fp32")
    num_processes: int | None = option(
        "Processes to start on this machine, one per GPU.", default=None, ge=1, shown="1, or what the launcher started"
    )
    plot: str | None = option(
        "PNG to write: perplexity against parameters and against tokens/s; with --reference, also KL and agreement by "
        "position and by confidence. A page for browsers is written beside it, as .html.",
        default=None,
        path=True,
    )
    output_format: OutputFormat = option(
        "How to print the result: a table that fits the window, all figures as CSV or JSON, or a table in Markdown. "
        "--csv, --json and --markdown are short for it.",
        default="table",
    )
    csv: bool = option("Short for --output-format csv.", default=False, exclude=True)
    markdown: bool = option("Short for --output-format md.", default=False, exclude=True)

    @classmethod
    def in_full(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return values with `output_format` in place of `csv`, `markdown` and `json`.

        Raises:
            ConfigError: they ask for different formats.
        """
        rest = {key: value for key, value in values.items() if key not in _SHORT_FORMS}
        short = [key for key in _SHORT_FORMS if values.get(key) in (True, "true", "yes")]
        asked = {_SHORT_FORMS[key] for key in short} | {str(value) for value in [rest.get("output_format")] if value}
        if short and len(asked) > 1:
            every = [f"--{key}" for key in short]
            every += [f"--output-format {rest['output_format']}"] if "output_format" in rest else []
            raise ConfigError(f"{', '.join(every)} cannot be combined: give one of them")
        if short:
            rest["output_format"] = _SHORT_FORMS[short[0]]
        elif len(rest) < len(values):  # --no-csv undoes the csv of a file
            rest.setdefault("output_format", "table")
        return rest

    def conflicts(self) -> Iterator[str]:
        """Require a model, a task and one output format."""
        if not self.model:
            yield "--model is required: the model to measure"
        if not self.task and not self.list_tasks:
            yield "--task is required: the text to measure on; --list-tasks lists the named ones"
        if self.stride is not None and self.convention in ("lm-eval", "tinygpt2"):
            yield f"--stride cannot be combined with --convention {self.convention}: its windows do not overlap"
        if self.list_tasks and self.output_format in ("csv", "md"):
            yield "--list-tasks prints a list or JSON: leave --csv, --markdown and --output-format out"
        yield from _plot_problems(self.plot)


class EvaluateTextConfig(ModelOptions, DeviceOptions, SamplingOptions):
    """Options of `evaluate-text`."""

    model: list[str] = option(
        "Model that writes: a local directory or a Hub id. Repeat it to compare several.", path=True, metavar="PATH|ID"
    )
    judge: str = option(
        "Model that judges what they write, such as their teacher. It needs the same vocabulary.",
        path=True,
        metavar="PATH|ID",
    )
    data: str = option(
        "Pregenerated dataset of texts or of pairs: prompts and true continuations are from its test split.", path=True
    )
    num_prompts: int = option("Prompts to continue.", default=256, ge=1)
    prompt_tokens: int = option("Tokens of a prompt; those of pairs have their own lengths.", default=64, ge=1)
    max_new_tokens: int = option("Maximum number of new tokens for each prompt.", default=128, panel=DECODING, ge=1)
    seed: int = option("Seed for sampling.", default=42, panel=DECODING, ge=0, le=MAX_SEED)
    batch_size: int = option("Texts to write side by side.", default=16, ge=1)
    plot: str | None = option("PNG to write: the excess error by the number of tokens.", default=None, path=True)

    def conflicts(self) -> Iterator[str]:
        """Check the place of the picture."""
        yield from super().conflicts()
        yield from _plot_problems(self.plot)


def _plot_problems(name: str | None) -> Iterator[str]:
    if name is not None and not Path(name).absolute().parent.is_dir():
        yield f"--plot {name}: the directory does not exist"
    if name is not None and Path(name).is_dir():
        yield f"--plot {name} is a directory: give the name of a file"
