"""Options of `ppl`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tinygpt2.config.base import option
from tinygpt2.config.common import Precision
from tinygpt2.config.data import FileOptions
from tinygpt2.config.models import DeviceOptions, ModelOptions

Convention = Literal["hf", "gpt2-paper", "lm-eval", "tinygpt2"]

CONVENTION_NOTES: dict[Convention, str] = {
    "hf": "perplexity per token; each token that has an earlier one in its window is predicted once",
    "gpt2-paper": "perplexity per word, character or byte of the original text; every token is predicted, the first "
    "one after end-of-text; the text is detokenized",
    "lm-eval": "as lm-evaluation-harness: page by page, every token is predicted; per word of the page before it is "
    "detokenized",
    "tinygpt2": "as TinyGPT2's calc_ppl: perplexity per token; a window's mean loss over n - 1 targets counts n times",
}


class PplConfig(ModelOptions, DeviceOptions, FileOptions):
    """Options of `ppl`."""

    model: list[str] = option(
        "Model: a local directory or a Hub id. Repeat it to compare several.", default=["gpt2"], path=True
    )
    task: list[str] = option(
        "Text to measure on: a named task, `all` of them, a text file or a pregenerated dataset. Repeatable.",
        default=[],
        path=True,
    )
    task_data: str | None = option(
        "File or folder with the texts of the named tasks.", default=None, shown="the Hub", path=True
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
        "PNG to write: perplexity against parameters and against tokens/s. A page for browsers is written beside it, "
        "as .html.",
        default=None,
        path=True,
    )
    csv: bool = option("Print all figures as CSV.", default=False)
    markdown: bool = option("Print the table as Markdown.", default=False)

    def conflicts(self) -> Iterator[str]:
        """Require a model, a task and one output format."""
        if not self.model:
            yield "--model is required: the model to measure"
        if not self.task and not self.list_tasks:
            yield "--task is required: the text to measure on; --list-tasks lists the named ones"
        if self.stride is not None and self.convention in ("lm-eval", "tinygpt2"):
            yield f"--stride cannot be combined with --convention {self.convention}: its windows do not overlap"
        if self.csv + self.markdown + self.list_tasks > 1:
            yield "--csv, --markdown and --list-tasks cannot be combined: give one of them"
        if self.plot is not None and not Path(self.plot).absolute().parent.is_dir():
            yield f"--plot {self.plot}: the directory does not exist"
        if self.plot is not None and Path(self.plot).is_dir():
            yield f"--plot {self.plot} is a directory: give the name of a file"
