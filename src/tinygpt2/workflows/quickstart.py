"""`quickstart`: the whole pipeline on text that is part of every CPython.

It only calls the functions behind the commands, so a user can do the same with the commands. OUT/quickstart.json
lists the finished stages, so that a second run continues where the first one stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
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
from tinygpt2.data.pregenerate import pregenerate
from tinygpt2.data.tokenizer_training import train_tokenizer
from tinygpt2.decoding.generation import generate
from tinygpt2.errors import ConfigError, InterruptedRunError
from tinygpt2.evaluation.perplexity import ppl
from tinygpt2.runtime.devices import chosen_precision, computes_on_device
from tinygpt2.utils.files import is_free, read_json, write_json, write_text
from tinygpt2.utils.locks import writes_out
from tinygpt2.utils.progress import say, track
from tinygpt2.workflows.quickstart_report import (
    CUT,
    MARKDOWN,
    PROMPT,
    RUNS,
    Gain,
    ModelSummary,
    QuickstartResult,
    QuickstartSizes,
    write_reports,
)
from tinygpt2.workflows.train import distill, pretrain

JOURNAL, MEASURED = "quickstart.json", "measurements"
_SPEED_RUNS = 5  # of greedy decoding; the best one counts


@computes_on_device
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
    pupil = _training(config, scale, out, scale.student_tokens, stages.precision)
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
        model_config=teacher_shape, out=str(out / "teacher"),
        **_training(config, scale, out, scale.teacher_tokens, stages.precision),
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
    measured = stages.run(MEASURED, lambda: _measure(out, scale, config.seed))
    rows = {name: ModelSummary(model=str(out / name), **values) for name, values in measured["models"].items()}
    result = QuickstartResult(
        teacher=rows[RUNS[0]],
        student=rows[RUNS[1]],
        cut=rows[CUT],
        baselines={"truncated": rows[RUNS[2]], "random": rows[RUNS[3]]},
        gains={name: Gain(**gain) for name, gain in measured["gains"].items()},
        seconds=stages.seconds,
        report=str(out / MARKDOWN),
    )
    cut = stages.result("truncated").get("perplexity")
    write_reports(result, scale, config.out, (cut["student"], cut["sequences"]) if cut else None)
    return result


def _shape(file: Path, scale: QuickstartSizes, layers: int) -> str:
    """Write a model configuration with this number of layers; return its path."""
    shape = {"n_layer": layers, "n_head": scale.n_head, "n_embd": scale.n_embd, "n_positions": scale.sequence_length}
    write_text(file, yaml.safe_dump(shape, sort_keys=False))
    return str(file)


def _training(
    config: QuickstartConfig, scale: QuickstartSizes, out: Path, tokens: int, precision: str
) -> dict[str, Any]:
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
        "precision": precision,  # a name, so that no run says what quickstart has no option for
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
        elif out.is_file() or not is_free(out):
            raise ConfigError(f"--out {out} is not empty and does not contain a quickstart run", "give another --out")
        else:
            self._journal = {"settings": settings, "precision": chosen_precision("auto"), "stages": {}}
            write_json(self._file, self._journal)

    @property
    def precision(self) -> str:
        """The precision of all trainings: that of the first, also if the rest run on another machine."""
        return str(self._journal.get("precision") or chosen_precision("auto"))

    @property
    def seconds(self) -> float:
        """Seconds of all finished stages. Each stage counts only the time of the run that finished it."""
        return float(sum(stage["seconds"] for stage in self._journal["stages"].values()))

    def result(self, name: str) -> dict[str, Any]:
        """Return the result of a finished stage as JSON."""
        result: dict[str, Any] = self._journal["stages"][name]["result"]
        return result

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a stage unless it is already finished; return the result of `work` as JSON."""
        stages = self._journal["stages"]
        self._number += 1
        if name in stages and ((self._out / name).is_dir() or name == MEASURED):
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


def _measure(out: Path, scale: QuickstartSizes, seed: int) -> dict[str, Any]:
    """Measure the models: perplexity on the held-out documents, size and speed of decoding; and generate samples.

    Returns:
        The values of a `ModelSummary` for each directory, and the student's `gains`.
    """
    names = (RUNS[0], RUNS[1], CUT, RUNS[2], RUNS[3])
    paths = [str(out / name) for name in names]
    measured = ppl(PplConfig(model=paths, task=[str(out / "data")], batch_size=scale.batch_size))
    greedy = GenerateConfig(model=paths, prompt=[PROMPT], max_new_tokens=scale.new_tokens, seed=seed)
    samples = generate(greedy.model_copy(update={"temperature": 0.8, "top_p": 0.9})).results
    layers = {name: read_json(out / name / "config.json")["n_layer"] for name in names}
    # every prompt is continued by one model after the other, after the warm-up by the samples
    speeds: dict[int, float] = {}
    for text in generate(greedy.model_copy(update={"prompt": [PROMPT] * _SPEED_RUNS})).results:
        shape = layers[Path(text.model).name]
        speeds[shape] = max(speeds.get(shape, 0.0), text.tokens / text.seconds)
    journal = read_json(out / JOURNAL)["stages"]
    models = {
        name: {
            "layers": layers[name],
            "parameters": journal[name]["result"]["parameters"],
            "perplexity": row.perplexity,
            "bytes": (out / name / "model.safetensors").stat().st_size,
            "tokens_per_second": speeds[layers[name]],
            "sample": sample.text,
        }
        for name, row, sample in zip(names, measured.results, samples, strict=True)
    }
    differences = {Path(pair.b).name: pair for pair in measured.paired if Path(pair.a).name == RUNS[1]}
    others = {"cut": CUT, "truncated": RUNS[2], "random": RUNS[3]}
    gains = {
        key: {"loss": -(differences[name].difference or 0.0), "stderr": differences[name].stderr}
        for key, name in others.items()
    }
    return {"models": models, "gains": gains}
