"""Compare optimizers, rates, schedules, batches and decay of `pretrain` at equal tokens and equal time, at two sizes.

    python benchmarks/pretraining.py --work WORK                 # continues the plan where it stopped
    python benchmarks/pretraining.py --work WORK --minutes 30    # starts no run after 30 minutes
    python benchmarks/pretraining.py --work WORK --only muon     # only the variants whose names begin so
    python benchmarks/pretraining.py --report                    # writes the tables, from the results alone
    python benchmarks/pretraining.py --work WORK --tiny          # tries everything in some minutes; no figures

The plan is benchmarks/pretraining/plan.yaml, and TINYGPT2_TEST_DATA names the folder with its texts. Every finished run
is a line of benchmarks/pretraining/results.jsonl and is not run again. All choices are based on the held-out novels.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import math
import os
import shutil
import statistics
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from recipes import begun_within, measured
from result_lines import add_line, finished_runs, is_finished

from tinygpt2 import PregenerateConfig, PretrainConfig, pregenerate, pretrain
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.planning.scaling_law import Law
from tinygpt2.runtime.cpu import fast_products, usable_cores
from tinygpt2.training.schedule import peak_learning_rate

HERE = Path(__file__).parent / "pretraining"
TINY = 4  # steps of a run with --tiny


@dataclass(frozen=True)
class Run:
    """One model to train. These values also identify its line of results.

    Attributes:
        times: the rate of the rule is multiplied by this.
    """

    stage: str
    size: str
    variant: str
    times: float
    tokens: int
    seed: int


class Study:
    """The plan, its texts in a working directory, and the results so far."""

    def __init__(self, work: Path, results: Path, tiny: bool) -> None:
        self.plan: dict[str, Any] = yaml.safe_load((HERE / "plan.yaml").read_text(encoding="utf-8"))
        self.work, self.results, self.tiny = work, results, tiny
        if tiny:
            self.plan |= {"every": 200, "blocks": 8, "curve": 4}
            self.plan["sizes"] = {
                name: {"n_layer": 1, "n_embd": 16 * number, "n_head": 2, "n_positions": 256}
                for number, name in enumerate(self.plan["sizes"], 1)
            }

    def lines(self, *stages: str) -> list[dict[str, Any]]:
        """Return the results of some stages; without names, of all."""
        return [line for line in finished_runs(self.results) if not stages or line["stage"] in stages]

    def prepare(self) -> None:
        """Make the texts, the dataset and the shapes that do not exist yet."""
        shared, length = Path(os.environ["TINYGPT2_TEST_DATA"]), self.plan["sequence_length"]
        novels = self.work / "novels"
        if not novels.is_dir():
            begun = self.work / ".novels"
            with tarfile.open(shared / self.plan["novels"]) as archive:
                members = sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name)
                for member in members[:: self.plan["every"]]:
                    member.name = Path(member.name).name
                    archive.extract(member, begun, filter="data")
            begun.rename(novels)
        if not (self.work / "data").is_dir():
            pregenerate(
                PregenerateConfig(
                    source=[str(novels)], test_source=str(shared / self.plan["held_out"]), sequence_length=length,
                    tokenizer=str(shared / self.plan["tokenizer"]), out=str(self.work / "data"),
                )
            )  # fmt: skip
        for name, shape in self.plan["sizes"].items():
            (self.work / f"{name}.yaml").write_text(yaml.safe_dump(shape))

    def configuration(self, run: Run, out: Path) -> PretrainConfig:
        """Return the options of a run."""
        options = copy.deepcopy(self.plan["common"] | self.plan["variants"][run.variant])
        times = {"rate": run.times} | options.pop("times", {})
        options |= {
            "model_config": str(self.work / f"{run.size}.yaml"), "data": str(self.work / "data"), "out": str(out),
            "seed": run.seed, "save_every": 10**6, "eval_blocks": self.plan["curve"],
        }  # fmt: skip
        steps = TINY if self.tiny else run.tokens // (options["micro_batch_size"] * self.plan["sequence_length"])
        options |= {"max_steps": steps, "eval_every": max(1, steps // 5)}
        rate = peak_learning_rate(PretrainConfig(**options), self.plan["sizes"][run.size]["n_embd"])
        options["learning_rate"] = rate * times["rate"]
        for part in ("embedding", "vector"):
            if (factor := times.get(f"{part}s")) is not None:
                options[f"{part}_learning_rate"] = options["learning_rate"] * factor
        return PretrainConfig(**options)

    def train(self, run: Run) -> None:
        """Train a model and write its line of results. Skip it if there is one already, of any stage."""
        known = asdict(run)
        same = {key: value for key, value in known.items() if key != "stage"}
        if is_finished(self.results, same):
            return
        print(f"{datetime.datetime.now():%H:%M:%S} {known}", flush=True)
        out = self.work / "runs" / "-".join(map(str, known.values()))
        shutil.rmtree(out, ignore_errors=True)  # an interrupted run starts again
        config = self.configuration(run, out)
        result = pretrain(config)
        blocks = load_packed_dataset(str(self.work / "data")).test
        line = {
            **known, "rate": config.learning_rate, **measured(out, blocks, self.plan["blocks"]),
            "seconds": round(result.seconds, 1), "tokens_per_second": round(result.tokens_per_second, 1),
            "parameters": result.parameters, "load": round(os.getloadavg()[0], 1),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "cores": usable_cores(),
        }  # fmt: skip
        add_line(self.results, line)
        shutil.rmtree(out)

    def best(self, variant: str, size: str) -> float:
        """Return the factor of the best rate of a variant in the stage `rates`; 1 if there is none yet."""
        found = [
            (line["loss"], line["times"])
            for line in self.lines("rates")
            if (line["variant"], line["size"]) == (variant, size)
        ]
        return float(min(found)[1]) if found else 1.0

    def runs(self) -> Iterator[Run]:
        """Yield all runs in the order of their worth. Each stage is determined when the stage before it is done."""
        stages, sizes = self.plan["stages"], list(self.plan["sizes"])
        plan = stages["rates"]
        for place in range(max(map(len, plan["variants"].values()))):
            for variant, factors in plan["variants"].items():
                for size in sizes:
                    if place < len(factors):
                        yield Run("rates", size, variant, factors[place], plan["tokens"], plan["seed"])
        plan = stages["lengths"]
        for tokens in plan["tokens"]:
            for size in sizes:
                for variant in plan["variants"]:
                    yield Run("lengths", size, variant, self.best(variant, size), tokens, plan["seed"])
        plan = stages["choices"]
        for size in sizes:
            for variant in plan["variants"]:
                yield Run("choices", size, variant, self.best("muon", size), plan["tokens"], plan["seed"])
        again = stages["again"]
        for size in sizes:
            yield Run("again", size, "muon", self.best("muon", size), again["tokens"], again["seed"])
            for variant in plan["variants"]:
                if (lead := self.lead(variant, size)) is not None and lead[0] < again["close"]:
                    yield Run("again", size, variant, self.best("muon", size), again["tokens"], again["seed"])

    def lead(self, variant: str, size: str, seed: int = 1) -> tuple[float, float] | None:
        """Return how far a variant of `choices` is above Muon, with the paired error; None if a line is missing."""
        factor, tokens = self.best("muon", size), self.plan["stages"]["choices"]["tokens"]
        wanted = {"size": size, "times": factor, "tokens": tokens, "seed": seed}
        lines = {line["variant"]: line for line in self.lines() if wanted == {key: line.get(key) for key in wanted}}
        return paired(lines[variant], lines["muon"]) if {variant, "muon"} <= lines.keys() else None


def paired(line: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return the difference of two losses and its standard error over the groups of held-out blocks."""
    gaps = np.array(line["groups"]) - np.array(other["groups"])
    return float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(len(gaps)))


def report(study: Study) -> str:
    """Return the tables of all lines."""
    text = [
        "# Pre-training compared",
        "",
        "`benchmarks/pretraining.py --report` writes this page from results.jsonl.",
        "",
    ]
    text += [
        'Losses in nats per token on held-out novels. "+-" is the paired standard error over groups of blocks.',
        "",
    ]
    for size in study.plan["sizes"]:
        lines = [line for line in study.lines() if line["size"] == size]
        if not lines:
            continue
        text += [f"## {size}: {lines[0]['parameters']:,} weights", ""]
        text += ["| variant | rate (times the rule's) | tokens | seed | loss | above Muon | tokens/s | load |"]
        text += ["|---|---|---|---|---|---|---|---|"]
        for line in sorted(lines, key=lambda one: (one["tokens"], one["seed"], one["loss"])):
            like = ("tokens", "seed")
            base = [
                one for one in lines
                if one["variant"] == "muon" and one["times"] == study.best("muon", size)
                and all(one[key] == line[key] for key in like)
            ]  # fmt: skip
            gap = "{:+.4f} +- {:.4f}".format(*paired(line, base[0])) if base and base[0] is not line else "-"
            text += [
                f"| {line['variant']} | {line['rate']:.3g} ({line['times']:g}) | {line['tokens']:,} | {line['seed']} | "
                f"{line['loss']:.4f} | {gap} | {line['tokens_per_second']:,.0f} | {line['load']:g} |"
            ]
        text += ["", *reaches(study, size, lines), *foretold(study, size, lines), ""]
    return "\n".join(text)


def reaches(study: Study, size: str, lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield at how many tokens, and in which share of the time, Muon has AdamW's loss of each length.

    The tokens lie between those of two runs: the loss is taken as straight in the logarithm of the tokens.
    """
    muon, adamw = (
        {line["tokens"]: line for line in lines if (line["variant"], line["times"], line["seed"]) == (name, factor, 1)}
        for name, factor in ((name, study.best(name, size)) for name in ("muon", "adamw"))
    )
    if len(muon) < 2 or not adamw:
        return
    speed = statistics.median(line["tokens_per_second"] for line in adamw.values()) / statistics.median(
        line["tokens_per_second"] for line in muon.values()
    )
    lengths = sorted(muon)
    losses = [muon[tokens]["loss"] for tokens in lengths]
    for tokens, line in sorted(adamw.items()):
        if not min(losses) <= line["loss"] <= max(losses):
            continue
        needed = math.exp(np.interp(-line["loss"], [-loss for loss in losses], np.log(lengths)))
        yield (
            f"- Muon has AdamW's loss of {tokens:,} tokens after about {needed:,.0f} tokens: {needed / tokens:.2f} of "
            f"the tokens, {needed * speed / tokens:.2f} of the time."
        )


def foretold(study: Study, size: str, lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield how far off the longest run of each optimizer is from its prediction by the shorter ones."""
    for name in study.plan["stages"]["lengths"]["variants"]:
        own = {
            line["tokens"]: line["loss"]
            for line in lines
            if (line["variant"], line["times"], line["seed"]) == (name, study.best(name, size), 1)
        }
        if len(own) < 4:
            continue
        *known, longest = sorted(own)
        try:
            found = Law(known, [own[tokens] for tokens in known]).at(longest)
        except ValueError as error:
            yield f"- {name}, {longest:,} tokens: no prediction, {error}."
            continue
        yield (
            f"- {name}, {longest:,} tokens: {found.loss:.3f} +- {found.error:.3f} predicted from the shorter runs, "
            f"{own[longest]:.3f} measured: off by {own[longest] - found.loss:+.3f}."
        )


def main() -> None:
    """Continue the plan, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="directory for texts, datasets and runs")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no new run after this many minutes")
    parser.add_argument("--only", default="", help="only run the variants whose names begin so")
    parser.add_argument("--size", help="only run models of this size")
    parser.add_argument("--tiny", action="store_true", help="try everything at a tiny size, with results in WORK")
    parser.add_argument("--report", action="store_true", help="write report.md beside the results")
    options = parser.parse_args()
    if options.report:
        text = report(Study(Path(), options.results, tiny=False))
        options.results.with_name("report.md").write_text(text, encoding="utf-8")
        return
    if options.work is None or "TINYGPT2_TEST_DATA" not in os.environ:
        raise SystemExit("give --work, and set TINYGPT2_TEST_DATA to the folder that holds the plan's texts")
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / "results.jsonl" if options.tiny else options.results
    study = Study(options.work, results, options.tiny)
    runs = begun_within(options.minutes, study.runs())
    study.prepare()
    with fast_products():
        for run in runs:
            if run.variant.startswith(options.only) and options.size in (None, run.size):
                study.train(run)
    if options.tiny:
        print(report(study))


if __name__ == "__main__":
    main()
