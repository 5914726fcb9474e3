"""Options of `quickstart`, `teach`, `runs`, `show`, `verify`, `export` and `push`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from tinygpt2.config.base import Config, option
from tinygpt2.config.common import MAX_SEED, RUN, TrainingPrecision
from tinygpt2.config.distillation import CacheKind, TeacherDtype
from tinygpt2.config.models import CardOptions, DeviceOptions, ModelOptions
from tinygpt2.config.training import dataset_shares

Format = Literal["gguf", "onnx", "safetensors"]
NumberType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "int8"]

TYPES: dict[Format, tuple[NumberType, ...]] = {
    "gguf": ("f32", "f16", "bf16", "q8_0", "q4_0"),
    "onnx": ("f32", "int8"),
    "safetensors": ("f32", "f16", "bf16"),
}
PACKAGES: dict[Format, tuple[str, ...]] = {"gguf": ("gguf",), "onnx": ("onnx", "onnxruntime"), "safetensors": ()}
"""The packages that a format needs. The extra of tinygpt2 that installs them has the format's name."""


class QuickstartConfig(DeviceOptions):
    """Options of `quickstart`."""

    out: str = option(
        "Directory for all results. If it holds an interrupted quickstart, that one continues.",
        default="tinygpt2-quickstart",
        path=True,
    )
    seed: int = option("Seed of every random choice.", default=42, ge=0, le=MAX_SEED)


class TeachConfig(ModelOptions, DeviceOptions):
    """Options of `teach`."""

    teacher: str = option("Teacher: a local directory or a Hub id.", path=True, metavar="PATH|ID")
    data: str | list[str] = option(
        "Pregenerated dataset: what distill will get as --data, with the same shares. Repeat it for several.",
        repeated=True,
        path=True,
    )
    out: str = option(
        "Directory for caches: what distill will get as --teacher-cache. Blocks that are there are not computed again.",
        path=True,
    )
    teacher_cache_kind: CacheKind = option(
        "What to keep of each position: a few dozen sampled tokens, as many of the likeliest tokens, or the final "
        "hidden state. Only the first two make the teacher unnecessary.",
        default="samples",
    )
    temperature: float = option("Divide the logits by this, as distill will do.", default=1.0, gt=0)
    part: str | None = option(
        "Fill part I of N. All parts go to the same --out, one after another or at the same time.",
        default=None,
        metavar="I/N",
    )
    micro_batch_size: int = option("Blocks in a forward pass.", default=8, ge=1, panel=RUN)
    precision: TrainingPrecision = option(
        "Number format of the products. auto is bf16 on a GPU that has it, fp16 on an older one, and fp32 elsewhere.",
        default="auto",
        panel=RUN,
    )
    teacher_dtype: TeacherDtype = option("Number format of the teacher's weights.", default="fp32", panel=RUN)

    @property
    def part_numbers(self) -> tuple[int, int]:
        """The number of the part to fill, counted from 1, and the number of parts."""
        number, _, count = (self.part or "1/1").partition("/")
        return int(number), int(count)

    def conflicts(self) -> Iterator[str]:
        """Check part, temperature and shares."""
        yield from super().conflicts()
        try:
            dataset_shares(self.data)
        except ValueError as error:
            yield str(error)
        if self.part is not None and not re.fullmatch(r"\d{1,9}/\d{1,9}", self.part):
            yield f"--part: expected I/N, such as 1/8, got {self.part!r}"
        elif not 1 <= self.part_numbers[0] <= self.part_numbers[1]:
            yield f"--part {self.part}: the first of N parts is 1/N, the last N/N"
        if self.teacher_cache_kind == "states" and self.temperature != 1:
            yield f"--temperature {self.temperature:g} has no effect on hidden states"


class RunsConfig(Config):
    """Options of `runs`."""

    path: str = option(
        "Directory that holds training runs, at any depth.", default=".", positional=True, path=True, shown="here"
    )


class ShowConfig(Config):
    """Options of `show`."""

    path: str = option("Directory of a training run.", positional=True, path=True)


class VerifyConfig(ModelOptions):
    """Options of `verify`."""

    path: str = option(
        "Pregenerated dataset, model directory, exported model (GGUF file or ONNX folder) or Hub id.",
        positional=True,
        path=True,
        metavar="PATH|ID",
    )
    teacher: str | None = option(
        "Teacher model: also report which tensors of the student are exact copies of the teacher's.",
        default=None,
        path=True,
        metavar="PATH|ID",
    )
    model: str | None = option(
        "With an exported model: the model that it was made from. Every tensor, logits, greedy text and loss are "
        "compared with it.",
        default=None,
        path=True,
        metavar="PATH|ID",
    )
    data: str | None = option(
        "With an exported model: text, or pregenerated dataset, on which to compare.",
        default=None,
        path=True,
        metavar="SOURCE|PATH",
        shown="python-docs, the text of quickstart",
    )


class ExportConfig(ModelOptions, CardOptions):
    """Options of `export`."""

    model: str = option("Model: a local directory or a Hub id.", positional=True, path=True, metavar="PATH|ID")
    to: Format = option(
        "Format. gguf: one file for llama.cpp, Ollama and LM Studio. onnx: a folder for onnxruntime and "
        "transformers.js. safetensors: a plain model directory."
    )
    type: NumberType = option(
        "How the weights are stored. gguf: f32, f16, bf16, q8_0 or q4_0; onnx: f32 or int8; safetensors: f32, f16 or "
        "bf16. q8_0 and q4_0 round blocks of 32 weights to 8 and 4 bits.",
        default="f32",
    )
    out: str = option("What to write: a file for gguf, a directory for the other formats.", path=True)
    overwrite: bool = option("Replace what exists at --out.", default=False)
    check: bool = option(
        "Run what was written and compare it with the model: logits, greedy text, loss, speed.", default=True
    )
    data: str | None = option(
        "Text, or pregenerated dataset, on which to compare.",
        default=None,
        path=True,
        metavar="SOURCE|PATH",
        shown="python-docs, the text of quickstart",
    )

    def conflicts(self) -> Iterator[str]:
        """Check that the format has the type, and that --data has an effect."""
        yield from super().conflicts()
        if self.type not in TYPES[self.to]:
            yield f"--type {self.type}: --to {self.to} has the types {', '.join(TYPES[self.to])}"
        if self.data is not None and not self.check:
            yield "--data has no effect with --no-check"


class PushConfig(Config):
    """Options of `push`."""

    out: str = option("Model directory.", positional=True, path=True)
    repo: str = option("Where on the Hub. It is made if it does not exist.", metavar="USER/NAME")
    private: bool = option("Make a new repository private.", default=False)
    revision: str | None = option(
        "Branch to upload to. It is made if it does not exist.", default=None, shown="the main branch", metavar="NAME"
    )
    message: str | None = option("Message of the commit.", default=None, shown="Upload a GPT-2 with tinygpt2")
    dry_run: bool = option("Check the model, list what would be uploaded, and exit. Uses no network.", default=False)

    def conflicts(self) -> Iterator[str]:
        """Check the form of the repository's name."""
        yield from super().conflicts()
        name = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
        if not re.fullmatch(f"{name}/{name}", self.repo) or re.search(r"--|\.\.|\.git$", self.repo):
            yield f"--repo {self.repo!r}: expected USER/NAME in letters, digits and single - . _"
        if self.message is not None and not self.message.strip():
            yield "--message is empty"
