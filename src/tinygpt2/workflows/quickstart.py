"""`quickstart`: the whole pipeline on text that is part of every CPython.

It only calls the functions behind the commands, so a user can do the same with the commands. OUT/quickstart.json
lists the finished stages, so that a second run continues where the first one stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tinygpt2.compression.truncate import truncate_student
from tinygpt2.config.compression import TruncateStudentConfig
from tinygpt2.config.data import PregenerateConfig, TrainTokenizerConfig
from tinygpt2.config.decoding import GenerateConfig
from tinygpt2.config.distillation import DistillConfig, read_recipe
from tinygpt2.config.evaluation import PplConfig
from tinygpt2.config.training import PretrainConfig
from tinygpt2.config.workflows import QuickstartConfig
from tinygpt2.data.corpus.sources import PYTHON_DOCS
from tinygpt2.data.pregenerate import pregenerate
from tinygpt2.data.tokenizer_training import train_tokenizer
from tinygpt2.decoding.generation import generate
from tinygpt2.errors import ConfigError, InterruptedRunError
from tinygpt2.evaluation.perplexity import ppl
from tinygpt2.training.metrics import CURVES, plot_runs
from tinygpt2.utils.files import read_json, write_json, write_text
from tinygpt2.utils.locks import writes_out
from tinygpt2.utils.progress import say, track
from tinygpt2.workflows.train import distill, pretrain

JOURNAL, REPORT = "quickstart.json", "report.md"
PROMPT = "The following example shows how to"


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
        tokens_per_second: the speed of greedy decoding.
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
class QuickstartResult:
    """The models that `quickstart` trained, with their measurements.

    Attributes:
        baselines: `truncated` started from the same weights as the student, `random` from random ones.
        seconds: the time of all stages.
        report: the path of report.md.
    """

    teacher: ModelSummary
    student: ModelSummary
    baselines: dict[str, ModelSummary]
    seconds: float
    report: str

    @property
    def summary(self) -> str:
        """The text of the report."""
        return Path(self.report).read_text(encoding="utf-8")


@writes_out
def quickstart(config: QuickstartConfig, scale: QuickstartSizes | None = None) -> QuickstartResult:
    """Train a tokenizer, a teacher, a student and two baselines, measure the models, and write a report.

    The student is distilled from the teacher. The baselines have the student's shape and see the same tokens in the
    same order, with the same optimizer, learning rate and schedule, but they learn from the text alone. One baseline
    starts from the same truncated teacher as the student, the other from random weights.

    Args:
        config: the output directory and the seed.
        scale: the sizes of the run; by default it takes a few minutes on two cores.

    Raises:
        ConfigError: another run writes to the output directory, or it holds other files, or a quickstart run with
            other sizes or another seed.
    """
    scale = scale or QuickstartSizes()
    out = Path(config.out).resolve()
    stages = _Stages(out, {"seed": config.seed, **asdict(scale)})
    pupil = _training(config, scale, out, scale.student_tokens)
    stages.run("tokenizer", lambda: train_tokenizer(
        TrainTokenizerConfig(source=[scale.source], vocab_size=scale.vocab_size, out=str(out / "tokenizer"))
    ))  # fmt: skip
    stages.run("data", lambda: pregenerate(PregenerateConfig(
        source=[scale.source], tokenizer=str(out / "tokenizer"), out=str(out / "data"),
        sequence_length=scale.sequence_length, seed=config.seed, resume=True,
    )))  # fmt: skip
    teacher_shape = _shape(out / "teacher.yaml", scale, scale.n_layer)
    student_shape = _shape(out / "student.yaml", scale, scale.student_layers)
    stages.run("teacher", lambda: pretrain(PretrainConfig(
        model_config=teacher_shape, out=str(out / "teacher"), **_training(config, scale, out, scale.teacher_tokens),
    )))  # fmt: skip
    stages.run("truncated", lambda: truncate_student(TruncateStudentConfig(
        teacher=str(out / "teacher"), num_layers=scale.student_layers, out=str(out / "truncated"),
        refit=True, data=str(out / "data"),
    )))  # fmt: skip
    stages.run("student", lambda: distill(DistillConfig(
        teacher=str(out / "teacher"), student=str(out / "truncated"), out=str(out / "student"), **pupil,
    )))  # fmt: skip
    stages.run("baseline-truncated", lambda: pretrain(PretrainConfig(
        model=str(out / "truncated"), out=str(out / "baseline-truncated"), **pupil,
    )))  # fmt: skip
    stages.run("baseline-random", lambda: pretrain(PretrainConfig(
        model_config=student_shape, out=str(out / "baseline-random"), **pupil,
    )))  # fmt: skip
    models = ("teacher", "student", "baseline-truncated", "baseline-random")
    figures = stages.run("figures", lambda: _measure(out, models, scale))
    rows = [ModelSummary(model=str((out / name).resolve()), **figures[name]) for name in models]
    plot_runs({name: out / name for name in models}, "eval/loss", out / CURVES, "held-out loss (nats/token)")
    result = QuickstartResult(
        rows[0],
        rows[1],
        {"truncated": rows[2], "random": rows[3]},
        stages.seconds,
        str((out / REPORT).resolve()),
    )
    write_text(out / REPORT, _report(out, result, scale))
    return result


def _shape(file: Path, scale: QuickstartSizes, layers: int) -> str:
    """Write a model configuration with this number of layers; return its path."""
    shape = {"n_layer": layers, "n_head": scale.n_head, "n_embd": scale.n_embd, "n_positions": scale.sequence_length}
    write_text(file, yaml.safe_dump(shape, sort_keys=False))
    return str(file)


def _training(config: QuickstartConfig, scale: QuickstartSizes, out: Path, tokens: int) -> dict[str, Any]:
    """Return the options that all four training runs share, so that the comparison is fair."""
    steps = tokens // (scale.batch_size * scale.sequence_length)
    recipe = read_recipe("default")
    return {
        **{key: recipe[key] for key in ("lr_schedule", "warmup_ratio", "weight_decay")},
        "optimizer": "adamw",  # Muon's matrix products take too long for steps of so few tokens
        "data": str(out / "data"),
        "max_tokens": tokens,
        "seed": config.seed,
        "micro_batch_size": scale.batch_size,
        "learning_rate": scale.learning_rate,
        "eval_every": max(1, steps // 4),
        "save_every": max(1, steps // 4),
        "resume": True,
    }


class _Stages:
    """Runs stages and keeps a journal of them. A stage in the journal does not run again if its directory exists."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self._out, self._file, self._number = out, out / JOURNAL, 0
        if self._file.is_file():
            self._journal = read_json(self._file)
            if self._journal["settings"] != settings:
                raise ConfigError(
                    f"--out {out} contains a quickstart run with another seed or other sizes", "give another --out"
                )
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out {out} is not empty and does not contain a quickstart run", "give another --out")
        else:
            self._journal = {"settings": settings, "stages": {}}
            write_json(self._file, self._journal)

    @property
    def seconds(self) -> float:
        """Seconds of all finished stages. Each stage counts only the time of the run that finished it."""
        return float(sum(stage["seconds"] for stage in self._journal["stages"].values()))

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a stage unless it is already finished; return the result of `work` as JSON."""
        stages = self._journal["stages"]
        self._number += 1
        if name in stages and ((self._out / name).is_dir() or name == "figures"):
            say(f"{name}: already finished")
            return stages[name]["result"]
        started = time.perf_counter()
        directory = self._out / name
        if directory.is_dir() and not (directory / "checkpoints").is_dir():
            shutil.rmtree(directory)  # without a checkpoint to resume from, the stage starts again
        try:
            with track(f"stage {self._number}: {name}", lines=False):
                result = work()
        except InterruptedRunError as error:
            raise InterruptedRunError(f"{name}: {error.message}", "run the same command again to continue") from None
        seconds = time.perf_counter() - started
        stages[name] = {"seconds": seconds, "result": result if isinstance(result, dict) else asdict(result)}
        write_json(self._file, self._journal)
        return stages[name]["result"]


def _measure(out: Path, models: tuple[str, ...], scale: QuickstartSizes) -> dict[str, Any]:
    """Measure each model's held-out perplexity, size and speed of greedy decoding, and generate a sample."""
    paths = [str(out / name) for name in models]
    measured = ppl(PplConfig(model=paths, task=[str(out / "data")], batch_size=scale.batch_size)).results
    greedy = GenerateConfig(model=paths, prompt=[PROMPT], max_new_tokens=scale.new_tokens)
    samples = generate(greedy.model_copy(update={"temperature": 0.8, "top_p": 0.9})).results
    texts = generate(greedy).results  # this call is timed: it comes second, after a warm-up
    runs = {name: read_json(out / name / "config.json") for name in models}
    journal = read_json(out / JOURNAL)["stages"]
    return {
        name: {
            "layers": runs[name]["n_layer"],
            "parameters": journal[name]["result"]["parameters"],
            "perplexity": row.perplexity,
            "bytes": (out / name / "model.safetensors").stat().st_size,
            "tokens_per_second": text.tokens / text.seconds,
            "sample": sample.text,
        }
        for name, row, text, sample in zip(models, measured, texts, samples, strict=True)
    }


def _report(out: Path, result: QuickstartResult, scale: QuickstartSizes) -> str:
    rows = {
        "teacher": result.teacher,
        "student (distilled)": result.student,
        "baseline: same start, text only": result.baselines["truncated"],
        "baseline: random start, text only": result.baselines["random"],
    }
    table = "\n".join(
        f"| {name} | {row.layers} | {row.parameters:,} | {row.bytes / 1e6:.1f} MB "
        f"| {row.perplexity:.2f} | {row.tokens_per_second:,.0f} |"
        for name, row in rows.items()
    )
    samples = "\n\n".join(f"**{name}**\n\n> {' '.join((PROMPT + row.sample).split())}" for name, row in rows.items())
    student, length = out / "student", scale.sequence_length
    return f"""# quickstart

This run trained four models on Python's documentation:

- The **teacher** was trained on {scale.teacher_tokens:,} tokens.
- The **student** was cut from the teacher ({scale.student_layers} of its {scale.n_layer} layers) and then distilled on
  {scale.student_tokens:,} tokens.
- Two **baselines** have the student's shape, but learned from the text alone, without the teacher. They saw the same
  tokens as the student, with the same optimizer, learning rate and schedule.

| model | layers | parameters | on disk | held-out perplexity | greedy tokens/s |
|---|---|---|---|---|---|
{table}

Lower perplexity is better. It was measured on held-out documents that were not used for training. All stages together
took {result.seconds:.0f} seconds.

![held-out loss of the four runs]({CURVES})

## Samples (temperature 0.8, top-p 0.9)

{samples}

## What to try next

Try the student with your own prompts:

    tinygpt2 generate --model {student} --interactive

Distil this teacher on your own text (a file, a directory or .jsonl):

    tinygpt2 pregenerate my-texts/ --tokenizer {out / "tokenizer"} --sequence-length {length} --out my-data
    tinygpt2 distill --teacher {out / "teacher"} --student {out / "truncated"} --data my-data --out my-student

Use GPT-2 itself as the teacher (`gpt2` is loaded from the Hub; offline, give a local directory instead):

    tinygpt2 pregenerate my-texts/ --tokenizer gpt2 --out gpt2-data
    tinygpt2 truncate-student --teacher gpt2 --num-layers 6 --refit --data gpt2-data --out gpt2-cut
    tinygpt2 distill --teacher gpt2 --student gpt2-cut --data gpt2-data --out gpt2-small
"""
