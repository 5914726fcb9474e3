"""Events of two tokenizers: beside all texts of a tiny language, plain sums in float64, and whole documents."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.alignment.test_rank_cut import TEXTS
from tests.alignment.test_redistribution import MERGES, Certain
from tinygpt2.alignment.borders import ByteAligner
from tinygpt2.alignment.events import Events, Graph, counted_pairs
from tinygpt2.data.batches.batch import Batch
from tinygpt2.data.batches.block_readers import MapPart
from tinygpt2.data.dataset import Blocks
from tinygpt2.data.encoding import LETTERS, encode, token_bytes
from tinygpt2.data.tokenizer import END_OF_TEXT, load_tokenizer
from tinygpt2.errors import ModelError
from tinygpt2.models.lm_head import Head
from tinygpt2.objectives.divergences import forward_kl
from tinygpt2.objectives.logits import PredictionObjective, prediction_loss

OTHERS = [("b", "a"), ("ba", "b"), ("a", "a"), ("aa", "ba")]  # merges that cut across those of MERGES
ALIKE = MERGES[:3]  # the first merges: each token of the whole list begins with one token of these
CHINESE = "红楼梦、第一回。甄士隐、梦幻识通灵。the cat, and 贾雨村。"
CPU = torch.device("cpu")


def bpe(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE."""
    names = [*(chr(letter) for letter in LETTERS.values()), *("".join(pair) for pair in merges)]
    backend = Backend(BPE({name: number for number, name in enumerate(names)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)


def unigram(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of sentencepiece's kind."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def graph_of(aligner: ByteAligner, student: PreTrainedTokenizerFast, texts: list[str]) -> Graph:
    """Count the pairs of some texts, each of which is a block between two ends."""
    end = student.eos_token_id
    pairs = set()
    for ids in encode(student, texts):
        block = np.array([end, *ids, end])
        one = aligner.borders(block, whole=True)
        pairs |= set(zip(one.tokens[one.theirs].tolist(), block[one.ours].tolist(), strict=True))
    return Graph.of(np.array(sorted(pairs)), len(student))


def check_all_texts(graph: Graph, teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast) -> list[float]:
    """Compare with a distribution over all texts of seven letters.

    The teacher knows it: its next token's probability is the weight of the texts that begin so and have a border of the
    student there. Returns, for a student that knows nothing, how far below the KL over tokens the one over events is.
    """
    pick, generator = random.Random(0), torch.Generator().manual_seed(0)
    read: list[tuple[tuple[int, ...], dict[int, int], float]] = []
    texts = ["".join(letters) for letters in itertools.product("ab", repeat=7)]
    for theirs, ours in zip(encode(teacher, texts), encode(student, texts), strict=True):
        sizes = [len(name) for name in student.convert_ids_to_tokens(ours)]
        begins = dict(zip(itertools.accumulate(sizes, initial=0), [*ours, student.eos_token_id], strict=True))
        read.append(((*theirs, teacher.eos_token_id), begins, pick.random() ** 4))
    contexts = {theirs[:end] for theirs, _, _ in read for end in range(len(theirs))}
    below = []
    for context in sorted(contexts):
        at = sum(len(name) for name in teacher.convert_ids_to_tokens(list(context)))
        p, q = torch.zeros(len(teacher), dtype=torch.float64), torch.zeros(len(student), dtype=torch.float64)
        for theirs, begins, weight in read:
            if theirs[: len(context)] == context and at in begins:
                p[theirs[len(context)]] += weight
                q[begins[at]] += weight
        if not p.sum():
            continue
        p, q = p / p.sum(), q / q.sum()
        events = Events(graph, len(student), CPU)
        head = events.head(Head(torch.eye(len(p), dtype=torch.float64), len(p)), p.log().clamp(min=-1e4)[None])
        sums = head.logits(torch.zeros(1, 3, dtype=torch.int64))[0].exp()
        for event in range(graph.count):
            inside = torch.from_numpy(graph.ours == event)
            torch.testing.assert_close(sums[inside], q[inside].sum().expand(int(inside.sum())), rtol=1e-9, atol=1e-12)
        logits = torch.randn(1, len(student), generator=generator, dtype=torch.float64)
        soft = head.given(torch.zeros(1, 3, dtype=torch.int64), logits)
        value, _ = forward_kl(logits, soft)
        within = torch.from_numpy((graph.ours == graph.ours[0]) & (graph.ours < graph.count))
        if within[0]:
            value = value - sums[0] * (logits[0, within].logsumexp(-1) - logits[0, 0])
        truth = float((torch.xlogy(q, q) - q * logits[0].log_softmax(-1)).sum())
        below.append(truth - float(value))
        came = torch.nn.functional.pad(q.nonzero(), (2, 0))
        soft = head.given(came, q.log().clamp(min=-1e4).expand(len(came), -1)).exp()
        torch.testing.assert_close(q[came[:, 2]] @ soft, q, rtol=1e-9, atol=1e-12)  # a student that is right stays so
    return below


def test_events_are_those_of_all_texts() -> None:
    teacher, student = bpe(MERGES), bpe(OTHERS)
    texts = ["".join(letters) for letters in itertools.product("ab", repeat=7)]
    graph = graph_of(ByteAligner(teacher, student, None), student, texts)
    assert len(graph.lumped) > 1
    below = check_all_texts(graph, teacher, student)
    assert len(below) > 20
    assert min(below) > -1e-9
    assert max(below) > 1e-3


def test_without_lumps_the_loss_is_that_of_tokens() -> None:
    teacher, student = bpe(MERGES), bpe(ALIKE)
    texts = ["".join(letters) for letters in itertools.product("ab", repeat=7)]
    graph = graph_of(ByteAligner(teacher, student, None), student, texts)
    assert not len(graph.lumped)
    assert max(map(abs, check_all_texts(graph, teacher, student))) < 1e-9


def test_where_neither_teacher_nor_data_says_what_follows_nothing_is_learned() -> None:
    teacher, student = bpe(MERGES), bpe(OTHERS)
    texts = ["".join(letters) for letters in itertools.product("ab", repeat=7)]
    events = Events(graph_of(ByteAligner(teacher, student, None), student, texts), len(student), CPU)
    head = events.head(Head(torch.eye(len(teacher)), len(teacher)), torch.zeros(1, len(teacher)))
    logits = torch.randn(2, events.ours.numel(), generator=torch.Generator().manual_seed(0))
    soft = head.given(torch.tensor([[-1, 0, -1], [-1, 0, 2]]), logits)
    assert torch.equal(soft[0], logits[0])
    assert soft[1, : len(student)].softmax(0)[2] == 1


@pytest.mark.parametrize("merges", [OTHERS, ALIKE])
def test_a_planted_mistake_is_found(merges: list[tuple[str, str]]) -> None:
    teacher, student = bpe(MERGES), bpe(merges)
    texts = ["".join(letters) for letters in itertools.product("ab", repeat=7)]
    graph = graph_of(ByteAligner(teacher, student, None), student, texts)
    theirs = graph.theirs.copy()
    theirs[-2] = (theirs[-2] + 1) % graph.count
    with pytest.raises(AssertionError):
        check_all_texts(dataclasses.replace(graph, theirs=theirs), teacher, student)
    ours = graph.ours.copy()
    ours[student.convert_tokens_to_ids("b")] = graph.ours[student.eos_token_id]
    with pytest.raises(AssertionError):
        check_all_texts(dataclasses.replace(graph, ours=ours), teacher, student)


def components(pairs: list[tuple[int, int]]) -> list[tuple[set[int], set[int]]]:
    """Return the tokens of teacher and student in each event, by joining until nothing changes."""
    parts = [({one}, {other}) for one, other in pairs]
    while True:
        for a, b in itertools.combinations(parts, 2):
            if a[0] & b[0] or a[1] & b[1]:
                parts.remove(a)
                parts.remove(b)
                parts.append((a[0] | b[0], a[1] | b[1]))
                break
        else:
            return parts


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_losses_gradients_and_metrics_are_those_of_plain_sums(scale: float) -> None:
    pairs = [(0, 3), (1, 3), (1, 4), (2, 0), (5, 6), (6, 6), (6, 1), (7, 4), (9, 8)]
    size, rows = 11, 12  # of the teacher's tokens, 3, 4, 8, 10 and 11 occur nowhere
    generator = torch.Generator().manual_seed(0)
    hidden, states = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (40, 30))
    matrix, teacher = (torch.randn(n, 8, generator=generator, dtype=torch.float64) * scale for n in (size, rows))
    records = torch.stack([torch.randint(low, high, (40,), generator=generator) for low, high in ((-9, 30), (0, 1))], 1)
    records[:, 0].clamp_(min=-1)
    records = torch.cat([records, torch.randint(0, size, (40, 1), generator=generator)], 1)
    graph = Graph.of(np.array(pairs), size)
    head = Events(graph, size, CPU).head(Head(teacher, rows), states)
    x, w = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
    objective = PredictionObjective(1.0, 0.5, "forward_kl", chunk=7)
    total, terms = prediction_loss(x, w, records[:, 2], (records, head), objective)
    total.backward()
    y, v = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
    logs = (y @ v.T).log_softmax(-1)
    losses, lumped, left = [], [], []
    for row, (state, _, token) in enumerate(records.tolist()):
        if state < 0:
            losses.append(-logs[row, token])
            continue
        p = (teacher @ states[state]).softmax(-1)
        kept = sum(p[token] for token in (0, 1, 2, 5, 6, 7, 9))
        left.append(1 - kept)
        parts = [(sum(p[one] for one in theirs) / kept, ours) for theirs, ours in components(pairs)]
        lumped.append(sum(mass for mass, ours in parts if len(ours) > 1))
        events = [
            torch.xlogy(mass, mass) - mass * torch.stack([logs[row, one] for one in sorted(ours)]).logsumexp(0)
            for mass, ours in parts
        ]
        same = next((pair for pair in parts if token in pair[1]), None)
        if same is not None:
            events.append(-same[0] * (logs[row, token] - torch.stack([logs[row, one] for one in same[1]]).logsumexp(0)))
        losses.append(sum(events))
    prediction = torch.stack(losses).mean()
    (prediction - 0.5 * logs.gather(1, records[:, 2:]).mean()).backward()
    torch.testing.assert_close(terms["prediction"], prediction.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(w.grad, v.grad, rtol=1e-7, atol=1e-8)
    ids, absent = torch.zeros(1, 1, dtype=torch.int64), torch.tensor(0.25)
    figures = head.figures(type("Read", (), {"ids": ids, "absent": absent})())  # type: ignore[arg-type]
    assert float(figures["teacher/lumped"]) == pytest.approx(float(sum(lumped) / len(lumped)), rel=1e-9)
    assert float(figures["teacher/left_out"]) == pytest.approx(float(sum(left) / len(left)), rel=1e-6, abs=1e-9)
    assert float(figures["teacher/absent"]) == 0.25


def test_the_end_of_a_text_teaches_no_token() -> None:
    """Where no token follows, each event is shared as the student shares it."""
    graph = Graph.of(np.array([(0, 3), (1, 3), (1, 4), (2, 0), (5, 6)]), 8)
    generator = torch.Generator().manual_seed(0)
    states, teacher, student = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((1, 4), (6, 4), (1, 8))
    )
    head = Events(graph, 8, CPU).head(Head(teacher, 6), states)
    end = torch.tensor([[0, 0, -1]])
    sums, shared = head.logits(end)[0].exp(), head.given(end, student)[0].exp()
    for event in range(graph.count):
        inside = torch.from_numpy(graph.ours == event)
        torch.testing.assert_close(shared[inside], sums[inside] * student[0, inside].softmax(0))


def test_padding_is_no_next_token(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    other = bpe([("t", "h"), ("th", "e")])
    ids = torch.tensor(tokenizer("the cat sat on the mat").input_ids)
    padded = Batch(torch.nn.functional.pad(ids, (0, 3))[None], [len(ids)])
    records = ByteAligner(other, tokenizer, None)(padded).records[0]
    assert records[:, 2].tolist() == [*ids[1:].tolist(), -1, -1, -1]
    assert records[len(ids) - 1, 0] >= 0


def spans(tokenizer: PreTrainedTokenizerFast, text: str) -> dict[int, int]:
    """Return the token that begins at each byte of a text: of a byte-level BPE, or of sentencepieces.

    At -1 is the space that the latter put before a text.
    """
    raw, at, found = text.encode(), 0, dict[int, int]()
    ids = encode(tokenizer, [text])[0]
    byte_level = "ByteLevel" in tokenizer.backend_tokenizer.to_str()
    for number, (name, token) in enumerate(zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True)):
        piece = token_bytes(name) if byte_level else name.replace("\u2581", " ").encode()
        if number == 0 and not byte_level:
            at -= 1
        assert at < 0 or raw[at : at + len(piece)] == piece
        found[at] = token
        at += len(piece)
    assert at == len(raw)
    return found


def check_blocks(teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast, length: int) -> float:
    """Compare the borders of blocks with those of whole documents; return the share of these that were found."""
    texts = [" ".join([text] * 3) for text in TEXTS if text and "<|" not in text and "\n" not in text] + [
        "🙂 a 🙂🙂 and 👩‍👩‍👧, the cat 🏳️‍🌈. " * 4,
        CHINESE * 3,
    ]
    stream, expected = [], []
    for text in texts:
        theirs, ours = spans(teacher, text), spans(student, text)
        stream += encode(student, [text])[0] + [student.eos_token_id]
        expected += [theirs.get(at, -1) if at >= 0 else -1 for at in ours] + [teacher.eos_token_id]
    aligner = ByteAligner(teacher, student, None)
    found = 0
    for start in range(0, len(stream) - length, length):
        ids, right = np.array(stream[start : start + length]), expected[start : start + length]
        one = aligner.borders(ids, whole=False)
        for ours, theirs, sure in zip(one.ours.tolist(), one.theirs.tolist(), one.sure.tolist(), strict=True):
            assert right[ours] >= 0, (start, ours)
            assert not sure or one.tokens[theirs] == right[ours], (start, ours)
        found += len(one.ours)
        records = aligner(Batch(torch.from_numpy(ids)[None], None)).records[0]
        states = np.full(length, -1)
        states[one.ours] = one.theirs - 1
        assert records[:, 0].tolist() == states[1:].tolist()
    return found / sum(token >= 0 for token in expected)


@pytest.mark.parametrize("length", [24, 61])
def test_borders_of_english_chinese_and_emoji(tokenizer_dir: Path, length: int) -> None:
    student = load_tokenizer(str(tokenizer_dir))
    pieces = unigram([*TEXTS, "🙂 a 🙂🙂 and 👩‍👩‍👧, the cat 🏳️‍🌈. ", CHINESE])
    other = bpe([("t", "h"), ("Ġ", "th"), ("a", "t"), ("ð", "Ł"), ("c", "at"), ("ç", "º")])
    least = 0.3 if length == 24 else 0.5
    for teacher in (pieces, other):
        assert check_blocks(teacher, student, length) > least
    assert check_blocks(other, pieces, length) > least


def test_gpt2s_borders(shared_data: Path, tokenizer_dir: Path) -> None:
    gpt2 = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    assert check_blocks(gpt2, load_tokenizer(str(tokenizer_dir)), 61) > 0.5


def test_what_a_teacher_cannot_spell_is_no_border(tokenizer_dir: Path) -> None:
    student, teacher = load_tokenizer(str(tokenizer_dir)), unigram(["the cat sat on the mat. "] * 9)
    ids = np.array([student.eos_token_id, *encode(student, ["the cat 🙂 sat on"])[0], student.eos_token_id])
    one = ByteAligner(teacher, student, None).borders(ids, whole=True)
    names = student.convert_ids_to_tokens(ids[one.ours].tolist())
    assert "Ġcat"[:2] in "".join(names)
    assert not any(letter in "".join(names) for letter in "ðŁĻĤ")
    assert [name for name in names if name.startswith("Ġs")]
    assert one.tokens[-1] == teacher.eos_token_id


def test_pairs_are_counted_on_blocks(tokenizer_dir: Path) -> None:
    student, teacher = load_tokenizer(str(tokenizer_dir)), bpe([("t", "h"), ("th", "e"), ("Ġ", "c")])
    stream = [*encode(student, ["the cat and the cat. "])[0], student.eos_token_id] * 9
    rows = [{"input_ids": stream[start : start + 16]} for start in range(0, len(stream) - 16, 16)]
    pairs = counted_pairs(ByteAligner(teacher, student, None), Blocks([MapPart(rows, 16, 320, "train")], 16))
    assert [teacher.eos_token_id, student.eos_token_id] in pairs.tolist()
    assert all(
        one == other == END_OF_TEXT or one.startswith(other) or other.startswith(one)
        for one, other in (
            (teacher.convert_ids_to_tokens(a), student.convert_ids_to_tokens(b)) for a, b in pairs.tolist()
        )
    )


def test_a_certain_teacher_is_certain_of_the_next_event(tokenizer_dir: Path) -> None:
    student, teacher = load_tokenizer(str(tokenizer_dir)), bpe([("t", "h"), ("th", "e"), ("Ġ", "c"), ("Ġc", "a")])
    ids = [student.eos_token_id, *encode(student, ["the cat and the old cat. " * 3])[0], student.eos_token_id]
    aligner = ByteAligner(teacher, student, None)
    read = aligner(Batch(torch.tensor([ids]), None))
    graph = graph_of(aligner, student, ["the cat and the old cat. " * 3])
    tokens = aligner.borders(np.array(ids), whole=True).tokens
    states = torch.from_numpy(np.append(tokens[1:], 0)[: read.ids.shape[1]])[:, None].float()

    class Known(Certain):
        def logits(self, states: torch.Tensor) -> torch.Tensor:
            return super().logits(states.long())

    head = Events(graph, len(student), CPU).head(Known(len(teacher)), states)  # type: ignore[arg-type]
    records = read.records.flatten(0, 1)
    logs = head.logits(records).gather(1, records[:, 2:])[:, 0]
    assert (logs == 0).all()
    assert (records[:, 0] >= 0).all()
    few = ByteAligner(teacher, student, 9)(Batch(torch.tensor([ids]), None))
    assert few.ids.tolist() == read.ids[:, :9].tolist()
    assert torch.equal(few.records[..., 0], records[None, :, 0].where(records[:, 0] < 9, -1))
    padded = torch.tensor([[*ids[:12], 0, 0, 0]])
    cut = aligner(Batch(padded, [12])).records[0, :, 0]
    assert torch.equal(cut[:11], records[:11, 0])
    assert (cut[12:] < 0).all()


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.NFKC(), normalizers.Replace("a", "b")])
def test_normalizers_that_change_bytes_are_refused(tokenizer_dir: Path, normalizer: normalizers.Normalizer) -> None:
    changed = bpe(MERGES)
    changed.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizer])
    plain = load_tokenizer(str(tokenizer_dir))
    for pair in ((changed, plain), (plain, changed)):
        with pytest.raises(ModelError, match="changes them"):
            ByteAligner(*pair, None)
    spaces = bpe(MERGES)
    spaces.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    ByteAligner(spaces, plain, None)
