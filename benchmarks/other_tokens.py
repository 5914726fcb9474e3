"""Compare ways to learn from a teacher with another tokenizer: at equal tokens, and at equal time.

    python benchmarks/other_tokens.py --work WORK --same T --texts novels --held-out a.txt b.txt     # continues
    python benchmarks/other_tokens.py --work WORK --report                                           # the table alone

T is a GPT-2. A second teacher of the same shape learns the texts with a tokenizer of its own, of sentencepiece's kind,
for as many tokens as asked: choose them so that both teachers have equal bits per byte, which the table shows. It
starts from random weights or, with --from-same, from T's, with the means of T's embeddings of each piece. A student is
half of a teacher's layers, refitted, with T's tokenizer. From the second teacher it learns by `--alignment` pieces,
spans or both; `ce` learns from the data alone, from the same start. `same` is half of T and learns from T, and
`same-ce` learns from the data alone, from that start.

Bits per byte are those of `ppl` on the held-out texts. `alignment` is the time to encode a batch again and align it, as
a share of a step; in a run, another thread does it. `sums` is the share of the sums over events, with the teacher's
logits. Every finished run is a line of WORK/results.jsonl and is not run again; an interrupted training of the second
teacher goes on.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from recipes import begun_within
from result_lines import add_line, finished_runs, is_finished
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, PreTrainedTokenizerFast
from vocabulary import bits, bits_of_fixed

from tinygpt2 import (
    DistillConfig,
    FinetuneConfig,
    PregenerateConfig,
    PretrainConfig,
    TruncateStudentConfig,
    distill,
    finetune,
    pregenerate,
    pretrain,
    truncate_student,
)
from tinygpt2.alignment.borders import ByteAligner
from tinygpt2.alignment.events import Events, Graph, counted_pairs
from tinygpt2.alignment.spans import SpanAligner
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.models.lm_head import Head
from tinygpt2.training.metrics import read_metrics

METHODS = ("ce", "pieces", "spans", "both", "same-ce", "same")
_BATCHES = 16  # whose alignment is timed


@dataclass(frozen=True)
class Run:
    """One student to train. These values also identify its line of results.

    Attributes:
        limit: `tokens`, or `minutes`.
        amount: how many of them.
    """

    method: str
    limit: str
    amount: float
    seed: int


class Study:
    """The teachers, the texts, and the directory of the results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work, self.results = options, options.work, options.work / "results.jsonl"
        self.teacher = self.work / "teacher"

    def runs(self) -> list[Run]:
        """Return all runs. Methods take turns, so that a study that stops early still compares them."""
        limits = [("tokens", self.options.tokens), ("minutes", self.options.minutes)]
        seeds = range(1, self.options.seeds + 1)
        return [Run(one, kind, most, seed) for seed in seeds for kind, most in limits if most for one in METHODS]

    def prepare(self) -> None:
        """Make the second teacher's tokenizer, the datasets, the second teacher and the students; what is missing."""
        pieces = self.work / "tokenizer"
        if not pieces.exists():
            sentencepieces(self.options.texts, self.options.pieces).save_pretrained(pieces)
        for name, tokenizer in (("own", str(pieces)), ("data", self.options.same)):
            if not (self.work / name).exists():
                pregenerate(
                    PregenerateConfig(
                        source=[str(path) for path in self.options.texts], tokenizer=tokenizer,
                        out=str(self.work / name), sequence_length=self.options.sequence_length,
                    )
                )  # fmt: skip
        shape = GPT2Config.from_pretrained(self.options.same)
        if not (self.teacher / "model.safetensors").exists():
            self.train_teacher(shape, str(pieces))
        for name, teacher, data, tokens in (
            ("student", str(self.teacher), "own", self.options.same),
            ("same-student", self.options.same, "data", None),
        ):
            if not (self.work / name).exists():
                truncate_student(
                    TruncateStudentConfig(
                        teacher=teacher, num_layers=max(1, shape.n_layer // 2), refit=True, data=str(self.work / data),
                        tokenizer=tokens, out=str(self.work / name),
                    )
                )  # fmt: skip

    def train_teacher(self, shape: GPT2Config, pieces: str) -> None:
        """Train the second teacher, or go on with it."""
        how: dict[str, Any] = {
            "data": str(self.work / "own"), "out": str(self.teacher), "max_tokens": self.options.teacher_tokens,
            "micro_batch_size": self.options.micro_batch_size, "resume": self.teacher.exists(),
        }  # fmt: skip
        if self.options.from_same:
            start = self.work / "with-pieces"
            if not start.exists():
                truncate_student(
                    TruncateStudentConfig(
                        teacher=self.options.same, num_layers=shape.n_layer, tokenizer=pieces, out=str(start)
                    )
                )
            finetune(FinetuneConfig(model=str(start), **how))
        else:
            keys = ("n_layer", "n_embd", "n_head", "n_positions")
            written = self.work / "shape.yaml"
            written.write_text(yaml.safe_dump({key: getattr(shape, key) for key in keys}), encoding="utf-8")
            pretrain(PretrainConfig(shape=str(written), **how))

    def train(self, run: Run) -> None:
        """Train one student and write its line of results. Skip it if the line exists already."""
        known = asdict(run)
        if is_finished(self.results, known):
            return
        print(known, flush=True)
        self.prepare()
        out, batch, length = self.work / "run", self.options.micro_batch_size, self.options.sequence_length
        shutil.rmtree(out, ignore_errors=True)  # an interrupted run starts again
        teacher = self.options.same if run.method.startswith("same") else str(self.teacher)
        student = self.work / ("same-student" if run.method.startswith("same") else "student")
        how: dict[str, Any] = {"teacher": teacher}
        if run.method.endswith("ce"):
            how = {"prediction_weight": 0.0, "ce_weight": 1.0}
        elif run.method != "same":
            how["alignment"] = run.method
        limit: dict[str, Any] = {"max_minutes": run.amount}
        if run.limit == "tokens":
            limit = {"max_tokens": round(run.amount)}
        result: Any = distill(
            DistillConfig(
                student=str(student), data=str(self.work / "data"), out=str(out), seed=run.seed,
                micro_batch_size=batch, save_every=10**6, eval_blocks=16, **how, **limit,
            )
        )  # fmt: skip
        rows = read_metrics(out)
        step = batch * length / result.tokens_per_second
        line = {
            **known,
            "bits_per_byte": bits(str(out), self.options.held_out),
            "bits_before": bits_of_fixed(str(student), *self.options.held_out),
            "teacher_bits": bits_of_fixed(teacher, *self.options.held_out),
            "tokens": result.steps * batch * length,
            "step_seconds": step,
            **{key: mean_of(rows, f"teacher/{key}") for key in ("absent", "lumped", "left_out", "span_tokens")},
            "alignment": self.alignment_seconds() / step if "alignment" in how else None,
            "sums": self.sums_seconds() / step if run.method in ("pieces", "both") else None,
        }
        add_line(self.results, line)

    def alignment_seconds(self) -> float:
        """Return how long it takes to encode a micro-batch in the second teacher's tokens and to align it."""
        data = load_packed_dataset(str(self.work / "data"))
        align = SpanAligner(load_tokenizer(str(self.teacher)), data.tokenizer(), None, events=True)
        size = min(self.options.micro_batch_size, len(data.train))
        batch = data.train.batch(list(range(size)))
        return seconds_of(lambda: align(batch))

    @torch.no_grad()
    def sums_seconds(self) -> float:
        """Return how long it takes to make a micro-batch's predictions of events, from a teacher's last hidden states.

        They do not depend on the weights, so these are random.
        """
        data, tokenizer = load_packed_dataset(str(self.work / "data")), load_tokenizer(str(self.teacher))
        align, size = ByteAligner(tokenizer, data.tokenizer(), None), len(data.tokenizer())
        events = Events(Graph.of(counted_pairs(align, data.train), size), size, torch.device("cpu"))
        blocks = align(data.train.batch(list(range(min(self.options.micro_batch_size, len(data.train))))))
        matrix = torch.randn(len(tokenizer), GPT2Config.from_pretrained(self.teacher).n_embd)
        states = torch.randn(blocks.ids.numel(), matrix.shape[1])
        records = blocks.records.flatten(0, 1)
        student = torch.randn(len(records), size)
        head = events.head(Head(matrix, len(matrix)), states)
        return seconds_of(lambda: head.given(records, student))


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long a call takes, the first one left out: it makes threads and takes memory."""
    call()
    start = time.perf_counter()
    for _ in range(_BATCHES):
        call()
    return (time.perf_counter() - start) / _BATCHES


def sentencepieces(texts: list[Path], size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of sentencepiece's kind: a unigram model, and a letter for each space."""
    files = [str(file) for path in texts for file in (sorted(path.rglob("*.txt")) if path.is_dir() else [path])]
    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train(files, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def mean_of(rows: list[dict[str, Any]], name: str) -> float | None:
    """Return the mean of a metric; None if there is none."""
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None


def report(found: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    heading = ["method", "limit", "seed", "bits per byte", "before", "teacher", "tokens (millions)", "step (s)",
               "absent", "lumped", "span (tokens)", "alignment / step", "sums / step"]  # fmt: skip
    table = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    for line in sorted(found, key=lambda one: (one["limit"], one["amount"], METHODS.index(one["method"]), one["seed"])):
        rest = [
            (line["absent"], ".1%"), (line["lumped"], ".1%"), (line["span_tokens"], ".2f"), (line["alignment"], ".1%"),
            (line["sums"], ".1%"),
        ]  # fmt: skip
        cells = [
            line["method"], f"{line['amount']:g} {line['limit']}", str(line["seed"]), f"{line['bits_per_byte']:.4f}",
            f"{line['bits_before']:.4f}", f"{line['teacher_bits']:.4f}", f"{line['tokens'] / 1e6:.2f}",
            f"{line['step_seconds']:.3f}", *("" if value is None else f"{value:{form}}" for value, form in rest),
        ]  # fmt: skip
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def main() -> None:
    """Run the study, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for datasets, models and results")
    parser.add_argument("--same", help="a GPT-2, whose tokenizer the students have")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="texts to train on")
    parser.add_argument("--held-out", type=Path, nargs="+", default=[], help="texts to measure on")
    parser.add_argument("--pieces", type=int, default=6000, help="tokens of the second teacher")
    parser.add_argument("--teacher-tokens", type=int, default=100_000_000)
    parser.add_argument("--from-same", action="store_true", help="start the second teacher from T's weights")
    parser.add_argument("--tokens", type=float, default=5e6, help="that each student sees; 0 for no such runs")
    parser.add_argument("--minutes", type=float, default=30, help="time that each student gets; 0 for no such runs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--stop-after", type=float, default=1e9, help="start no new run after this many minutes")
    parser.add_argument("--report", action="store_true", help="only print the table of the results so far")
    options = parser.parse_args()
    study = Study(options)
    if not options.report:
        if not (options.same and options.texts and options.held_out):
            parser.error("give --same, --texts and --held-out, or --report")
        options.work.mkdir(parents=True, exist_ok=True)
        for run in begun_within(options.stop_after, study.runs()):
            study.train(run)
    print(report(finished_runs(study.results)))


if __name__ == "__main__":
    main()
