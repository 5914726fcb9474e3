"""Likelihoods of spans: beside all texts of a tiny language, and plain sums in float64."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.alignment.conftest import arguments
from tests.alignment.test_pieces import OTHERS, bpe, unigram
from tests.alignment.test_redistribution import MERGES
from tests.conftest import Outcome, stopped_after
from tinygpt2 import DistillConfig, distill
from tinygpt2.alignment.blocks import AlignedBlocks
from tinygpt2.alignment.borders import ByteAligner
from tinygpt2.alignment.events import Events, Graph
from tinygpt2.alignment.spans import SpanAligner, SpanHead
from tinygpt2.data.batches.batch import Batch
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.encoding import encode
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.models.lm_head import Head
from tinygpt2.objectives.divergences import IGNORED
from tinygpt2.objectives.logits import PredictionObjective
from tinygpt2.objectives.span_losses import bernoulli_kl, span_loss
from tinygpt2.training.metrics import read_metrics

CPU = torch.device("cpu")


def plain_loss(log_p: torch.Tensor, log_q: torch.Tensor, tau: float) -> torch.Tensor:
    """The KL between two coins, times the temperature."""
    p, q = (log_p / tau).exp(), (log_q / tau).exp()
    return tau * (torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q)))


@pytest.mark.parametrize("tau", [1.0, 7.0, 100.0])
def test_the_loss_of_a_span_and_its_slope(tau: float) -> None:
    log_p, log_q = (-torch.tensor(one, dtype=torch.float64) for one in ([0.3, 5, 1e-3, 40, 2], [0.2, 9, 3, 1e-3, 2]))
    q = log_q.clone().requires_grad_()
    expected = plain_loss(log_p, q, tau)
    expected.sum().backward()
    value, slope = bernoulli_kl(log_p, log_q, tau)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope, q.grad, rtol=1e-9, atol=1e-12)
    assert float(value[-1]) == pytest.approx(0, abs=1e-12)
    assert slope.min() >= -1


def test_a_high_temperature_compares_logarithms() -> None:
    a, b = torch.tensor([0.5, 4.0, 9.0], dtype=torch.float64), torch.tensor([2.0, 1.0, 9.5], dtype=torch.float64)
    value, _ = bernoulli_kl(-a, -b, 1e7)
    torch.testing.assert_close(value, a * (a / b).log() - a + b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("certain", [0.0, -1e-12, -1e30])
def test_a_certain_model_has_a_finite_loss(certain: float) -> None:
    for one, other in ((certain, -3.0), (-3.0, certain)):
        for kind in (torch.float32, torch.float64):
            value, slope = bernoulli_kl(torch.tensor([one], dtype=kind), torch.tensor([other], dtype=kind), 100.0)
            assert math.isfinite(float(value))
            assert math.isfinite(float(slope))


def ends(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """Return where the tokens of a text of letters end."""
    return list(itertools.accumulate(len(name) for name in tokenizer.convert_ids_to_tokens(ids)))


def check_all_texts(shift: int = 0) -> int:
    """Compare with a distribution over all texts of seven letters; return the number of spans that were compared.

    Both models know it: a token's probability is the weight of the texts whose tokens begin so. So the likelihood of a
    span is the weight of the texts that go on with its tokens, divided by that of those with the tokens before it.
    """
    teacher, student = bpe(MERGES), bpe(OTHERS)
    texts, pick = ["".join(letters) for letters in itertools.product("ab", repeat=7)], random.Random(0)
    weights = [pick.random() ** 4 for _ in texts]
    models = []
    for tokenizer in (teacher, student):
        read: dict[tuple[int, ...], float] = {}
        for ids, weight in zip(encode(tokenizer, texts), weights, strict=True):
            for stop in range(len(ids) + 2):
                start = (*ids, tokenizer.eos_token_id)[:stop]
                read[start] = read.get(start, 0.0) + weight
        models.append(read)
    aligner, compared = SpanAligner(teacher, student, None, events=False), 0
    for theirs, ours in zip(encode(teacher, texts), encode(student, texts), strict=True):
        end = student.eos_token_id
        block = aligner(Batch(torch.tensor([[end, *ours, end]]), None))
        assert block.ids[0, : len(theirs) + 2].tolist() == [teacher.eos_token_id, *theirs, teacher.eos_token_id]
        # state n has read the end before the text and n tokens; a row of the head is a token
        table = torch.zeros(block.ids.shape[1], len(teacher), dtype=torch.float64)
        for stop in range(len(theirs) + 1):
            for token in range(len(teacher)):
                table[stop, token] = models[0].get((*theirs[:stop], token), 0.0) / models[0][tuple(theirs[:stop])]
        matrix = torch.eye(len(teacher), dtype=torch.float64)
        records = block.records.flatten(0, 1)
        records[:, 1] += shift * (records[:, 1] > 0)
        head = SpanHead(block, Head(matrix, len(matrix)), table.log().clamp(min=-1e4), [1.0], None)
        found = head.spans(records)
        both = sorted({0, *ends(teacher, theirs)} & {0, *ends(student, ours)})
        places = [dict(zip([0, *ends(one, ids)], range(9), strict=False))
                  for one, ids in ((teacher, theirs), (student, ours))]  # fmt: skip
        expected = [(places[1][one], places[1][two], places[0][one], places[0][two]) for one, two in
                    itertools.pairwise(both)]  # fmt: skip
        expected.append((len(ours), len(ours) + 1, len(theirs), len(theirs) + 1))
        whole = (*theirs, teacher.eos_token_id)
        for start, stop, first, last in expected:
            assert found.inside[start:stop].all()
            assert len(set(found.numbers[start:stop].tolist())) == 1
            value = float(found.teacher[found.numbers[start]].exp())
            assert value == pytest.approx(models[0][whole[:last]] / models[0][whole[:first]], rel=1e-9)
            compared += 1
        assert len(expected) == int(found.used.sum())
    return compared


def test_likelihoods_are_those_of_all_texts() -> None:
    assert check_all_texts() > 300


def test_a_planted_mistake_is_found() -> None:
    with pytest.raises(AssertionError):
        check_all_texts(shift=1)


def random_spans(rows: int, states: int) -> tuple[torch.Tensor, list[tuple[int, int, int, int]]]:
    """Return records of one block, and its spans: the first row and state, and how many of both."""
    pick, row, state, spans = random.Random(1), 3, 2, []
    records = torch.zeros(rows, 3, dtype=torch.int64)
    records[:, 0] = -1
    records[:, 2] = torch.tensor([pick.randrange(11) for _ in range(rows)])
    while row < rows - 4 and state < states - 4:
        ours, theirs = pick.randrange(1, 5), pick.randrange(1, 4)
        spans.append((row, state, ours, theirs))
        records[row : row + ours, 1] = theirs
        records[row, 0] = state
        row, state = row + ours + pick.randrange(3), state + theirs + pick.randrange(2)
    return records, spans


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize(("ce_weight", "temperatures"), [(0.5, [1.0, 100.0]), (0.0, [3.0])])
def test_losses_and_gradients_are_those_of_plain_sums(
    events: bool, ce_weight: float, temperatures: list[float]
) -> None:
    generator, size, rows, width = torch.Generator().manual_seed(0), 11, 12, 44
    hidden, states = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (width, 40))
    matrix, teacher = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (size, rows))
    records, spans = random_spans(width, 40)
    assert len(spans) > 6
    ids = torch.randint(0, rows, (1, 40), generator=generator)
    graph = Graph.of(np.array([(one, one % size) for one in range(rows)]), size)
    made = Events(graph, size, CPU).head(Head(teacher, rows), states) if events else None
    if not events:  # all of a span's rows have its state
        for row, state, ours, _ in spans:
            records[row : row + ours, 0] = state
    head = SpanHead(
        AlignedBlocks(ids, records[None], torch.tensor(0.25)), Head(teacher, rows), states, temperatures, made
    )
    targets = records[:, 2].clone()
    targets[0] = IGNORED
    x, w = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
    objective = PredictionObjective(0.7, ce_weight, "forward_kl", chunk=7)
    total, terms = span_loss(x, w, targets, (records, head), objective)
    total.backward()
    y, v = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
    logs, theirs = (y @ v.T).log_softmax(-1), (states @ teacher.T).log_softmax(-1)
    chosen = logs.gather(1, records[:, 2:])[:, 0]
    compared = []
    for row, state, ours, count in spans:
        log_p = sum(theirs[at, ids[0, at + 1]] for at in range(state, state + count))
        log_q = chosen[row : row + ours].sum()
        compared.append(sum(plain_loss(log_p, log_q, tau) for tau in temperatures) / len(temperatures))
    prediction = torch.stack(compared).sum()
    inside = {at for row, _, ours, _ in spans for at in range(row, row + ours)}
    for row in range(width):
        if not events:
            prediction = prediction - (0 if row in inside or row == 0 else chosen[row])
        elif records[row, 0] < 0:
            prediction = prediction - chosen[row]
        else:
            p = torch.stack([theirs[records[row, 0]].exp()[graph.theirs == one].sum() for one in range(graph.count)])
            q = torch.stack([logs[row].exp()[graph.ours == one].sum() for one in range(graph.count)])
            prediction = prediction + (p * (p / q).log()).sum()
    ce = -chosen[1:].mean()
    expected = 0.7 * prediction / width + ce_weight * ce
    expected.backward()
    torch.testing.assert_close(total.detach(), expected.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(terms["prediction"], prediction.detach() / width, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(terms["spans"], torch.stack(compared).sum().detach() / width, rtol=1e-9, atol=1e-10)
    assert ("ce" in terms) == bool(ce_weight)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(w.grad, v.grad, rtol=1e-7, atol=1e-9)
    figures = head.figures(AlignedBlocks(ids, records[None], torch.tensor(0.25)))
    assert float(figures["teacher/span_tokens"]) == pytest.approx(len(inside) / len(spans))
    assert float(figures["teacher/absent"]) == 0.25
    assert ("teacher/lumped" in figures) == events


def test_a_span_that_is_there_in_parts_is_left_out() -> None:
    records, spans = random_spans(44, 40)
    blocks = AlignedBlocks(torch.zeros(1, 40, dtype=torch.int64), records[None], torch.tensor(0.0))
    head = SpanHead(blocks, Head(torch.randn(5, 8), 5), torch.randn(40, 8), [1.0], None)
    place = next(at for at, (_, _, ours, _) in enumerate(spans) if ours > 1)
    kept = [row for row in range(44) if row != spans[place][0] + 1]
    found = head.spans(records[kept])
    assert int(found.used.sum()) == len(spans) - 1
    assert int(found.inside.sum()) == sum(ours for _, _, ours, _ in spans) - spans[place][2]


def test_spans_need_the_same_text(tokenizer_dir: Path) -> None:
    student, teacher = load_tokenizer(str(tokenizer_dir)), unigram(["the cat sat on the mat. "] * 9)
    end = student.eos_token_id
    ids = np.array([end, *encode(student, ["the cat 🙂 sat on the cat"])[0], end, *encode(student, ["the cat."])[0]])
    one = ByteAligner(teacher, student, None).borders(ids, whole=False)
    names = student.convert_ids_to_tokens(ids.tolist())
    own = teacher.convert_ids_to_tokens(one.tokens.tolist())
    spelled = []
    for ours, theirs, (count, other) in zip(one.ours, one.theirs, one.spans.tolist(), strict=True):
        text = "".join(names[ours : ours + count]).replace("Ġ", " ")
        spelled.append(text)
        if text not in ("", student.eos_token):
            assert text == "".join(own[theirs : theirs + other]).replace("\u2581", " ")
    assert spelled.count(student.eos_token) == 2
    assert "" in spelled
    assert not any(letter in "".join(spelled) for letter in "ðŁĻĤ")
    assert one.spans[-1].tolist() == [0, 0]


@pytest.mark.parametrize("alignment", ["spans", "both"])
def test_a_student_learns_spans(
    pieces: Path, student: Path, data: Path, tmp_path: Path, alignment: str, cli: Callable[..., Outcome]
) -> None:
    given = arguments(pieces, student, data, tmp_path / "s")
    outcome = cli(*given, "--alignment", alignment, "--max-steps", 10, "--learning-rate", 3e-3)
    assert outcome.code == 0, outcome.err
    steps = [row for row in read_metrics(tmp_path / "s") if "loss" in row]
    assert all(0 < row["teacher/absent"] < 0.8 for row in steps)
    assert all(row["teacher/span_tokens"] >= 1 for row in steps)
    assert all(0 <= row["loss/spans"] < row["loss/prediction"] for row in steps)
    assert all(("teacher/lumped" in row) == (alignment == "both") for row in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["loss/spans"] < steps[0]["loss/spans"]


def test_the_first_loss_is_what_both_models_say(
    pieces: Path, student: Path, data: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    """One step, by the models of transformers and the texts of spans."""
    train = load_packed_dataset(str(data)).train
    size = len(train)
    given = arguments(pieces, student, data, tmp_path / "s")
    given[given.index("--micro-batch-size") + 1] = size
    options = ("--alignment", "spans", "--span-temperatures", "1,100")
    assert cli(*given, *options, "--max-steps", 1, "--learning-rate", 1e-9).code == 0
    row = next(row for row in read_metrics(tmp_path / "s") if "loss" in row)
    old, new = (GPT2LMHeadModel.from_pretrained(str(path)).eval().double() for path in (pieces, student))
    aligner = ByteAligner(load_tokenizer(str(pieces)), load_tokenizer(str(student)), 64)
    total = spans = torch.zeros((), dtype=torch.float64)
    count = absent = 0
    for block in train.batch(list(range(size))).input_ids.long():
        found = aligner.borders(block.numpy(), whole=False)
        with torch.no_grad():
            theirs = old(torch.from_numpy(found.tokens[:64])[None]).logits[0].log_softmax(-1)
            ours = new(block[None]).logits[0].log_softmax(-1)
        left = set(range(1, len(block)))
        for at, begin, (more, others) in zip(found.ours, found.theirs, found.spans.tolist(), strict=True):
            if not others or begin == 0 or begin + others > 64:
                continue
            log_p = sum(theirs[place - 1, found.tokens[place]] for place in range(begin, begin + others))
            log_q = sum(ours[place - 1, block[place]] for place in range(at, at + more))
            spans = spans + (plain_loss(log_p, log_q, 1.0) + plain_loss(log_p, log_q, 100.0)) / 2
            left -= set(range(at, at + more))
        total = total - sum(ours[place - 1, block[place]] for place in left)
        count, absent = count + len(block) - 1, absent + len(left)
    assert row["teacher/absent"] == pytest.approx(absent / count)
    assert row["loss/spans"] == pytest.approx(float(spans / count), rel=1e-4)
    assert row["loss/prediction"] == pytest.approx(float((total + spans) / count), rel=1e-4)


def test_the_teachers_loss_is_that_of_its_spans(pieces: Path, student: Path, data: Path, tmp_path: Path) -> None:
    common = {"teacher": str(pieces), "student": str(student), "data": str(data), "max_steps": 1}
    losses = []
    for alignment in ("spans", "pieces"):
        out = tmp_path / alignment
        distill(DistillConfig(**common, alignment=alignment, micro_batch_size=4, out=str(out)))
        losses.append(next(row["teacher/loss"] for row in read_metrics(out) if "teacher/loss" in row))
    assert 0 < losses[1] < losses[0] < 10


@pytest.mark.parametrize("alignment", ["spans", "both"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    pieces: Path, student: Path, data: Path, tmp_path: Path, alignment: str
) -> None:
    options = {"teacher": str(pieces), "student": str(student), "data": str(data), "alignment": alignment}
    options |= {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "save_every": 2, "max_steps": 4}
    distill(DistillConfig(**options, out=str(tmp_path / "whole")))
    with stopped_after(2):
        distill(DistillConfig(**options, out=str(tmp_path / "parts")))
    distill(DistillConfig(**options, out=str(tmp_path / "parts"), resume=True))
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--alignment", "spans", "--prediction-loss", "jsd"), "jsd needs"),
        (("--alignment", "both", "--temperature", 2), "--temperature 2 changes tokens"),
        (("--alignment", "pieces", "--span-temperatures", 2), "--span-temperatures 2 has no effect"),
        (("--alignment", "spans", "--span-temperatures", "1,x"), "expected numbers above 0"),
        (("--alignment", "spans", "--span-temperatures", "1,0"), "expected numbers above 0"),
    ],
)
def test_what_spans_do_not_know_is_refused(
    pieces: Path, student: Path, data: Path, tmp_path: Path, options: tuple, message: str, cli: Callable[..., Outcome]
) -> None:
    outcome = cli(*arguments(pieces, student, data, tmp_path / "s"), *options)
    assert (outcome.code, message in outcome.err.replace("\n", " ")) == (2, True), outcome.err
