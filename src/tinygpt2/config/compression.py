"""Options of `truncate-student`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic import field_validator

from tinygpt2.config.base import flag_name, option
from tinygpt2.config.common import FINALISTS, TARGET
from tinygpt2.config.models import CardOptions, DeviceOptions, ModelOptions

Strategy = Literal["uniform", "alternate", "distilgpt2", "first", "middle", "last", "importance"]
Position = Literal["first", "interpolate"]
Axes = Literal["rotated", "coordinates"]
Purpose = Literal["loss", "draft"]
VocabularyChoice = Literal["rank", "used"]
Measure = Literal["parameters", "bytes", "milliseconds"]

_UNITS = {"k": 1e3, "M": 1e6, "B": 1e9}
_TARGETS: dict[str, tuple[Measure, float]] = {
    "target_params": ("parameters", 1), "target_mb": ("bytes", 1e6), "target_ms": ("milliseconds", 1)
}  # fmt: skip
"""For each option: what it limits, and how many of these its unit has."""


class Target(NamedTuple):
    """What a student may have at most: how many parameters, bytes of weights, or milliseconds for a token."""

    measure: Measure
    limit: float
    option: str


class TruncateStudentConfig(ModelOptions, DeviceOptions, CardOptions):
    """Options of `truncate-student`."""

    teacher: str = option("Teacher: a local directory or a Hub id.", path=True, metavar="PATH|ID")
    out: str = option("Directory for the student.", path=True)
    num_layers: int | None = option("Number of layers to keep.", default=None, ge=1)
    strategy: Strategy | None = option(
        "Which layers --num-layers keeps. uniform: evenly spaced, with the first and the last. alternate: evenly "
        "spaced from the first. distilgpt2: evenly spaced from both ends. importance: removes, one by one, the layer "
        "whose removal raises the loss on --data least.",
        default=None,
        shown="uniform",
    )
    layers: str | None = option(
        "Layers to keep by number, counted from 0, such as 0,2,4,7,9,11.", default=None, commas=True, metavar="N,..."
    )
    n_embd: int | None = option("Hidden size of the student.", default=None, ge=1, shown="from --n-head")
    axes: Axes | None = option(
        "What a smaller hidden size keeps. rotated: the directions that matter most for the loss on --data. "
        "coordinates: the dimensions that matter most, with copied weights.",
        default=None,
        shown="rotated",
    )
    n_head: int | None = option(
        "Attention heads to keep in each layer. They share the hidden size equally, so their width can change.",
        default=None,
        ge=1,
        shown="all, or as many as divide the hidden size",
    )
    n_inner: int | None = option(
        "Inner size of each MLP.", default=None, ge=1, shown="in proportion to the hidden size, as in the teacher"
    )
    refit: bool = option(
        "Refit the projections of attention and MLPs by least squares on --data, so that the student's hidden states "
        "follow the teacher's.",
        default=False,
    )
    untie_head: bool = option(
        "Give the student an output matrix of its own if the teacher's is its embedding. Needs more parameters.",
        default=False,
    )
    n_positions: int | None = option("Number of positions of the student.", default=None, ge=1, shown="as the teacher")
    position: Position | None = option(
        "Which position embeddings --n-positions keeps: the first ones, or an interpolation of all.",
        default=None,
        shown="first",
    )
    vocab_size: int | None = option(
        "Tokens of the student, with all bytes and special tokens. The student's tokenizer is the one that results; "
        "--data stays in the teacher's tokens.",
        default=None,
        ge=1,
        shown="as the teacher",
    )
    vocab_choice: VocabularyChoice = option(
        "Which tokens --vocab-size keeps. rank: the first ones by merge rank; all borders of the teacher's tokens "
        "remain, so distillation is exact. used: those that --data uses most, with the ones that they are merged from.",
        default="rank",
    )
    tokenizer: str | None = option(
        "Give the student another tokenizer: a directory or a Hub id. A token's embedding is the mean of those of the "
        "teacher's tokens that spell it; --data stays in the teacher's tokens.",
        default=None,
        path=True,
        metavar="PATH|ID",
        shown="the teacher's",
    )
    target_params: int | None = option(
        "Parameters of the student, such as 30M.", default=None, panel=TARGET, ge=1, metavar="N"
    )
    target_mb: float | None = option(
        "Size of the student's weights (float32, as in model.safetensors) in MB of 1,000,000 bytes.",
        default=None,
        panel=TARGET,
        gt=0,
    )
    target_ms: float | None = option(
        "Time for each token that the student decodes on this machine, in milliseconds. It decodes one text, with "
        "float32 weights.",
        default=None,
        panel=TARGET,
        gt=0,
    )
    vocab_sizes: str | None = option(
        "Vocabulary sizes to search, such as 8192,4096: each keeps the teacher's first tokens by merge rank. The "
        "teacher's own size stands for its whole vocabulary. Students learn from text in their own tokens, and are "
        "compared in bits per byte.",
        default=None,
        panel=TARGET,
        commas=True,
        metavar="N,...",
    )
    purpose: Purpose = option(
        "What makes a student the best one. loss: the lowest loss. draft: the largest expected speed-up when it drafts "
        "for its teacher, from the tokens that the teacher would accept and the time that both take.",
        default="loss",
        panel=TARGET,
        alias="for",
    )
    data: str | None = option(
        "Pregenerated dataset. Importance is measured on its training split, perplexity on its test split.",
        default=None,
        path=True,
    )
    calibration_sequences: int | None = option(
        "How many blocks of --data to measure on.",
        default=None,
        ge=1,
        shown="64, or as many as hold 32,768 tokens if fewer (16,384 for the perplexity)",
    )

    @field_validator("target_params", mode="before")
    @classmethod
    def _accept_units(cls, value: Any) -> Any:
        """Accept 30M, 900k and 1.5B."""
        found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([kMB])", str(value))
        return round(float(found[1]) * _UNITS[found[2]]) if found else value

    @property
    def target(self) -> Target | None:
        """What the search must find a student for; None if the options give the sizes themselves."""
        for name, (measure, unit) in _TARGETS.items():
            if (value := getattr(self, name)) is not None:
                return Target(measure, unit * value, f"{flag_name(name)} {value:.12g}")
        return None

    @property
    def vocabularies(self) -> list[int]:
        """The vocabularies that the search looks through, the largest first; empty without --vocab-sizes."""
        return sorted(map(int, self.vocab_sizes.split(",")), reverse=True) if self.vocab_sizes else []

    @property
    def cuts_width(self) -> bool:
        """Whether the student is narrower than the teacher."""
        return any(size is not None for size in (self.n_embd, self.n_head, self.n_inner))

    @property
    def changes_tokens(self) -> bool:
        """Whether the student has other tokens than the teacher."""
        return self.vocab_size is not None or self.tokenizer is not None

    @property
    def rotated(self) -> bool:
        """Whether a smaller hidden size consists of the teacher's main directions."""
        return self.axes != "coordinates"

    @property
    def measures(self) -> list[str]:
        """The options that need measurements on `data`."""
        needs = {
            "--strategy importance": self.strategy == "importance",
            "a narrower student": self.cuts_width,
            "--refit": self.refit,
            "the search for a target": self.target is not None,
            "--vocab-choice used": self.vocab_choice == "used",
        }
        return [name for name, needed in needs.items() if needed]

    def conflicts(self) -> Iterator[str]:
        """Require at least one cut, one way to choose layers, and data for what is measured."""
        yield from super().conflicts()
        if self.num_layers is not None and self.layers is not None:
            yield "--num-layers and --layers cannot be combined: give one of them"
        yield from self._target_conflicts()
        sized = self.cuts_width or self.target is not None
        sized = sized or self.n_positions is not None or self.changes_tokens
        if self.num_layers is None and self.layers is None and not sized:
            yield (
                "give --num-layers or --layers, a width (--n-embd, --n-head, --n-inner) or --n-positions, other tokens "
                "(--vocab-size, --tokenizer), or a target (--target-params, --target-mb, --target-ms)"
            )
        if self.tokenizer is not None and self.vocab_size is not None:
            yield "--vocab-size and --tokenizer cannot be combined: give one of them"
        if self.strategy is not None and self.num_layers is None:
            why = ": --layers already names the layers" if self.layers else ""
            yield f"--strategy needs --num-layers{why}"
        if self.axes is not None and self.n_embd is None and self.n_head is None and self.target is None:
            yield "--axes needs --n-embd, --n-head or a target"
        if self.vocab_choice != "rank" and self.vocab_size is None:
            yield f"--vocab-choice {self.vocab_choice} needs --vocab-size"
        if self.position is not None and self.n_positions is None:
            yield "--position needs --n-positions"
        if self.data is None and self.calibration_sequences is not None:
            yield "--calibration-sequences has no effect without --data"
        if self.measures and self.data is None:
            yield f"{' and '.join(self.measures)} needs --data, a dataset to measure on"
        if self.layers is not None and not re.fullmatch(r"\d+(,\d+)*", str(self.layers)):
            yield f"--layers: expected layer numbers such as 0,2,4, got {self.layers!r}"

    def _target_conflicts(self) -> Iterator[str]:
        targets = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(targets) > 1:
            yield f"{' and '.join(map(flag_name, targets))} cannot be combined: give one of them"
        if not targets:
            if self.purpose != "loss":
                yield "--for needs --target-params, --target-mb or --target-ms"
            if self.vocab_sizes is not None:
                yield "--vocab-sizes needs --target-params, --target-mb or --target-ms"
            return
        yield from self._vocabulary_conflicts()
        if self.purpose == "draft" and self.vocab_size is not None:
            yield "--for draft cannot be combined with --vocab-size: a draft has its teacher's tokens"
        if self.tokenizer is not None:
            yield f"{flag_name(targets[0])} cannot be combined with --tokenizer: the search counts the teacher's tokens"
        sizes = ["num_layers", "strategy", "layers", "n_embd", "n_head", "n_inner", "refit"]
        if found := [flag_name(name) for name in sizes if getattr(self, name)]:
            why = "the search finds all sizes, and refits"
            yield f"{flag_name(targets[0])} cannot be combined with {' and '.join(found)}: {why}"

    def _vocabulary_conflicts(self) -> Iterator[str]:
        sizes = self.vocab_sizes
        if sizes is None:
            return
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", sizes):
            yield f"--vocab-sizes: expected numbers of tokens such as 8192,4096, got {sizes!r}"
        elif len(found := sizes.split(",")) > FINALISTS or len(set(found)) < len(found):
            yield f"--vocab-sizes {sizes}: list each vocabulary once, and at most {FINALISTS} of them"
        if self.vocab_size is not None:
            yield "--vocab-sizes and --vocab-size cannot be combined: give one of them"
        if self.purpose == "draft":
            yield "--for draft cannot be combined with --vocab-sizes: a draft has its teacher's tokens"
