"""Which teacher for a small text of one's own: as it is, fine-tuned on the text first, both together, or none.

    python benchmarks/own_corpus.py --work WORK --teacher T --text TEXT    # continues where it stopped
    python benchmarks/own_corpus.py --report                               # the table alone

The last tenth of the text is held out. Every student is half of a teacher's layers, refitted on the text, and reads the
text as often as --passes says: with `distill` and its defaults or, without a teacher, with `finetune` and its defaults.
Every finished run is a line of benchmarks/own_corpus/results.jsonl and is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetuning import encode_text, loss_of_fixed
from pretraining import paired
from recipes import begun_within, measured
from result_lines import add_line, finished_runs, is_finished

from tinygpt2 import DistillConfig, FinetuneConfig, TruncateStudentConfig, distill, finetune, truncate_student
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.models.loading import model_config
from tinygpt2.runtime.cpu import fast_products, usable_cores

RESULTS = Path(__file__).parent / "own_corpus" / "results.jsonl"
METHODS: dict[str, tuple[list[str], str]] = {
    "as it is": (["general"], "general"),
    "fine-tuned first": (["tuned"], "general"),
    "fine-tuned first, and cut from it": (["tuned"], "tuned"),
    "both": (["general", "tuned"], "general"),
    "none": ([], "general"),
}
"""The teachers of each way, and which one the student is cut from."""


@dataclass(frozen=True)
class Run:
    """One student to train. These values also identify its line of results."""

    text: str
    method: str
    passes: int
    seed: int


class Study:
    """The teachers, the text and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.results = options, Path(options.results)
        self.data = str(options.work / "data") if options.work else ""

    def teacher(self, name: str) -> str:
        """Return a teacher's directory."""
        return str(self.options.teacher if name == "general" else self.options.work / "tuned")

    def prepare(self) -> None:
        """Make the dataset, the fine-tuned teacher and both students, if they are missing."""
        encode_text(self.options.text, str(self.options.teacher), self.options.sequence_length, Path(self.data))
        tuned = Path(self.teacher("tuned"))
        if not (tuned / "run.json").is_file():
            shutil.rmtree(tuned, ignore_errors=True)  # an interrupted run starts again
            finetune(
                FinetuneConfig(
                    model=str(self.options.teacher), data=self.data, out=str(tuned),
                    num_epochs=self.options.teacher_passes, micro_batch_size=8,
                )
            )  # fmt: skip
        for name in ("general", "tuned"):
            teacher, out = self.teacher(name), self.options.work / f"student-{name}"
            if not out.is_dir():
                layers = max(1, model_config(Path(teacher)).n_layer // 2)
                truncate_student(
                    TruncateStudentConfig(teacher=teacher, num_layers=layers, refit=True, data=self.data, out=str(out))
                )

    def runs(self) -> Iterator[Run]:
        """Yield all runs; those with few passes come first."""
        for passes in self.options.passes:
            for method in METHODS:
                yield Run(self.options.text.name, method, passes, self.options.seed)

    def train(self, run: Run) -> None:
        """Train a student and write its line of results, unless it is there already."""
        known = asdict(run)
        if is_finished(self.results, known):
            return
        print(f"{datetime.datetime.now():%H:%M:%S} {known}", flush=True)
        teachers, start = METHODS[run.method]
        out, data = self.options.work / "run", load_packed_dataset(self.data)
        shutil.rmtree(out, ignore_errors=True)
        shared: dict[str, Any] = {
            "data": self.data, "out": str(out), "seed": run.seed, "num_epochs": run.passes, "micro_batch_size": 4,
            "save_every": 10**6, "eval_every": len(data.train) // 4,
        }  # fmt: skip
        student, learned_from = str(self.options.work / f"student-{start}"), [self.teacher(name) for name in teachers]
        if teachers:
            result = distill(DistillConfig(student=student, teacher=learned_from, **shared))
        else:
            result = finetune(FinetuneConfig(model=student, **shared))
        line = {
            **known, **measured(out, data.test, len(data.test)),
            "teachers": [loss_of_fixed(teacher, self.data) for teacher in learned_from],
            "tokens": int(data.manifest["splits"]["train"]["tokens"]), "seconds": round(result.seconds, 1),
            "parameters": result.parameters, "cores": usable_cores(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }  # fmt: skip
        add_line(self.results, line)


def report(lines: list[dict[str, Any]]) -> str:
    """Return the table of all lines: differences are to the teacher as it is, after as many passes."""
    text = ["| passes | teacher | teacher's loss | held-out loss | above the teacher as it is | lowest on the way |"]
    text += ["|---|---|---|---|---|---|"]
    for line in sorted(lines, key=lambda one: (one["text"], one["passes"], one["loss"])):
        like = ("text", "passes", "seed")
        base = [one for one in lines if one["method"] == "as it is" and all(one[key] == line[key] for key in like)]
        gap = "{:+.4f} +- {:.4f}".format(*paired(line, base[0])) if base and base[0] is not line else "-"
        teachers = ", ".join(f"{loss:.4f}" for loss in line["teachers"])
        lowest = min((loss for _, loss in line["curve"]), default=line["loss"])
        text += [f"| {line['passes']} | {line['method']} | {teachers} | {line['loss']:.4f} | {gap} | {lowest:.4f} |"]
    return "\n".join(text)


def main() -> None:
    """Do the runs that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="directory for the dataset, the models and the runs")
    parser.add_argument("--teacher", type=Path, help="a GPT-2")
    parser.add_argument("--text", type=Path, help="a text file")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 4], help="of the students over the text")
    parser.add_argument("--teacher-passes", type=int, default=1, help="of the teacher that is fine-tuned")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no new run after this many minutes")
    parser.add_argument("--report", action="store_true", help="only print the table of the results so far")
    options = parser.parse_args()
    if not options.report and not (options.work and options.teacher and options.text):
        parser.error("give --work, --teacher and --text, or --report")
    study = Study(options)
    if not options.report:
        options.work.mkdir(parents=True, exist_ok=True)
        with fast_products():
            study.prepare()
            for run in begun_within(options.minutes, study.runs()):
                study.train(run)
    print(report(finished_runs(study.results)))


if __name__ == "__main__":
    main()
