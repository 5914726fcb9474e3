"""Find the recipe that makes the best student: train with every recipe of a plan on the same tokens in the same order.

    python benchmarks/recipes.py --work WORK             # continues the plan where it stopped
    python benchmarks/recipes.py --work WORK --smallest  # repeats the smallest comparison: is the ranking the same?
    python benchmarks/recipes.py --work WORK --starts    # trains students that were cut in other ways
    python benchmarks/recipes_report.py                  # writes tables and pictures of the results

The plan is benchmarks/recipes/plan.yaml. Every finished run is a line of benchmarks/recipes/results.jsonl and is not
run again. Each stage depends on the results of the stage before it: the losses of the screening decide each recipe's
learning rate and the recipes of the finals. All choices are based on the held-out novels alone.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import shutil
import statistics
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from result_lines import add_line, finished_runs

from tinygpt2 import DistillConfig, PregenerateConfig, TruncateStudentConfig, distill, pregenerate, truncate_student
from tinygpt2.data.batches.block_readers import MapPart
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.dataset import Blocks, PackedDataset, load_packed_dataset
from tinygpt2.models.lm_head import target_losses
from tinygpt2.models.loading import load_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.runtime.cpu import fast_products, usable_cores
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.optimizers import make_optimizer
from tinygpt2.training.schedule import peak_learning_rate
from tinygpt2.training.step import Step
from tinygpt2.training.teacher_cache import TeacherCache
from tinygpt2.training.throughput import step_seconds

T = TypeVar("T")

HERE = Path(__file__).parent / "recipes"
CLOSE = 0.01  # nats per token: recipes that are closer than this may change places on another machine
GROUPS = 40  # groups of neighbouring held-out blocks; we treat the losses of the groups as independent of each other
CURVE = 30_000  # evaluations during a run use this many characters of each held-out novel


@dataclass(frozen=True)
class Run:
    """One student to train. These values also identify its line of results."""

    stage: str
    size: str
    recipe: str
    rate: float
    tokens: int
    seed: int


class Study:
    """The plan, its texts and untrained students in a working directory, and the results so far."""

    def __init__(self, work: Path, results: Path) -> None:
        self.plan: dict[str, Any] = yaml.safe_load((HERE / "plan.yaml").read_text(encoding="utf-8"))
        self.work, self.results = work, results
        if "TINYGPT2_TEST_DATA" not in os.environ:
            raise SystemExit("set TINYGPT2_TEST_DATA to the folder that holds the plan's teacher and texts")
        self.shared = Path(os.environ["TINYGPT2_TEST_DATA"])
        self.teacher = str(self.shared / self.plan["teacher"])

    def lines(self, *stages: str) -> list[dict[str, Any]]:
        """Return the results of some stages."""
        return [line for line in finished_runs(self.results) if line["stage"] in stages]

    def write(self, line: dict[str, Any]) -> None:
        """Add one finished result."""
        line |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "cores": usable_cores()}
        add_line(self.results, line)

    def prepare(self, *sizes: str) -> None:
        """Make the texts, datasets and cut students that do not exist yet; without sizes, students of all sizes."""
        novels, length = self.work / "novels", self.plan["sequence_length"]
        if not novels.is_dir():
            with tarfile.open(self.shared / self.plan["novels"]) as archive:
                members = sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name)
                check = [m for m in members if m.name.endswith(self.plan["check"]["novel"])]
                chosen = [m for m in members if m not in check][:: self.plan["every"]]
                for folder, kept in (("check", check), ("novels", chosen)):
                    begun = self.work / f".{folder}"
                    for member in kept:
                        member.name = Path(member.name).name
                        archive.extract(member, begun, filter="data")
                    shutil.rmtree(self.work / folder, ignore_errors=True)
                    begun.rename(self.work / folder)
        curve = self.work / "curve.txt"
        held_out = self.shared / self.plan["held_out"]
        texts = [path.read_text(encoding="utf-8")[:CURVE] for path in sorted(held_out.iterdir())]
        curve.write_text("\n".join(texts), encoding="utf-8")
        common = {"tokenizer": self.teacher, "sequence_length": length}
        if not (self.work / "data").is_dir():
            pregenerate(
                PregenerateConfig(
                    source=[str(novels)], test_source=str(held_out), out=str(self.work / "data"), **common
                )
            )
        checks = [self.work / "check", *(self.shared / name for name in self.plan["check"]["texts"])]
        for path in checks:
            out = self.work / f"check-{path.stem}"
            if not out.is_dir():
                pregenerate(PregenerateConfig(source=[str(path)], test_fraction=0.0, out=str(out), **common))
        for size, options in (self.plan["sizes"] | self.plan["starts"]["sizes"]).items():
            if size in (sizes or [size]) and not (self.work / size).is_dir():
                truncate_student(
                    TruncateStudentConfig(
                        teacher=self.teacher, data=str(self.work / "data"), out=str(self.work / size), **options
                    )
                )

    def configurations(self, run: Run, out: Path, *, cached: bool = True) -> list[tuple[float, DistillConfig]]:
        """Return the options of a run's stages, each with its share of the tokens."""
        recipe = self.plan["recipes"][run.recipe]
        start = self.work / run.size / ("config.json" if recipe["start"] == "random" else "")
        found: list[tuple[float, DistillConfig]] = []
        for number, stage in enumerate(recipe["stages"]):
            options = {
                "teacher": self.teacher, "data": str(self.work / "data"), **self.plan["common"],
                **({} if "recipe" in stage else self.plan["base"]), **stage,
                "student": str(start if not number else out / f"stage-{number - 1}"),
                "out": str(out / f"stage-{number}"), "learning_rate": run.rate, "seed": run.seed,
                "eval_data": str(self.work / "curve.txt"), "save_every": 10**6,
            }  # fmt: skip
            options |= {key: value[run.size] for key, value in options.items() if isinstance(value, dict)}
            share = float(options.pop("share", 1.0))
            steps = round(run.tokens * share / (options["micro_batch_size"] * self.plan["sequence_length"]))
            options |= {
                "max_steps": steps,
                "eval_every": max(1, steps // 5) if run.stage == "final" else None,
            }
            found.append((share, self.fitting(options, run.size, cached=cached and not number)))
        return found

    def fitting(self, options: dict[str, Any], size: str, *, cached: bool) -> DistillConfig:
        """Adapt the options to the student's shape, and use the teacher cache if the final hidden states suffice."""
        shape, teacher = (json.loads((Path(p) / "config.json").read_text()) for p in (self.work / size, self.teacher))
        plain = DistillConfig(**options)
        if shape["n_embd"] != teacher["n_embd"] and plain.cosine_weight:
            options |= {"cosine_weight": 0.0}
        if shape["n_head"] != teacher["n_head"] and plain.attention_weight:
            options |= {"head_map": "average"}
        last_only = not (plain.attention_weight or plain.relation_weight or plain.hidden_weight)
        if cached and last_only and plain.needs_teacher:
            options |= {"teacher_cache": str(self.work / "cache")}
        if not plain.needs_teacher:
            options |= {"teacher": None}
        return DistillConfig(**options)

    def train(self, run: Run) -> None:
        """Run one recipe and write its line of results. Skip it if the line exists already."""
        known = asdict(run)
        if any(known == {key: line.get(key) for key in known} for line in self.lines(run.stage)):
            return
        print(f"{datetime.datetime.now():%H:%M:%S} {known}", flush=True)
        out = self.work / "runs" / self.results.stem / "-".join(map(str, known.values()))
        shutil.rmtree(out, ignore_errors=True)  # an interrupted run starts again
        data, curve, begun, done, seconds = load_packed_dataset(str(self.work / "data")), [], 0, 0, 0.0
        for _, config in self.configurations(run, out):
            result: Any = distill(config, later(data, run.seed, begun) if begun else None)
            rows = [json.loads(row) for row in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
            curve += [[done + row["tokens"], round(row["eval/loss"], 5)] for row in rows if "eval/loss" in row]
            begun, done = begun + result.steps * config.micro_batch_size, done + result.tokens
            seconds += result.seconds
        losses = block_losses(config.out, data.test, 200 if run.stage == "screen" else 600)
        line = {**known, "loss": float(np.mean(losses)), "groups": grouped(losses), "curve": curve}
        if run.stage in ("smallest", "start"):
            line["checks"] = {
                path.name.removeprefix("check-"): grouped(
                    block_losses(config.out, load_packed_dataset(str(path)).train, 150)
                )
                for path in sorted(self.work.glob("check-*"))
            }
        self.write({**line, "seconds": round(seconds, 1), "parameters": result.parameters})

    def best_rates(self) -> dict[str, tuple[float, float]]:
        """Return each screened recipe's best rate and its loss there."""
        best: dict[str, tuple[float, float]] = {}
        for line in self.lines("screen"):
            if line["loss"] < best.get(line["recipe"], (0.0, math.inf))[1]:
                best[line["recipe"]] = (line["rate"], line["loss"])
        return best

    def screen(self, place: int, recipes: list[str]) -> Iterator[Run]:
        """Yield a run of each recipe at one of its three rates; `place` is the index of the rate, from 0."""
        plan = self.plan["screen"]
        for recipe in recipes:
            rate = self.plan["recipes"][recipe].get("rates", plan["rates"])[place]
            yield Run("screen", plan["size"], recipe, rate, plan["tokens"], plan["seed"])

    def chosen(self) -> list[str]:
        """Return the recipes of the finals: the best of the screening, then the baselines."""
        best = self.best_rates()
        ranked = sorted(best, key=lambda recipe: best[recipe][1])
        winners = [recipe for recipe in ranked if recipe not in self.plan["baselines"]][: self.plan["final"]["best"]]
        return [*winners, *(name for name in self.plan["baselines"] if name in best)]

    def final(self, seed: int) -> Iterator[Run]:
        """Yield the chosen recipes at all sizes. The first seed chooses the rate, the others compare close recipes."""
        tokens = self.plan["final"]["tokens"]
        for size, recipe in itertools.product(self.plan["sizes"], self.chosen()):
            if seed != self.first_seed:
                loss, rate = self.tried(recipe, size)
                if loss <= self.tried(self.plan["default"], size)[0] + self.plan["final"]["close"]:
                    yield Run("final", size, recipe, rate, tokens, seed)
                continue
            rate, _ = self.best_rates()[recipe]
            yield Run("final", size, recipe, rate, tokens, seed)
            # A width that was not screened needs another rate, so halve the rate until that no longer helps.
            while size != self.plan["screen"]["size"] and self.tried(recipe, size)[1] <= rate:
                rate /= 2
                yield Run("final", size, recipe, rate, tokens, seed)

    @property
    def first_seed(self) -> int:
        """The seed of the finals that chooses the learning rates."""
        return int(self.plan["final"]["seeds"][0])

    def tried(self, recipe: str, size: str) -> tuple[float, float]:
        """Return the lowest loss, and its rate, among the rates that the first seed tried at a size."""
        return min(
            (line["loss"], line["rate"]) for line in self.lines("final")
            if (line["recipe"], line["size"], line["seed"]) == (recipe, size, self.first_seed)
        )  # fmt: skip

    def equal_time(self, seed: int) -> Iterator[Run]:
        """Yield cross-entropy with as many tokens as fit into the time of the default recipe."""
        recipe = "ce"
        for size in self.plan["sizes"]:
            speeds = {(line["recipe"], line["cached"]): line["tokens_per_second"] for line in self.lines("time")
                      if line["size"] == size}  # fmt: skip
            ratio = speeds[recipe, False] / speeds[self.plan["default"], False]
            tokens = round(self.plan["final"]["tokens"] * ratio)
            yield Run("equal-time", size, recipe, self.tried(recipe, size)[1], tokens, seed)

    def rule(self, seed: int) -> Iterator[Run]:
        """Yield the default recipe at the default learning rate of `distill`."""
        asked = DistillConfig(teacher="teacher", student="student", data="data", out="out")
        for size in self.plan["sizes"]:
            width = json.loads((self.work / size / "config.json").read_text())["n_embd"]
            rate = peak_learning_rate(asked, width)
            yield Run("rule", size, self.plan["default"], rate, self.plan["final"]["tokens"], seed)

    def smallest(self) -> Iterator[Run]:
        """Yield the runs of the smallest comparison: the default recipe and the baselines."""
        plan, best = self.plan["smallest"], self.best_rates()
        for recipe in [self.plan["default"], *self.plan["baselines"]]:
            yield Run("smallest", plan["size"], recipe, best[recipe][0], plan["tokens"], plan["seed"])

    def starts(self) -> Iterator[Run]:
        """Yield the default recipe for students that were cut in other ways."""
        plan = self.plan["starts"]
        for seed, size in itertools.product(plan["seeds"], plan["sizes"]):
            yield Run("start", size, self.plan["default"], plan["rate"], plan["tokens"], seed)

    def time(self, rounds: int = 2, steps: int = 4) -> None:
        """Measure the speed of each recipe. They take turns, a few steps each, so that the ratios are fair."""
        for size in self.plan["sizes"]:
            done = {(line["recipe"], line["cached"]) for line in self.lines("time") if line["size"] == size}
            wanted = [(name, cached) for name in self.chosen() for cached in (False, True)]
            if all(key in done for key in wanted if not key[1]):
                continue
            racers = {key: list(self.racers(size, *key)) for key in wanted}
            taken: dict[tuple[str, bool], list[float]] = {key: [] for key, stages in racers.items() if stages}
            for turn in range(rounds + 1):
                for key, times in taken.items():
                    seconds = sum(share * sum(racer(steps)) for share, racer in racers[key])
                    if turn:  # the first turn warms up and fills the cache
                        times.append(seconds)
            for (recipe, cached), times in taken.items():
                tokens = steps * self.plan["common"]["micro_batch_size"] * self.plan["sequence_length"]
                speed = round(tokens / statistics.median(times), 1)
                self.write(
                    {"stage": "time", "size": size, "recipe": recipe, "cached": cached, "tokens_per_second": speed}
                )

    def racers(self, size: str, recipe: str, cached: bool) -> Iterator[tuple[float, Any]]:
        """Yield, for each stage, its share of the tokens and a function that runs steps and returns their seconds."""
        run = Run("time", size, recipe, 1e-4, 256_000, 42)
        data = load_packed_dataset(str(self.work / "data"))
        stages = self.configurations(run, self.work / "unused", cached=cached)
        if cached and not any(config.teacher_cache for _, config in stages):
            return
        for share, config in stages:
            student, _ = load_model(str(self.work / size))
            teacher = load_model(self.teacher)[0].requires_grad_(False) if config.needs_teacher else None
            cache = None
            if config.teacher_cache and teacher is not None:
                cache = TeacherCache(Path(config.teacher_cache), teacher, data, config.precision)
            mixed = "no" if config.precision == "fp32" else config.precision
            accelerator = Accelerator(cpu=True, mixed_precision=mixed)
            step = Step(student, teacher, LossWeights.of(config), config, cache)
            module, optimizer = accelerator.prepare(step, make_optimizer(step, config))
            module.train()

            batch = config.micro_batch_size
            race = partial(step_seconds, accelerator, module, optimizer, data.train, batch, batch)
            yield share, race


def later(data: PackedDataset, seed: int, begun: int) -> PackedDataset:
    """Return data with which a new run with this seed sees the blocks that follow the first `begun` ones of a run."""
    count = len(data.train)
    wanted = Shuffle(count, seed)[begun:count]
    places = Shuffle(len(wanted), seed)[0 : len(wanted)]
    rows = [0] * len(wanted)
    for place, row in zip(places, wanted, strict=True):
        rows[place] = row
    items = [{"input_ids": data.train.row(row)} for row in rows]
    return replace(
        data, train=Blocks([MapPart(items, data.sequence_length, data.vocab_size, "train")], data.sequence_length)
    )


@torch.no_grad()
def block_losses(model: str, blocks: Blocks, count: int) -> list[float]:
    """Return the mean loss of about `count` evenly spaced blocks, in nats per token, in float32."""
    student, _ = load_model(model)
    rows, found = list(range(0, len(blocks), max(1, len(blocks) // count))), []
    for start in range(0, len(rows), 8):
        ids = blocks.batch(rows[start : start + 8]).input_ids
        losses, _ = target_losses(student, student.lm_head.weight, ids)
        found += losses.view(len(ids), -1).mean(1).tolist()
    return found


def grouped(losses: list[float]) -> list[float]:
    """Return the mean losses of groups of neighbouring blocks."""
    return [round(float(part.mean()), 5) for part in np.array_split(np.array(losses), min(GROUPS, len(losses)))]


def measured(model: Path, blocks: Blocks, count: int) -> dict[str, Any]:
    """Return the held-out loss of a trained model, by groups too, and the losses on the way."""
    losses = block_losses(str(model), blocks, count)
    curve = [[row["tokens"], round(row["eval/loss"], 5)] for row in read_metrics(model) if "eval/loss" in row]
    return {"loss": float(np.mean(losses)), "groups": grouped(losses), "curve": curve}


def begun_within(minutes: float, runs: Iterable[T]) -> Iterator[T]:
    """Yield runs until so many minutes have passed."""
    until = time.monotonic() + 60 * minutes
    return itertools.takewhile(lambda _: time.monotonic() <= until, runs)


def main() -> None:
    """Continue the plan, or repeat its smallest comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for texts, datasets, students and runs")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no new run after this many minutes")
    parser.add_argument("--smallest", action="store_true", help="only repeat the smallest comparison and check it")
    parser.add_argument("--starts", action="store_true", help="only train students that were cut in other ways")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    with fast_products():
        if options.smallest:
            repeat(options)
        elif options.starts:
            compare_starts(Study(options.work, options.results))
        else:
            go_on(Study(options.work, options.results), options.minutes)


def go_on(study: Study, minutes: float) -> None:
    """Do the runs of the plan that are missing, in its order."""
    runs = begun_within(minutes, everything(study))
    study.prepare()
    for run in runs:
        study.train(run)


def everything(study: Study) -> Iterator[Run]:
    """Yield all runs in the plan's order. Each stage is determined when the stage before it is done."""
    recipes = list(study.plan["recipes"])
    yield from study.screen(1, recipes)
    yield from study.screen(2, recipes)
    yield from study.screen(0, study.chosen())
    study.time()
    for seed in study.plan["final"]["seeds"]:
        yield from study.final(seed)
    yield from study.rule(study.first_seed)
    yield from study.equal_time(study.first_seed)
    yield from study.smallest()
    yield from study.screen(0, recipes)  # if one of these is now among the best, the next call runs its finals
    for seed in study.plan["final"]["seeds"]:
        yield from study.equal_time(seed)


def compare_starts(study: Study) -> None:
    """Train students that were cut in other ways, and print their losses by seed, on held-out and on unseen texts."""
    study.prepare()
    for run in study.starts():
        study.train(run)
    found = [
        {"size": line["size"], "seed": line["seed"], "loss": line["loss"]}
        | {name: statistics.mean(groups) for name, groups in line["checks"].items()}
        for line in study.lines("start")
    ]
    print(json.dumps(found))


def repeat(options: argparse.Namespace) -> None:
    """Repeat the smallest comparison, write its results to a separate file, and compare the rankings."""
    recorded = Study(options.work, options.results)
    again = Study(options.work, options.work / "repeated.jsonl")
    again.results.unlink(missing_ok=True)
    again.prepare()
    for run in recorded.smallest():
        again.train(run)
    before, after = ({line["recipe"]: line["loss"] for line in study.lines("smallest")} for study in (recorded, again))
    rankings = [sorted(losses, key=losses.__getitem__) for losses in (before, after)]
    turned = [
        [better, worse] for better, worse in itertools.combinations(rankings[0], 2)
        if before[worse] - before[better] > CLOSE and after[better] >= after[worse]
    ]  # fmt: skip
    print(json.dumps({"recorded": before, "repeated": after, "rankings": rankings, "turned": turned}))
    raise SystemExit(bool(turned))


if __name__ == "__main__":
    main()
