"""Cut students to targets, and compare them with cuts of the same size that were made by hand.

    python benchmarks/budget.py --teacher TEACHER --data DATA --work FOLDER [--json]

The cases:

    3M, half, 2M    `truncate-student` with --target-params 3M, half of the teacher's parameters, and 2M. Each says how
                    long the search took, and compares one round with several after equally many steps.
    by hand         cuts that a person would try at half of the parameters: of several depths, the widest one with the
                    teacher's ratio of inner units. They are refitted and distilled for as many steps as the student of
                    `half`, with the same recipe, on the same blocks in the same order.
    draft           --for draft with --target-params 1M: the fastest draft beside the one with the lowest loss
    vocabularies    --target-params 3M with --vocab-sizes: the teacher's tokens, half of them and a quarter; in bits per
                    byte

A finished case is a line of FOLDER/results.jsonl and is not run again, so the command continues where it stopped.
Losses are in nats per token above the teacher's, on the same blocks of the dataset's test split.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tinygpt2 import (
    DistillConfig,
    TruncateStudentConfig,
    VerifyConfig,
    cut_to_target,
    distill,
    truncate_student,
    verify,
)
from tinygpt2.compression.calibration import calibration_batches, mean_loss
from tinygpt2.compression.sizes import Shape, space_of
from tinygpt2.config.common import STEP_TOKENS
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.models.loading import load_model, model_config
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.cpu import fast_products, usable_cores
from tinygpt2.utils import progress

CASES = ("3M", "half", "by hand", "2M", "draft", "vocabularies")
_DEPTHS = 4  # of the cuts by hand: the teacher's, and the next smaller ones
_STEP_OF_WIDTH = 8


class Study:
    """The teacher, the data and the results so far."""

    def __init__(self, teacher: str, data: str, work: Path, sequences: int) -> None:
        self.teacher, self.data, self.work, self.sequences = teacher, data, work, sequences
        work.mkdir(parents=True, exist_ok=True)
        self.file = work / "results.jsonl"
        lines = self.file.read_text("utf-8").splitlines() if self.file.is_file() else []
        self.done: dict[str, Any] = {line["case"]: line for line in map(json.loads, lines)}
        self.shape = model_config(Path(teacher))
        self.held_out = calibration_batches(load_packed_dataset(data).test, sequences, torch.device("cpu"))
        self._teacher_loss: float | None = None

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Write a finished case."""
        self.done[name] = {"case": name, **found}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.done[name]) + "\n")

    def above(self, model: str | Path) -> float:
        """Return a model's loss on the held-out blocks above the teacher's."""
        with fast_products():
            if self._teacher_loss is None:
                self._teacher_loss = mean_loss(load_model(self.teacher)[0], self.held_out)
            return mean_loss(load_model(str(model))[0], self.held_out) - self._teacher_loss

    def half(self) -> int:
        """Return half of the teacher's parameters."""
        return count_parameters(load_model(self.teacher)[0]) // 2

    def out(self, name: str) -> Path:
        """Return an empty place for a model."""
        path = self.work / name.replace(" ", "-")
        shutil.rmtree(path, ignore_errors=True)
        return path


def search(study: Study, name: str, target: int, **options: Any) -> None:
    """Search for a student, and measure it."""
    out = study.out(name)
    result = cut_to_target(
        TruncateStudentConfig(teacher=study.teacher, data=study.data, out=str(out), target_params=target, **options)
    )
    study.add(name, {
        "target": target, "parameters": result.parameters, "share_of_target": result.parameters / target,
        "minutes": result.seconds / 60, "cores": usable_cores(), "shape": [len(result.layers), result.n_embd,
        result.n_head, result.n_inner], "steps": result.steps, "tokens": result.tokens, "loss": study.above(out),
        "score": asdict(result.score), "rounds": result.rounds and asdict(result.rounds),
        "verified": verify(VerifyConfig(path=str(out))).ok,
        "candidates": [asdict(one) for one in result.candidates],
    })  # fmt: skip


def vocabularies(study: Study, target: int) -> None:
    """Search through vocabularies, too."""
    whole, out = study.shape.vocab_size, study.out("vocabularies")
    result = cut_to_target(
        TruncateStudentConfig(
            teacher=study.teacher, data=study.data, out=str(out), target_params=target,
            vocab_sizes=",".join(str(whole // part) for part in (1, 2, 4)),
        )
    )  # fmt: skip
    study.add("vocabularies", {
        "parameters": result.parameters, "minutes": result.seconds / 60, "cores": usable_cores(), "steps": result.steps,
        "tokens": result.tokens, "score": asdict(result.score), "vocab_size": result.vocab_size,
        "vocabularies": [asdict(one) for one in result.vocabularies or []],
        "bits_per_byte": result.bits_per_byte and asdict(result.bits_per_byte),
        "verified": verify(VerifyConfig(path=str(out))).ok,
        "candidates": [asdict(one) for one in result.candidates],
    })  # fmt: skip


def hand_shapes(study: Study) -> list[Shape]:
    """Return the cuts that a person would try at half of the teacher's parameters."""
    target = study.half()
    space = space_of(TruncateStudentConfig(teacher="", out="", data="", target_params=target), study.shape)
    whole, found = space.teacher, []
    for layers in range(whole.n_layer, max(0, whole.n_layer - _DEPTHS), -1):
        widths = range(_STEP_OF_WIDTH, whole.n_embd + 1, _STEP_OF_WIDTH)
        shapes = [Shape(layers, width, whole.n_head, whole.n_inner * width // whole.n_embd) for width in widths]
        fitting = [one for one in shapes if space.parameters(one) <= target and one.n_embd % one.n_head == 0]
        found += fitting[-1:]
    return found


def by_hand(study: Study) -> None:
    """Cut, refit and distil the shapes that a person would try."""
    steps = study.done["half"]["steps"]
    length = load_packed_dataset(study.data).sequence_length
    for shape in hand_shapes(study):
        name = f"by hand {shape.n_layer} x {shape.n_embd}"
        if name in study.done:
            continue
        begun, cut, out = time.perf_counter(), study.out("hand-cut"), study.out("hand")
        made = truncate_student(TruncateStudentConfig(
            teacher=study.teacher, data=study.data, out=str(cut), num_layers=shape.n_layer, n_embd=shape.n_embd,
            n_inner=shape.n_inner, refit=True,
        ))  # fmt: skip
        fitted = study.above(cut)
        distill(DistillConfig(
            teacher=study.teacher, student=str(cut), data=study.data, out=str(out), max_steps=steps,
            micro_batch_size=max(1, STEP_TOKENS // length), eval_blocks=1,
        ))  # fmt: skip
        study.add(name, {
            "shape": [shape.n_layer, shape.n_embd, shape.n_head, shape.n_inner], "parameters": made.parameters,
            "fitted": fitted, "loss": study.above(out), "steps": steps, "minutes": (time.perf_counter() - begun) / 60,
        })  # fmt: skip


def show(study: Study) -> None:
    """Print what is done as tables."""
    print("| target | student | parameters | of the target | loss | steps | minutes | verified |\n" + "|---" * 8 + "|")
    for line in study.done.values():
        if "target" in line:
            layers, width, heads, inner = line["shape"]
            print(
                f"| {line['target']:,} | {layers} x {width}, {heads} heads, {inner} inner | {line['parameters']:,} | "
                f"{line['share_of_target']:.1%} | {line['loss']:.4f} | {line['steps']} | {line['minutes']:.1f} | "
                f"{'yes' if line['verified'] else 'no'} |"
            )
    hand = [line for name, line in study.done.items() if name.startswith("by hand")]
    if hand:
        print("\n| by hand | parameters | after the fit | after distillation | steps |\n" + "|---" * 5 + "|")
    for line in hand:
        layers, width, heads, inner = line["shape"]
        print(
            f"| {layers} x {width}, {heads} heads, {inner} inner | {line['parameters']:,} | {line['fitted']:.4f} | "
            f"{line['loss']:.4f} | {line['steps']} |"
        )
    cut = [line for line in study.done.values() if line.get("rounds")]
    if cut:
        print("\n| target | rounds | in one round | in several | steps |\n" + "|---" * 5 + "|")
    for line in cut:
        rounds = line["rounds"]
        print(
            f"| {line['target']:,} | {rounds['rounds']} | {rounds['one']['loss']:.4f} | "
            f"{rounds['several']['loss']:.4f} | {line['steps']} |"
        )
    if found := study.done.get("vocabularies"):
        print(f"\n{found['minutes']:.1f} minutes; bits per byte above the teacher:\n")
        print("| tokens | student | parameters | quick fit | whole fit | distilled |\n" + "|---" * 6 + "|")
        for one in [one for one in found["candidates"] if one["trained"]]:
            losses = " | ".join(f"{one[stage]['loss']:.4f}" for stage in ("quick", "fitted", "trained"))
            shape = f"{one['n_layer']} x {one['n_embd']}, {one['n_head']} heads, {one['n_inner']} inner"
            print(f"| {one['vocab_size']:,} | {shape} | {one['parameters']:,} | {losses} |")
    if "draft" in study.done:
        print("\n| draft | ms per token | loss | accepted | expected speedup |\n" + "|---" * 5 + "|")
        for one in [one for one in study.done["draft"]["candidates"] if one["trained"]]:
            score = one["trained"]
            print(
                f"| {one['n_layer']} x {one['n_embd']}, {one['n_inner']} inner | {one['milliseconds']:.2f} | "
                f"{score['loss']:.4f} | {score['acceptance']:.1%} | {score['speedup']:.2f} |"
            )


def main() -> None:
    """Run the cases that are missing, and print all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a local directory")
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the students and the results")
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument("--sequences", type=int, default=64, help="number of blocks of the test split to measure on")
    parser.add_argument("--json", action="store_true", help="print JSON on one line instead of tables")
    options = parser.parse_args()
    if unknown := set(options.cases.split(",")) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    progress.show()
    study = Study(options.teacher, options.data, options.work, options.sequences)
    targets = {"3M": 3_000_000, "half": study.half(), "2M": 2_000_000, "draft": 1_000_000}
    wanted = options.cases.split(",")
    for name in CASES:
        if name not in wanted:
            continue
        if name == "by hand":
            if "half" not in study.done:
                parser.error("the case `by hand` needs the number of steps of `half`: run that first")
            by_hand(study)
        elif name == "vocabularies" and name not in study.done:
            vocabularies(study, targets["3M"])
        elif name not in study.done:
            search(study, name, targets[name], purpose="draft" if name == "draft" else "loss")
    if options.json:
        print(json.dumps(list(study.done.values())))
    else:
        show(study)


if __name__ == "__main__":
    main()
