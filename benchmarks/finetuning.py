"""Compare rates, optimizers and regularisation of `finetune` on a small text that is read several times.

    python benchmarks/finetuning.py --work WORK --model MODEL --text TEXT               # continues where it stopped
    python benchmarks/finetuning.py --work WORK --model MODEL --text TEXT --minutes 30  # starts no run after 30 minutes
    python benchmarks/finetuning.py --report                                            # the table alone

The last tenth of the text is held out. Every finished run is a line of benchmarks/finetuning/results.jsonl and is not
run again. The stages depend on each other: first the rate of each optimizer, then more and fewer passes at the best
rates, then everything else with the optimizer and the rate that were best.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pretraining import paired
from recipes import begun_within, block_losses, measured
from result_lines import add_line, finished_runs, is_finished

from tinygpt2 import FinetuneConfig, PregenerateConfig, finetune, pregenerate
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.runtime.cpu import fast_products, usable_cores

RESULTS = Path(__file__).parent / "finetuning" / "results.jsonl"
DEFAULT = 5e-4  # the rate of `finetune` in version 0.1, with AdamW
RATES: dict[str, list[float]] = {
    "adamw": [DEFAULT, 1e-4, 2e-4, 1e-3, 2e-3, 4e-3],
    "muon": [1e-3, 3e-4, 3e-3, 6e-3, 1e-2],
}
PASSES = 3
CHOICES: dict[str, dict[str, Any]] = {
    "dropout 0.1": {"dropout": 0.1},
    "weight decay 0.1": {"weight_decay": 0.1},
    "average of the last fifth": {"average_tail": 0.2},
    "wsd": {"lr_schedule": "wsd"},
    "linear": {"lr_schedule": "linear"},
}


@dataclass(frozen=True)
class Run:
    """One fine-tuning. These values also identify its line of results.

    Attributes:
        choice: what differs from the defaults, other than optimizer and rate; empty for nothing.
    """

    model: str
    text: str
    optimizer: str
    rate: float
    choice: str
    passes: int
    seed: int


class Study:
    """A model, a text and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.results = options, Path(options.results)
        self.data = options.work / f"data-{options.text.stem}" if options.work else Path()

    def run(self, optimizer: str, rate: float, choice: str = "", passes: int = PASSES, seed: int = 1) -> Run:
        """Return a run of this model on this text."""
        return Run(self.options.model.name, self.options.text.name, optimizer, rate, choice, passes, seed)

    def train(self, run: Run) -> None:
        """Fine-tune and write the line of results, unless it is there already."""
        known = asdict(run)
        if is_finished(self.results, known):
            return
        print(f"{datetime.datetime.now():%H:%M:%S} {known}", flush=True)
        out = self.options.work / "run"
        shutil.rmtree(out, ignore_errors=True)  # an interrupted run starts again
        data = load_packed_dataset(str(self.data))
        batch = 8
        config = FinetuneConfig(
            model=str(self.options.model), data=str(self.data), out=str(out), seed=run.seed, num_epochs=run.passes,
            optimizer=run.optimizer, learning_rate=run.rate, micro_batch_size=batch, save_every=10**6,
            eval_every=len(data.train) // batch, **{"lr_schedule": "cosine", **CHOICES.get(run.choice, {})},
        )  # fmt: skip
        result = finetune(config)
        line = {
            **known, **measured(out, data.test, len(data.test)),
            "before": loss_of_fixed(str(self.options.model), str(self.data)),
            "tokens": int(data.manifest["splits"]["train"]["tokens"]), "seconds": round(result.seconds, 1),
            "parameters": result.parameters, "load": round(os.getloadavg()[0], 1), "cores": usable_cores(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }  # fmt: skip
        add_line(self.results, line)

    def best(self, *optimizers: str) -> tuple[str, float]:
        """Return the optimizer and the rate with the lowest loss after the usual number of passes."""
        wanted = asdict(self.run("", 0.0))
        same = [key for key in wanted if key not in ("optimizer", "rate")]
        found = [
            (line["loss"], line["optimizer"], line["rate"])
            for line in finished_runs(self.results)
            if line["optimizer"] in optimizers and all(line[key] == wanted[key] for key in same)
        ]
        return min(found)[1:] if found else (optimizers[0], RATES[optimizers[0]][0])

    def runs(self) -> Iterator[Run]:
        """Yield all runs. Each stage is determined when the stage before it is done."""
        for place in range(max(map(len, RATES.values()))):
            for optimizer, rates in RATES.items():
                if place < len(rates):
                    yield self.run(optimizer, rates[place])
        for passes in (1, 8):
            yield self.run("adamw", DEFAULT, passes=passes)
            for optimizer in RATES:
                yield self.run(*self.best(optimizer), passes=passes)
        for passes in (PASSES, 8):
            for choice in CHOICES:
                yield self.run(*self.best(*RATES), choice, passes)


def encode_text(text: Path, tokenizer: str, length: int, data: Path) -> None:
    """Make a dataset of a text, unless it is there: the last tenth of the lines is the test split."""
    if data.is_dir():
        return
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = {"train": lines[: len(lines) * 9 // 10], "test": lines[len(lines) * 9 // 10 :]}
    paths = {name: data.with_name(f"{text.stem}-{name}.txt") for name in parts}
    for name, part in parts.items():
        paths[name].write_text("".join(part), encoding="utf-8")
    pregenerate(
        PregenerateConfig(
            source=[str(paths["train"])], test_source=[str(paths["test"])], tokenizer=tokenizer,
            sequence_length=length, out=str(data),
        )
    )  # fmt: skip


@cache
def loss_of_fixed(model: str, data: str) -> float:
    """Return the held-out loss of a model that no longer changes, measured once."""
    test = load_packed_dataset(data).test
    return float(np.mean(block_losses(model, test, len(test))))


def report(lines: list[dict[str, Any]]) -> str:
    """Return the table of all lines: differences are to AdamW at the rate of version 0.1, after as many passes."""
    text = [
        "| model | passes | optimizer | rate | else | held-out loss | above the first default | lowest on the way |"
    ]
    text += ["|---|---|---|---|---|---|---|---|"]
    like = ("model", "text", "passes", "seed")
    for line in sorted(lines, key=lambda one: (one["model"], one["text"], one["passes"], one["loss"])):
        base = [
            one for one in lines
            if (one["optimizer"], one["rate"], one["choice"]) == ("adamw", DEFAULT, "")
            and all(one[key] == line[key] for key in like)
        ]  # fmt: skip
        gap = "{:+.4f} +- {:.4f}".format(*paired(line, base[0])) if base and base[0] is not line else "-"
        lowest = min((loss for _, loss in line["curve"]), default=line["loss"])
        text += [
            f"| {line['parameters']:,} weights | {line['passes']} | {line['optimizer']} | {line['rate']:g} | "
            f"{line['choice'] or '-'} | {line['loss']:.4f} | {gap} | {lowest:.4f} |"
        ]
    return "\n".join(text)


def main() -> None:
    """Do the runs that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="directory for the dataset and the runs")
    parser.add_argument("--model", type=Path, help="the model to fine-tune")
    parser.add_argument("--text", type=Path, help="a text file")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no new run after this many minutes")
    parser.add_argument("--report", action="store_true", help="only print the table of the results so far")
    options = parser.parse_args()
    if not options.report and not (options.work and options.model and options.text):
        parser.error("give --work, --model and --text, or --report")
    study = Study(options)
    if not options.report:
        options.work.mkdir(parents=True, exist_ok=True)
        encode_text(options.text, str(options.model), options.sequence_length, study.data)
        with fast_products():
            for run in begun_within(options.minutes, study.runs()):
                study.train(run)
    print(report(finished_runs(study.results)))


if __name__ == "__main__":
    main()
