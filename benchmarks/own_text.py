"""What learning from sampled text is worth: equal seconds of each recipe after the default one.

    python benchmarks/own_text.py --work WORK --minutes 20   # continues where it stopped
    python benchmarks/own_text.py --work WORK --check        # 60 steps of reverse KL on own text, and 60 default ones
    python benchmarks/own_text.py --work WORK --max-steps 4 --tokens 8192 --texts 8 --blocks 9  # tries every run

Texts, teacher and students are those of the study of recipes (benchmarks/recipes.py, which makes them in WORK). Every
finished run is a line of --results and is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parent))

from recipes import Study, block_losses

from tinygpt2 import DistillConfig, PregenerateConfig, distill, pregenerate
from tinygpt2.data.dataset import Blocks, load_packed_dataset
from tinygpt2.decoding.library import make_decoder
from tinygpt2.decoding.own_text import continued
from tinygpt2.decoding.sampling import Sampling
from tinygpt2.models.loading import load_model, model_config
from tinygpt2.models.teachers.loading import as_teacher
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.own_text.figures import distinct_pairs
from tinygpt2.training.schedule import peak_learning_rate
from tinygpt2.training.step import Step

HERE = Path(__file__).parent / "own_text"
RUNS: dict[str, dict[str, Any]] = {
    "more of the same": {},
    "gkd 0.5, reverse KL": {"recipe": "gkd", "prediction_loss": "reverse_kl"},
    "gkd 0.5, jsd": {"recipe": "gkd"},
    "gkd 1.0, reverse KL": {"recipe": "gkd", "prediction_loss": "reverse_kl", "on_policy_fraction": 1.0},
    "gkd 1.0, jsd": {"recipe": "gkd", "on_policy_fraction": 1.0},
    "distillm": {"recipe": "distillm", "eval_every": 50},
    "minillm": {"recipe": "minillm"},
    "seqkd": {"recipe": "seqkd"},
}
"""Options over the default recipe."""
CHECKS: dict[str, dict[str, Any]] = {
    "default": {},
    "reverse KL on the data": {"prediction_loss": "reverse_kl"},
    "own text": {"on_policy_fraction": 1.0, "on_policy_loss": "reverse_kl", "prompt_tokens": "1:16"},
}
"""Options of --check over the default recipe."""
RATES = (1, 2)  # times the rate of the rule, for --check
PROMPT = 32  # tokens of the held-out blocks that the judged texts continue


@dataclass(frozen=True)
class Comparison:
    """What is trained, and on what.

    Attributes:
        stage: its name in the results.
        students: folder with a student of each size, cut from the teacher.
        runs: folder for what is trained.
        measure: returns the figures of a trained model.
    """

    stage: str
    teacher: str
    data: str
    students: Path
    runs: Path
    measure: Callable[[str], dict[str, Any]]


def main() -> None:
    """Read the options, and run what is missing."""
    parser = arguments(__doc__ or "", HERE / "results.jsonl")
    parser.add_argument("--check", action="store_true", help="only the quick comparison from a fresh cut")
    parser.add_argument("--steps", type=int, default=60, help="of --check")
    options = parser.parse_args()
    study = opened(options)
    study.prepare(*options.sizes)
    if options.check:
        for size in options.sizes:
            check(study, size, options)
        return
    data = load_packed_dataset(str(study.work / "data"))

    def measure(model: str) -> dict[str, Any]:
        losses = block_losses(model, data.test, options.blocks)
        forward = divergence(model, study.teacher, data.test, max(1, options.blocks // 3))
        written = judged(model, study, data.test, options)
        return {"loss": statistics.mean(losses), "forward_kl": forward, **written}

    runs = study.work / "own-text"
    compare_all(study, Comparison("own text", study.teacher, data.name, study.work, runs, measure), options)


def arguments(doc: str, results: Path) -> argparse.ArgumentParser:
    """Return a parser with the options of a comparison at equal time."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="working directory of benchmarks/recipes.py")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--minutes", type=float, default=20, help="of each run")
    parser.add_argument("--max-steps", type=int, help="steps of each run in the place of --minutes: for a try")
    parser.add_argument("--tokens", type=int, default=307_200, help="of the default recipe before")
    parser.add_argument("--texts", type=int, default=256, help="judged texts")
    parser.add_argument("--blocks", type=int, default=600, help="held-out blocks")
    parser.add_argument("--sizes", nargs="+", default=["half", "fifth"])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    return parser


def opened(options: argparse.Namespace) -> Study:
    """Return the study of recipes, whose texts, teacher and students are used, with the results of this one."""
    print(datetime.datetime.now().astimezone().isoformat(timespec="seconds"))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    return Study(options.work, options.results)


def compare_all(study: Study, what: Comparison, options: argparse.Namespace) -> None:
    """Do all runs that are missing."""
    for size, seed, name in itertools.product(options.sizes, options.seeds, options.runs):
        compare(study, what, size, name, seed, options)


def compare(study: Study, what: Comparison, size: str, name: str, seed: int, options: argparse.Namespace) -> None:
    """Train a student of a size further by one recipe, and write its line of results."""
    length = {"minutes": options.minutes} if options.max_steps is None else {"max_steps": options.max_steps}
    key = {"stage": what.stage, "size": size, "run": name, "seed": seed, **length, "tokens_before": options.tokens}
    if done(study, key):
        return
    common = {"teacher": what.teacher, "data": what.data, **study.plan["common"], "eval_blocks": options.blocks}
    start = what.runs / f"start-{size}-{options.tokens}"
    if not (start / "run.json").is_file():
        shutil.rmtree(start, ignore_errors=True)
        distill(DistillConfig(**common, student=str(what.students / size), out=str(start), max_tokens=options.tokens))
    out = what.runs / "-".join(["run", size, name.replace(" ", "-"), str(seed)])
    shutil.rmtree(out, ignore_errors=True)  # an interrupted run starts again
    run = {**common, **RUNS[name], "student": str(start), "out": str(out), "seed": seed}
    limit = {"max_minutes": options.minutes} if options.max_steps is None else {"max_steps": options.max_steps}
    result = distill(DistillConfig(**{**run, **limit}))
    rows = read_metrics(out)
    shares = [row["sample/seconds_share"] for row in rows if "sample/seconds_share" in row]
    line = {**key, "steps": result.steps, "seconds": round(result.seconds, 1)}
    line["sampling_share"] = round(statistics.mean(shares), 4) if shares else 0.0
    study.write({**line, **what.measure(str(out))})


def check(study: Study, size: str, options: argparse.Namespace) -> None:
    """Compare some steps of reverse KL, on the data and on own text, with as many of the default, from a fresh cut."""
    data = study.work / "data-128"
    if not data.is_dir():
        held_out = str(study.shared / study.plan["held_out"])
        source = [str(study.work / "novels")]
        pregenerate(
            PregenerateConfig(
                source=source, test_source=[held_out], tokenizer=study.teacher, sequence_length=128, out=str(data)
            )
        )
    base = {"teacher": study.teacher, "student": str(study.work / size), "data": str(data), "micro_batch_size": 16}
    base |= {"max_steps": options.steps, "eval_blocks": options.blocks, "precision": study.plan["common"]["precision"]}
    default = None
    for name, more in CHECKS.items():
        for factor in RATES:
            key = {"stage": "check", "size": size, "run": name, "rate": factor, "steps": options.steps}
            if (line := done(study, key)) is None:
                out = study.work / "own-text" / f"check-{size}-{name.replace(' ', '-')}-{factor}"
                shutil.rmtree(out, ignore_errors=True)
                config = DistillConfig(**base, **more, out=str(out))
                width = model_config(study.work / size).n_embd
                distill(config.model_copy(update={"learning_rate": factor * peak_learning_rate(config, width)}))
                line = {**key, **judged(str(out), study, load_packed_dataset(str(data)).test, options)}
                study.write(line)
            default = default or line
            gain = default["teacher_loss"] - line["teacher_loss"]
            error = math.hypot(default["teacher_loss_stderr"], line["teacher_loss_stderr"])
            print(
                f"{size}, {name}, {factor} times the rate: the teacher's loss on the student's text is "
                f"{line['teacher_loss']:.3f}, {gain:.3f} +- {error:.3f} below the default"
            )


def done(study: Study, key: dict[str, Any]) -> dict[str, Any] | None:
    """Return the line of results of a run, if it is finished."""
    return next((line for line in study.lines(key["stage"]) if key.items() <= line.items()), None)


@torch.no_grad()
def judged(model: str, study: Study, blocks: Blocks, options: argparse.Namespace) -> dict[str, float]:
    """Return the teacher's loss on a student's continuations of held-out blocks, their variety and repetition."""
    student, teacher = load_model(model)[0], as_teacher(load_model(study.teacher)[0])
    chosen = blocks.spaced(options.texts)
    new = min(64, blocks.sequence_length - PROMPT)
    decoder, losses, texts = make_decoder(student), list[float](), list[list[int]]()
    for start in range(0, len(chosen), 32):
        numbers = range(start, min(start + 32, len(chosen)))
        prompts = [chosen.row(number)[:PROMPT].tolist() for number in numbers]
        how = {"seed": 0, "new": new, "ends": [], "sampling": Sampling()}
        made = continued(decoder, prompts, numbers, **how).tokens
        ids = torch.cat([torch.tensor(prompts), made], 1)
        found = teacher.losses(teacher.head(), ids)[0].view(len(ids), -1)[:, PROMPT - 1 :]
        losses += found.mean(1).tolist()
        texts += made.tolist()
    return {
        "teacher_loss": statistics.mean(losses),
        "teacher_loss_stderr": statistics.stdev(losses) / math.sqrt(len(losses)),
        "distinct_2": statistics.mean(map(distinct_pairs, texts)),
        "repeated_4": statistics.mean(map(repeated, texts)),
    }


def repeated(tokens: Sequence[int], length: int = 4) -> float:
    """Return the share of a text's runs of four tokens that have stood in it before."""
    runs = list(zip(*(tokens[at:] for at in range(length)), strict=False))
    return 1 - len(set(runs)) / max(1, len(runs))


@torch.no_grad()
def divergence(model: str, teacher: str, blocks: Blocks, count: int) -> float:
    """Return forward KL from the teacher to a student on held-out blocks, in nats per token."""
    student: GPT2LMHeadModel = load_model(model)[0]
    weights = LossWeights(ce=0.0, prediction=1.0)
    config = DistillConfig(teacher=teacher, student=model, data="data", out="out")
    step = Step(student, load_model(teacher)[0], weights, config)
    some, found = blocks.spaced(count), []
    for start in range(0, len(some), 8):
        batch = some.batch(range(start, min(start + 8, len(some))))
        with torch.enable_grad():  # the step refuses a loss without gradients; dropout is off
            found.append(float(step.train()(batch.input_ids, batch.lengths)[1]["prediction"]))
        step.eval()
    return statistics.mean(found)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
