"""`distill --alignment pieces`: teachers with other tokenizers than their students, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.alignment.conftest import arguments
from tests.alignment.test_pieces import bpe
from tests.conftest import Outcome, make_model
from tinygpt2 import PregenerateConfig, pregenerate
from tinygpt2.alignment.borders import ByteAligner
from tinygpt2.alignment.events import Graph, counted_pairs
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.training.metrics import read_metrics


def test_a_student_learns_from_sentencepieces(
    pieces: Path, student: Path, data: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    given = arguments(pieces, student, data, tmp_path / "s")
    outcome = cli(*given, "--alignment", "pieces", "--max-steps", 10, "--learning-rate", 3e-3)
    assert outcome.code == 0, outcome.err
    assert "events, counted on the data" in outcome.err
    steps = [row for row in read_metrics(tmp_path / "s") if "loss" in row]
    assert all(0 < row["teacher/absent"] < 0.8 for row in steps)
    assert all(0 <= row["teacher/lumped"] <= 1 for row in steps)
    assert all(0 <= row["teacher/left_out"] < 1 for row in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert GPT2LMHeadModel.from_pretrained(str(tmp_path / "s")).config.vocab_size == 320


def test_the_first_loss_is_what_both_models_say(
    pieces: Path, student: Path, data: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    """One step, by the models of transformers and sums over events."""
    train = load_packed_dataset(str(data)).train
    size = len(train)
    given = arguments(pieces, student, data, tmp_path / "s")
    given[given.index("--micro-batch-size") + 1] = size
    assert cli(*given, "--alignment", "pieces", "--max-steps", 1, "--learning-rate", 1e-9).code == 0
    row = next(row for row in read_metrics(tmp_path / "s") if "loss" in row)
    whole, small = load_tokenizer(str(pieces)), load_tokenizer(str(student))
    old, new = (GPT2LMHeadModel.from_pretrained(str(path)).eval().double() for path in (pieces, student))
    aligner = ByteAligner(whole, small, 64)
    graph = Graph.of(counted_pairs(aligner, train), 320)
    inside = [torch.from_numpy(of[:, None] == range(graph.count)).double() for of in (graph.theirs, graph.ours)]
    total, absent = [], 0
    for block in train.batch(list(range(size))).input_ids.long():
        found = aligner.borders(block.numpy(), whole=True)
        full = aligner.borders(block.numpy(), whole=False)
        states = {int(ours): int(theirs) for ours, theirs in zip(full.ours, full.theirs, strict=True)}
        assert set(states) <= set(found.ours.tolist())
        with torch.no_grad():
            theirs = old(torch.from_numpy(found.tokens[:64])[None]).logits[0][:, graph.reachable].softmax(-1)
            ours = new(block[None]).logits[0].log_softmax(-1)
        p, q = theirs @ inside[0], ours.exp() @ inside[1]
        for at in range(1, len(block)):
            if states.get(at, 0) < 1 or states[at] > 64:
                total.append(-float(ours[at - 1, block[at]]))
                absent += 1
                continue
            mass = p[states[at] - 1]
            total.append(float((torch.xlogy(mass, mass) - mass * q[at - 1].log()).sum()))
    assert row["teacher/absent"] == pytest.approx(absent / len(total))
    assert row["loss/prediction"] == pytest.approx(sum(total) / len(total), rel=1e-4)


def test_a_byte_level_teacher_and_a_student_of_sentencepieces(
    pieces: Path, corpus: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    bpe([("t", "h"), ("th", "e"), ("Ġ", "c"), ("r", "e")]).save_pretrained(tmp_path / "t")
    teacher = make_model(tmp_path / "m", tmp_path / "t", vocab_size=261, n_positions=64)
    options = {"tokenizer": str(pieces), "sequence_length": 24, "out": str(tmp_path / "d")}
    pregenerate(PregenerateConfig(source=[str(corpus / "00.txt"), str(corpus / "01.txt")], **options))
    given = arguments(teacher, pieces, tmp_path / "d", tmp_path / "s")
    outcome = cli(*given, "--alignment", "pieces", "--max-steps", 2)
    assert outcome.code == 0, outcome.err
    assert all(row["teacher/absent"] < 1 for row in read_metrics(tmp_path / "s") if "loss" in row)


def test_without_alignment_the_error_names_it(
    pieces: Path, student: Path, data: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    outcome = cli(*arguments(pieces, student, data, tmp_path / "s"))
    assert outcome.code == 4
    assert "--alignment pieces" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hidden-weight", 1), "compares positions"),
        (("--attention-weight", 1), "compares positions"),
        (("--prediction-loss", "jsd"), "jsd needs"),
        (("--temperature", 2), "--temperature 2 changes tokens"),
        (("--document-mask",), "cannot be aligned"),
        (("--teacher-cache", "c"), "--teacher-cache needs the teacher's tokens"),
        (("--on-policy-fraction", 0.5), "--on-policy-fraction needs the teacher's tokens"),
        (("--fraction-growth", 0.1, "--eval-every", 2), "--on-policy-fraction needs the teacher's tokens"),
    ],
)
def test_what_events_do_not_know_is_refused(
    pieces: Path, student: Path, data: Path, tmp_path: Path, options: tuple, message: str, cli: Callable[..., Outcome]
) -> None:
    given = [tmp_path / value if value == "c" else value for value in options]
    outcome = cli(*arguments(pieces, student, data, tmp_path / "s"), "--alignment", "pieces", *given)
    assert (outcome.code, message in outcome.err.replace("\n", " ")) == (2, True), outcome.err


def test_alignment_without_an_effect_is_refused(
    teacher: Path, student: Path, data: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    given = arguments(teacher, student, data, tmp_path / "s")
    outcome = cli(*given, "--alignment", "pieces")
    assert (outcome.code, "has no effect" in outcome.err) == (2, True), outcome.err
    outcome = cli(*given, "--teacher", teacher, "--alignment", "pieces")
    assert (outcome.code, "needs one --teacher" in outcome.err) == (2, True), outcome.err
