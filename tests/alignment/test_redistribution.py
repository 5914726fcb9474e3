"""A teacher's predictions in a cut vocabulary: beside all texts of a tiny one, and beside plain sums in float64."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.alignment.test_rank_cut import TEXTS
from tinygpt2.alignment.blocks import RankCutAligner
from tinygpt2.alignment.decomposition import Decomposition
from tinygpt2.alignment.rank_cut import RankCut, cut_by_rank, same_cut
from tinygpt2.alignment.redistribution import NEVER, Redistribution
from tinygpt2.data.batches.batch import Batch
from tinygpt2.data.encoding import LETTERS, encode
from tinygpt2.data.tokenizer import END_OF_TEXT, load_tokenizer
from tinygpt2.models.lm_head import Head
from tinygpt2.objectives.logits import PredictionObjective, prediction_loss

MERGES = [("a", "b"), ("b", "b"), ("ab", "a"), ("aba", "bb"), ("b", "ab"), ("ab", "ab")]
SIZES = [257, 258, 259, 260, 262]


def tiny() -> PreTrainedTokenizerFast:
    """A byte-level BPE with six merges of a and b."""
    letters = [chr(letter) for letter in LETTERS.values()]
    names = [*letters, *("".join(pair) for pair in MERGES)]
    backend = Backend(BPE({name: number for number, name in enumerate(names)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)


def redistributed(found: Decomposition, size: int, p: torch.Tensor, node: int) -> torch.Tensor:
    """Return the student's probabilities from one row of the teacher's."""
    head = Head(torch.eye(len(p), dtype=torch.float64), len(p))
    states = p.log().clamp(min=-1e4)[None]
    moved = Redistribution(found, size, torch.device("cpu")).head(head, states)
    logs = moved.logits(torch.tensor([[0, node, 0]]))
    return logs[0, :size].exp()


def check_all_texts(found: Decomposition, whole: PreTrainedTokenizerFast, small: PreTrainedTokenizerFast) -> int:
    """Compare with a distribution over all texts of eight letters; return the number of comparisons.

    The teacher knows the distribution: its next token's probability is the weight of the texts that begin so.
    """
    texts = ["".join(letters) for letters in itertools.product("ab", repeat=8)]
    pick = random.Random(0)
    weights = {text: pick.random() ** 4 for text in texts}
    teacher = {text: tuple(ids) for text, ids in zip(texts, encode(whole, texts), strict=True)}
    student = {text: tuple(ids) for text, ids in zip(texts, encode(small, texts), strict=True)}
    compared = 0
    contexts = {ids[:end] for ids in teacher.values() for end in range(len(ids))}
    for context in sorted(contexts):
        within = [text for text in texts if teacher[text][: len(context)] == context]
        p = torch.zeros(len(whole), dtype=torch.float64)
        for text in within:
            p[teacher[text][len(context)]] += weights[text]
        p /= p.sum()
        letters = sum(len(whole.convert_ids_to_tokens(token)) for token in context)
        read = len(encode(small, [within[0][:letters]])[0]) if letters else 0
        # how far into the teacher's next token the student has read: nothing, or some of its pieces
        going: dict[tuple[int, ...], list[str]] = {}
        for text in within:
            pieces, ends = student[text][read:], len(whole.convert_ids_to_tokens(teacher[text][len(context)]))
            count = next(
                n for n in range(1, 9) if sum(len(small.convert_ids_to_tokens(one)) for one in pieces[:n]) == ends
            )
            for inside in range(count):
                going.setdefault(pieces[:inside], []).append(text)
        for pieces, remaining in going.items():
            expected = torch.zeros(len(small), dtype=torch.float64)
            for text in remaining:
                expected[student[text][read + len(pieces)]] += weights[text]
            expected /= expected.sum()
            token = teacher[remaining[0]][len(context)]
            node = int(found.nodes[found.starts[token] + len(pieces)])
            torch.testing.assert_close(redistributed(found, len(small), p, node), expected, rtol=1e-9, atol=1e-12)
            compared += 1
    return compared


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_those_of_all_texts(size: int) -> None:
    whole = tiny()
    cut = cut_by_rank(whole, size, len(whole))
    assert check_all_texts(Decomposition.of(whole, cut, len(whole)), whole, cut.tokenizer) > 50


def test_a_planted_mistake_is_found() -> None:
    whole = tiny()
    cut = cut_by_rank(whole, 259, len(whole))
    found = Decomposition.of(whole, cut, len(whole))
    first = found.first.copy()
    wrong = int(np.flatnonzero(found.reachable == whole.convert_tokens_to_ids("abab"))[0])
    first[wrong] = cut.tokenizer.convert_tokens_to_ids("a")
    with pytest.raises(AssertionError):
        check_all_texts(dataclasses.replace(found, first=first), whole, cut.tokenizer)
    pieces = found.inner_pieces.copy()
    pieces[:] = cut.tokenizer.convert_tokens_to_ids("bb")
    with pytest.raises(AssertionError):
        check_all_texts(dataclasses.replace(found, inner_pieces=pieces), whole, cut.tokenizer)


class Certain:
    """The head of a teacher whose states are numbers of tokens, of which it is certain."""

    def __init__(self, size: int) -> None:
        self.size = size

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(states[:, 0], self.size).float() * 1e4


def stream(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return documents in English, Chinese, code and emoji, each with its end."""
    documents = encode(tokenizer, [text * 3 for text in TEXTS if text])
    return [token for ids in documents for token in (*ids, tokenizer.eos_token_id)]


@pytest.mark.parametrize("size", [257, 280, 310])
@pytest.mark.parametrize("length", [7, 32, 33])
def test_every_next_token_follows_from_the_teachers_next_token(tokenizer_dir: Path, size: int, length: int) -> None:
    """A teacher that is certain of its own next token is certain of the student's, but for the words at the ends."""
    whole = load_tokenizer(str(tokenizer_dir))
    check_blocks(whole, cut_by_rank(whole, size, len(whole)), length)


def test_gpt2s_own_blocks(shared_data: Path) -> None:
    whole = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    check_blocks(whole, cut_by_rank(whole, 2000, len(whole)), 64)


def check_blocks(whole: PreTrainedTokenizerFast, cut: RankCut, length: int) -> None:
    aligner = RankCutAligner(whole, cut, len(whole), None)
    ids = stream(cut.tokenizer)
    count = len(ids) // length
    blocks = torch.tensor(ids[: count * length]).view(count, length)
    aligned = aligner(Batch(blocks, None))
    records = aligned.records
    assert torch.equal(records[..., 2], blocks[:, 1:])
    assert aligned.ids.shape[1] <= length
    known = records[..., 0] >= 0
    assert float(aligned.absent) == pytest.approx(1 - float(known.float().mean()))
    head = Certain(len(whole))
    states = torch.nn.functional.pad(aligned.ids.flatten()[1:], (0, 1))[:, None]
    move = Redistribution(aligner.decomposition, len(cut.rows), torch.device("cpu"))
    logs = (
        move.head(head, states).logits(records.flatten(0, 1)).gather(1, records.flatten(0, 1)[:, 2:]).view(known.shape)
    )
    special = cut.tokenizer.eos_token_id
    for row, block in enumerate(blocks.tolist()):
        parts = words(cut.tokenizer, block)
        if parts[0] < 0:  # it begins or ends inside a character
            continue
        for place in range(1, length):
            inside = parts[place] == parts[0] and block[0] != special
            inside |= parts[place] == parts[-1] == parts[place - 1] and block[-1] != special
            if known[row, place - 1] and parts[place] != parts[-1]:
                assert logs[row, place - 1] == 0, (row, place)
            if known[row, place - 1]:
                assert not inside
            elif not inside:
                pytest.fail(f"{row}, {place}: no teacher")


def words(tokenizer: PreTrainedTokenizerFast, block: list[int]) -> list[int]:
    """Return the number of the word that each token of a block belongs to, found letter by letter.

    They are -1 if the block's text cannot be decoded by itself.
    """
    names = tokenizer.convert_ids_to_tokens(block)
    inverse = {chr(letter): byte for byte, letter in LETTERS.items()}
    found: list[int] = []
    documents, start = [], 0
    for place, name in enumerate([*names, END_OF_TEXT]):
        if name == END_OF_TEXT:
            documents.append((start, place))
            start = place + 1
    count = 0
    for begin, end in documents:
        raw = bytes(inverse[letter] for name in names[begin:end] for letter in name)
        text = raw.decode(errors="ignore")
        lead = len(raw) - len(text.encode())
        if lead:
            return [-1] * len(block)
        sizes = [len(piece) for piece, _ in _split(text)]
        of_byte = [count + number for number, size in enumerate(sizes) for _ in range(size)]
        at = 0
        for name in names[begin:end]:
            found.append(of_byte[at])
            at += len(name)
        count += len(sizes)
        if end < len(block):
            found.append(count)
            count += 1
    return found


def _split(text: str) -> list[tuple[str, tuple[int, int]]]:
    return pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text) if text else []


def test_padded_blocks_and_blocks_beyond_the_teachers_positions(tokenizer_dir: Path) -> None:
    whole = load_tokenizer(str(tokenizer_dir))
    cut = cut_by_rank(whole, 280, len(whole))
    ids = encode(cut.tokenizer, ["the cat sat on the big mat and it was happy"])[0]
    blocks = torch.zeros(2, len(ids) + 4, dtype=torch.int64)
    blocks[0, : len(ids)] = torch.tensor(ids)
    blocks[1, :5] = torch.tensor(ids[:5])
    records = RankCutAligner(whole, cut, len(whole), None)(Batch(blocks, [len(ids), 5])).records
    known = records[..., 0] >= 0
    first = len(encode(cut.tokenizer, ["the"])[0])
    assert known[0].tolist() == [False] * (first - 1) + [True] * (len(ids) - first + 1) + [False] * 3
    assert not known[1, 5:].any()
    short = RankCutAligner(whole, cut, len(whole), 4)(Batch(blocks, [len(ids), 5]))
    assert short.ids.shape == (2, 4)
    assert short.records[..., 0].max() < 8
    assert 0.3 < float(short.absent) < 1


@pytest.mark.parametrize("loss", ["forward_kl", "soft_ce", "jsd", "skewed_forward_kl", "total_variation"])
def test_losses_and_gradients_are_those_of_plain_sums(loss: str) -> None:
    whole = tiny()
    cut = cut_by_rank(whole, 259, len(whole))
    found, size, rows = Decomposition.of(whole, cut, len(whole)), 259, len(whole)
    generator = torch.Generator().manual_seed(0)
    hidden, states = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (40, 30))
    matrix, teacher = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (size, rows))
    nodes = torch.tensor([0, *(np.flatnonzero(np.diff(found.inner_starts)) + 1)])  # the others never occur
    bounds = (-1, 30), (0, len(nodes)), (0, size)
    records = torch.stack([torch.randint(low, high, (40,), generator=generator) for low, high in bounds], 1)
    records[:, 1] = nodes[records[:, 1]]
    expected = torch.zeros(40, size, dtype=torch.float64)
    p = (states @ teacher.T)[:, torch.from_numpy(found.reachable)].softmax(-1)
    for row, (state, node, token) in enumerate(records.tolist()):
        if state < 0:
            expected[row, token] = 1
        elif node == 0:
            for place, piece in enumerate(found.first.tolist()):
                expected[row, piece] += p[state, place]
        else:
            span = slice(int(found.inner_starts[node - 1]), int(found.inner_starts[node]))
            for place, piece in zip(found.inner_tokens[span], found.inner_pieces[span], strict=True):
                expected[row, piece] += p[state, place]
            expected[row] /= expected[row].sum()
    results = []
    for labels in (
        (records, Redistribution(found, size, torch.device("cpu")).head(Head(teacher, rows), states)),
        (expected, Head(torch.eye(size, dtype=torch.float64), size)),  # with logarithms as states, as a plain teacher
    ):
        if labels[0] is expected:
            labels = (expected.log().clamp(min=NEVER), labels[1])
        x, w = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
        objective = PredictionObjective(1.0, 0.5, loss, 2.0, chunk=7)
        total, terms = prediction_loss(x, w, records[:, 2], labels, objective)
        total.backward()
        results.append((total.detach(), terms["prediction"], x.grad, w.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


def test_only_cuts_are_recognised(tokenizer_dir: Path) -> None:
    whole = load_tokenizer(str(tokenizer_dir))
    cut = cut_by_rank(whole, 290, 320)
    again = same_cut(whole, cut.tokenizer)
    assert again is not None
    assert again.rows == cut.rows
    assert same_cut(whole, whole) is None
    assert same_cut(cut.tokenizer, whole) is None
    assert same_cut(whole, tiny()) is None
