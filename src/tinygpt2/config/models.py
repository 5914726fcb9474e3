"""Options of the commands that cut, measure, try and check models, and of `quickstart`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tinygpt2.config.base import Config, flag_name, option
from tinygpt2.config.common import DECODING, MAX_SEED, ModelOptions, Precision

Strategy = Literal["uniform", "alternate", "distilgpt2", "first", "middle", "last", "importance"]
Position = Literal["first", "interpolate"]
Convention = Literal["hf", "gpt2-paper", "lm-eval", "tinygpt2"]


class QuickstartConfig(Config):
    """Options of `quickstart`."""

    out: str = option("tinygpt2-quickstart", "Directory for everything it makes; an earlier one is continued.")
    seed: int = option(42, "Seed of every random choice.", ge=0, le=MAX_SEED)


class TruncateStudentConfig(ModelOptions):
    """Options of `truncate-student`."""

    teacher: str = option(..., "Teacher: a local directory or a Hub id.")
    out: str = option(..., "Directory for the student.")
    num_layers: int | None = option(None, "Layers to keep.", ge=1)
    strategy: Strategy | None = option(
        None,
        "Which layers --num-layers keeps: uniform keeps both ends, alternate takes every N/M-th from 0, distilgpt2 "
        "every N/M-th from both ends, importance removes those whose loss on --data costs least.",
        shown="uniform",
    )
    layers: str | None = option(None, "Blocks to keep, counted from 0, such as 0,2,4,7,9,11.", commas=True)
    n_embd: int | None = option(None, "Width to keep, by importance on --data; follows from --n-head.", ge=1)
    n_head: int | None = option(None, "Heads to keep, whole; follows from --n-embd.", ge=1)
    n_inner: int | None = option(
        None, "Inner units of each MLP to keep.", ge=1, shown="as many for each of the width as the teacher has"
    )
    refit: bool = option(
        False, "Fit the output projections again by least squares, so that the states follow the teacher's."
    )
    n_positions: int | None = option(None, "Positions of the student.", ge=1, shown="the teacher's")
    position: Position | None = option(None, "Which of the teacher's positions --n-positions takes.", shown="first")
    data: str | None = option(
        None, "Pregenerated dataset: its training split to measure importance on, its test split for the perplexity."
    )
    calibration_sequences: int = option(64, "Blocks of --data to measure on.", ge=1)

    @property
    def cuts_width(self) -> bool:
        """Whether anything narrower than the teacher is asked for."""
        return any(size is not None for size in (self.n_embd, self.n_head, self.n_inner))

    @property
    def measures(self) -> list[str]:
        """What asks for measurements on calibration texts."""
        asked = {
            "--strategy importance": self.strategy == "importance",
            "a width": self.cuts_width,
            "--refit": self.refit,
        }
        return [name for name, on in asked.items() if on]

    def conflicts(self) -> Iterator[str]:
        """At least one cut, one way to choose layers, and data for what is measured."""
        if self.num_layers is not None and self.layers is not None:
            yield "--num-layers and --layers contradict each other: give one"
        if self.num_layers is None and self.layers is None and not self.cuts_width and self.n_positions is None:
            yield "give one of --num-layers and --layers, a width (--n-embd, --n-head, --n-inner) or --n-positions"
        if self.strategy is not None and self.num_layers is None:
            yield "--strategy goes with --num-layers" + (": --layers already names the layers" if self.layers else "")
        if self.position is not None and self.n_positions is None:
            yield "--position goes with --n-positions"
        if self.data is None and self.calibration_sequences != type(self).model_fields["calibration_sequences"].default:
            yield "--calibration-sequences does nothing without --data"
        if self.measures and self.data is None:
            yield f"{' and '.join(self.measures)}: missing --data to measure on"
        if self.layers is not None and not re.fullmatch(r"\d+(,\d+)*", str(self.layers)):
            yield f"--layers {self.layers!r}: expected block numbers such as 0,2,4"


class PplConfig(ModelOptions):
    """Options of `ppl`."""

    model: list[str] = option(["gpt2"], "Model to measure, repeatable: a local directory or a Hub id.")
    task: list[str] = option(
        [], "What to measure on, repeatable: a named task, all of them, a text file or a pregenerated dataset."
    )
    task_data: str | None = option(None, "File or folder with the named tasks' texts, instead of the Hub.")
    list_tasks: bool = option(False, "List the named tasks and stop.")
    convention: Convention = option("hf", "Which tokens count, and what perplexity is per; see docs/perplexity.md.")
    stride: int | None = option(None, "Tokens from one window's start to the next.", ge=1, shown="the window")
    batch_size: int | None = option(
        None, "Windows of full length in one forward pass.", ge=1, shown="as many as hold 2,048 tokens, 32,768 on a GPU"
    )
    precision: Precision = option("fp32", "Type of the weights and products.")
    num_processes: int | None = option(
        None, "Processes on this machine, one per GPU.", ge=1, shown="1, or as another launcher says"
    )
    plot: str | None = option(None, "PNG of perplexity against parameters and against tokens/s.")
    csv: bool = option(False, "Print the figures as CSV.")
    markdown: bool = option(False, "Print the table as Markdown.")

    def conflicts(self) -> Iterator[str]:
        """Check that there is something to measure, and one way to do it and to print it."""
        if not self.model:
            yield "missing --model: what to measure"
        if not self.task and not self.list_tasks:
            yield "missing --task: what to measure on; --list-tasks names the known ones"
        if self.stride is not None and self.convention in ("lm-eval", "tinygpt2"):
            yield f"--stride contradicts --convention {self.convention}, whose windows do not overlap"
        if self.csv + self.markdown + self.list_tasks > 1:
            yield "--csv, --markdown and --list-tasks contradict each other: give one"
        if self.plot is not None and not Path(self.plot).absolute().parent.is_dir():
            yield f"--plot {self.plot}: there is no such directory"
        if self.plot is not None and Path(self.plot).is_dir():
            yield f"--plot {self.plot} is a directory: give the picture's file"


class GenerateConfig(ModelOptions):
    """Options of `generate`. Greedy unless sampling or beams are asked for."""

    model: list[str] = option(..., "Model to try, repeatable: a local directory or a Hub id.")
    prompt: list[str] = option([], "Text to continue, repeatable.", shown="start of a text")
    prompt_file: str | None = option(None, "UTF-8 file whose whole text is the prompt.")
    interactive: bool = option(
        False, "Ask for prompts until end of input, with a history; a line after a slash changes settings."
    )
    max_new_tokens: int | None = option(
        None, "Tokens to add.", panel=DECODING, ge=1, shown="100, or what the positions leave"
    )
    temperature: float | None = option(None, "Sample, with logits divided by this.", panel=DECODING, gt=0)
    top_k: int | None = option(None, "Sample among the k likeliest tokens.", panel=DECODING, ge=1)
    top_p: float | None = option(
        None, "Sample among the likeliest tokens that hold this share.", panel=DECODING, gt=0, le=1
    )
    num_beams: int = option(1, "Beam search of this width.", panel=DECODING, ge=1)
    num_samples: int = option(1, "Texts for each prompt: samples, or the best beams.", panel=DECODING, ge=1)
    seed: int = option(42, "Seed of sampling.", panel=DECODING, ge=0, le=MAX_SEED)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random: any sampling option, or several texts without beams."""
        asked = any(value is not None for value in (self.temperature, self.top_k, self.top_p))
        return asked or (self.num_samples > 1 and self.num_beams == 1)

    def conflicts(self) -> Iterator[str]:
        """Check prompts and decoding."""
        given = [name for name in ("prompt", "prompt_file", "interactive") if getattr(self, name)]
        if len(given) > 1:
            yield f"{' and '.join(map(flag_name, given))} contradict each other: give one"
        if self.num_beams > 1 and self.samples:
            yield "--num-beams contradicts --temperature, --top-k and --top-p: beam search does not sample"
        if 1 < self.num_beams < self.num_samples:
            yield f"--num-samples {self.num_samples} is beyond --num-beams {self.num_beams}"


class VerifyConfig(ModelOptions):
    """Options of `verify`."""

    path: str = option(..., "Pregenerated dataset or model directory.", positional=True)
    teacher: str | None = option(None, "Say which of its tensors a student's are: a local directory or a Hub id.")


class PresetsConfig(Config):
    """Options of `presets`: none of its own."""
