"""Compare students with fewer tokens with the uncut one: at equal bytes of text, and at equal time.

    python benchmarks/vocabulary.py --work WORK --teacher T --texts novels --held-out a.txt b.txt     # continues
    python benchmarks/vocabulary.py --work WORK --report                                              # the table alone

All students have the same layers of the teacher, cut and refitted; each vocabulary is a cut of the teacher's tokenizer
by rank, or the whole one. The texts are the same bytes, encoded again for each vocabulary. Bits per byte are those of
`ppl` on the held-out texts. Every finished run is a line of WORK/results.jsonl and is not run again.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recipes import begun_within
from result_lines import add_line, finished_runs, is_finished

from tinygpt2 import (
    DistillConfig,
    PplConfig,
    PregenerateConfig,
    TruncateStudentConfig,
    distill,
    ppl,
    pregenerate,
    truncate_student,
)
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.training.metrics import read_metrics


@dataclass(frozen=True)
class Run:
    """One student to train. These values also identify its line of results.

    Attributes:
        vocabulary: number of tokens; None for all of the teacher's.
        limit: `bytes` of text, or `minutes`.
        amount: how many of them.
    """

    vocabulary: int | None
    limit: str
    amount: float
    seed: int


class Study:
    """The teacher, the texts, and the directory of the results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.results = options, options.work / "results.jsonl"

    def runs(self) -> list[Run]:
        """Return all runs. Vocabularies take turns, so that a study that stops early still compares them."""
        sizes = [None, *self.options.vocab_size]
        limits = [("bytes", self.options.bytes), ("minutes", self.options.minutes)]
        seeds = range(1, self.options.seeds + 1)
        return [Run(size, kind, amount, seed) for seed in seeds for kind, amount in limits if amount for size in sizes]

    def prepared(self, size: int | None) -> tuple[Path, Path]:
        """Return the student before training and its dataset; make what is missing."""
        whole, name = self.options.work / "data", "whole" if size is None else str(size)
        length = self.options.sequence_length
        if not whole.exists():
            sources = [str(path) for path in self.options.texts]
            pregenerate(
                PregenerateConfig(
                    source=sources, tokenizer=self.options.teacher, out=str(whole), sequence_length=length
                )
            )
        student, data = self.options.work / f"student-{name}", whole if size is None else Path(f"{whole}-{name}")
        if not student.exists():
            truncate_student(
                TruncateStudentConfig(
                    teacher=self.options.teacher, num_layers=self.options.num_layers, refit=True, data=str(whole),
                    vocab_size=size, out=str(student),
                )
            )  # fmt: skip
        if not data.exists():
            pregenerate(
                PregenerateConfig(
                    from_dataset=str(whole), tokenizer=str(student), out=str(data), sequence_length=length
                )
            )
        return student, data

    def train(self, run: Run) -> None:
        """Train one student and write its line of results. Skip it if the line exists already."""
        known = asdict(run)
        if is_finished(self.results, known):
            return
        print(known, flush=True)
        student, data = self.prepared(run.vocabulary)
        out, batch = self.options.work / "run", self.options.micro_batch_size
        shutil.rmtree(out, ignore_errors=True)  # an interrupted run starts again
        entry = load_packed_dataset(str(data)).manifest["splits"]["train"]
        step_bytes = batch * self.options.sequence_length * entry["bytes"] / entry["tokens"]
        length: dict[str, Any] = {"max_minutes": run.amount}
        if run.limit == "bytes":
            length = {"max_steps": max(1, round(run.amount / step_bytes))}
        result: Any = distill(
            DistillConfig(
                teacher=self.options.teacher, student=str(student), data=str(data), out=str(out), seed=run.seed,
                micro_batch_size=batch, save_every=10**6, eval_blocks=16, **length,
            )
        )  # fmt: skip
        rows = read_metrics(out)
        absent = [row["teacher/absent"] for row in rows if "teacher/absent" in row]
        line = {
            **known,
            "bits_per_byte": bits(str(out), self.options.held_out),
            "bits_before": bits_of_fixed(str(student), *self.options.held_out),
            "teacher_bits": bits_of_fixed(self.options.teacher, *self.options.held_out),
            "step_seconds": batch * self.options.sequence_length / result.tokens_per_second,
            "bytes_seen": result.steps * step_bytes,
            "tokens_per_byte": entry["tokens"] / entry["bytes"],
            "parameters": result.parameters,
            "file_bytes": (out / "model.safetensors").stat().st_size,
            "absent": sum(absent) / len(absent) if absent else 0.0,
        }
        add_line(self.results, line)


def bits(model: str, texts: list[Path]) -> float:
    """Return a model's bits per byte of some texts together."""
    rows = ppl(PplConfig(model=[model], task=[str(path) for path in texts], convention="lm-eval")).results
    return sum(row.bits_per_byte * row.bytes for row in rows) / sum(row.bytes for row in rows)


@cache
def bits_of_fixed(model: str, *texts: Path) -> float:
    """Return the bits per byte of a model that no longer changes, measured once."""
    return bits(model, list(texts))


def report(found: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    heading = [
        "tokens",
        "limit",
        "seed",
        "bits per byte",
        "before",
        "step (s)",
        "text seen (MB)",
        "file (MB)",
        "absent",
    ]
    table = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    for line in found:
        cells = [
            "whole" if line["vocabulary"] is None else f"{line['vocabulary']:,}",
            f"{line['amount']:g} {line['limit']}", str(line["seed"]), f"{line['bits_per_byte']:.4f}",
            f"{line['bits_before']:.4f}", f"{line['step_seconds']:.3f}", f"{line['bytes_seen'] / 1e6:.2f}",
            f"{line['file_bytes'] / 1e6:.2f}", f"{line['absent']:.1%}",
        ]  # fmt: skip
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def main() -> None:
    """Do the runs that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for datasets, students and results")
    parser.add_argument("--teacher", help="a GPT-2 with a byte-level BPE")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="texts to train on")
    parser.add_argument("--held-out", type=Path, nargs="+", default=[], help="texts to measure on")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[4096])
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--bytes", type=float, default=4e6, help="text that each student sees; 0 for no such runs")
    parser.add_argument("--minutes", type=float, default=10, help="time that each student gets; 0 for no such runs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--stop-after", type=float, default=1e9, help="start no new run after this many minutes")
    parser.add_argument("--report", action="store_true", help="only print the table of the results so far")
    options = parser.parse_args()
    study = Study(options)
    if not options.report:
        if not (options.teacher and options.texts and options.held_out):
            parser.error("give --teacher, --texts and --held-out, or --report")
        options.work.mkdir(parents=True, exist_ok=True)
        for run in begun_within(options.stop_after, study.runs()):
            study.train(run)
    print(report(finished_runs(study.results)))


if __name__ == "__main__":
    main()
