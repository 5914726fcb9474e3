"""A search through vocabularies: one text in several of them beside naive merges and plain softmaxes, and the search."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.conftest import Outcome
from tinygpt2 import (
    PregenerateConfig,
    TruncateStudentConfig,
    VerifyConfig,
    cut_to_target,
    pregenerate,
    truncate_student,
    verify,
)
from tinygpt2.alignment.rank_cut import RankCut, cut_by_rank
from tinygpt2.compression.calibration import calibration_batches
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.dataset import PackedDataset, load_packed_dataset
from tinygpt2.data.encoding import encode
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import DataError
from tinygpt2.workflows.cuts import search as module
from tinygpt2.workflows.cuts import timing, vocabularies
from tinygpt2.workflows.cuts.results import CutCandidate, best_of_each_vocabulary
from tinygpt2.workflows.cuts.scoring import ByteJudge, CutScore
from tinygpt2.workflows.cuts.texts import Pieces, SharedText, sizes_in_bytes, spelled_dataset

EOS = "<|endoftext|>"


def merged(token: str, merges: Sequence[Sequence[str]]) -> list[str]:
    """Return what some merges make of the letters of a token: the first merge of the list first, from the left."""
    parts = list(token)
    for left, right in merges:
        at = 0
        while at + 1 < len(parts):
            if (parts[at], parts[at + 1]) == (left, right):
                parts[at : at + 2] = [left + right]
            at += 1
    return parts


def naive(whole: PreTrainedTokenizerFast, small: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[list[int]]:
    """Return the small tokens of each token."""
    merges = json.loads(small.backend_tokenizer.to_str())["model"]["merges"]
    names = whole.convert_ids_to_tokens([int(token) for token in ids])
    parts = [[name] if name == EOS else merged(name, merges) for name in names]
    return [small.convert_tokens_to_ids(one) for one in parts]


def nats(model: GPT2LMHeadModel, ids: Sequence[int], first: int) -> float:
    """Return the float64 loss of the tokens from `first` on."""
    with torch.no_grad():
        p = model(torch.tensor([list(ids)])).logits[0].softmax(-1)
    return -sum(math.log(float(p[place - 1, ids[place]])) for place in range(first, len(ids)))


def naive_bits(
    model: GPT2LMHeadModel, whole: PreTrainedTokenizerFast, small: PreTrainedTokenizerFast,
    blocks: Sequence[Sequence[int]], others: Sequence[PreTrainedTokenizerFast], positions: int,
) -> float:  # fmt: skip
    """Return the bits per byte of what all of some tokenizers can read of blocks in the whole tokenizer's tokens."""
    total, size = 0.0, 0
    for block in blocks:
        count = len(block)
        while any(sum(map(len, naive(whole, one, block[:count]))) > positions for one in others):
            count -= 1
        pieces = naive(whole, small, block[:count])
        total += nats(model, [piece for token in pieces for piece in token], len(pieces[0]))
        names = whole.convert_ids_to_tokens([int(token) for token in block[1:count]])
        size += sum(len(name) for name in names if name != EOS)  # a letter stands for a byte
    return total / math.log(2) / size


@pytest.fixture(scope="module")
def whole(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(tokenizer_dir))


@pytest.fixture(scope="module")
def cuts(whole: PreTrainedTokenizerFast) -> dict[int, RankCut]:
    return {size: cut_by_rank(whole, size, 320) for size in (270, 290)}


@pytest.fixture(scope="module")
def models(trained: Path, cuts: dict[int, RankCut], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The teacher, and the teacher with fewer tokens."""
    root = tmp_path_factory.mktemp("models")
    for size in cuts:
        truncate_student(TruncateStudentConfig(teacher=str(trained), vocab_size=size, out=str(root / str(size))))
    return {320: trained, **{size: root / str(size) for size in cuts}}


def test_a_text_is_spelled_as_the_smaller_tokenizer_encodes_it(
    whole: PreTrainedTokenizerFast, cuts: dict[int, RankCut], corpus: Path
) -> None:
    for text in ("the cat sat on 日本.\n\n  naïve 🙂 1859", (corpus / "03.txt").read_text(encoding="utf-8")):
        ids = np.array(encode(whole, [text])[0])
        for cut in cuts.values():
            pieces = Pieces.of(whole, cut, 320)
            assert pieces.spelled(ids).tolist() == list(encode(cut.tokenizer, [text])[0])
            assert pieces.counts(ids).tolist() == [len(one) for one in naive(whole, cut.tokenizer, ids)]
        assert Pieces.of(whole, None, 320).spelled(ids).tolist() == ids.tolist()
    every = np.arange(320)
    for cut in cuts.values():
        expected = [piece for token in naive(whole, cut.tokenizer, every) for piece in token]
        assert Pieces.of(whole, cut, 320).spelled(every).tolist() == expected


def test_bits_per_byte_are_those_of_plain_softmaxes_on_the_same_bytes(
    whole: PreTrainedTokenizerFast, cuts: dict[int, RankCut], models: dict[int, Path], data: Path
) -> None:
    train = load_packed_dataset(str(data)).train
    blocks = np.stack([train.row(number).astype(np.int64) for number in range(6)])
    batches = [torch.tensor(blocks[:4]), torch.tensor(blocks[4:])]
    pieces = {320: Pieces.of(whole, None, 320)} | {size: Pieces.of(whole, cut, 320) for size, cut in cuts.items()}
    small = {320: whole} | {size: cut.tokenizer for size, cut in cuts.items()}
    sizes, others = sizes_in_bytes(whole, 320), list(small.values())
    text = SharedText(batches, sizes, list(pieces.values()), 32)
    assert text.blocks == 6
    assert text.tokens(pieces[270]) > text.tokens(pieces[290]) > text.tokens(pieces[320])
    for size, path in models.items():
        model = GPT2LMHeadModel.from_pretrained(str(path)).eval()
        exact = naive_bits(model.double(), whole, small[size], blocks, others, 32)
        first = naive_bits(model, whole, small[size], blocks[:4], others, 32)
        fast = GPT2LMHeadModel.from_pretrained(str(path)).eval()
        assert text.bits_per_byte(fast, pieces[size]) == pytest.approx(exact, rel=1e-5)
        assert text.bits_per_byte(fast, pieces[size], 2) == pytest.approx(first, rel=1e-5)
        # what one gets with the whole blocks, which no smaller vocabulary could read
        alone = SharedText(batches, sizes, [pieces[320]], 64)
        if size == 320:
            assert alone.bits_per_byte(fast, pieces[320]) != pytest.approx(exact, rel=1e-3)
    teacher = GPT2LMHeadModel.from_pretrained(str(models[320])).eval()
    assert ByteJudge(text, teacher, pieces[320], pieces[320]).score(teacher, 1.0) == CutScore(0.0)
    student = GPT2LMHeadModel.from_pretrained(str(models[270])).eval()
    score = ByteJudge(text, teacher, pieces[320], pieces[270]).score(student, 1.0)
    expected = text.bits_per_byte(student, pieces[270]) - text.bits_per_byte(teacher, pieces[320])
    assert score == CutScore(pytest.approx(expected))
    assert score.loss > 0  # the tokens of the smaller vocabulary mean something else to a model that was not trained


def test_special_tokens_have_no_bytes(whole: PreTrainedTokenizerFast) -> None:
    sizes = sizes_in_bytes(whole, 330)
    assert sizes[whole.eos_token_id] == 0
    assert sizes[320:].sum() == 0
    ids = encode(whole, [text := "the naïve cat 日本 🙂"])[0]
    assert sizes[np.array(ids)].sum() == len(text.encode())


def test_students_learn_from_the_beginnings_of_the_blocks_that_a_run_reads_first(
    whole: PreTrainedTokenizerFast, cuts: dict[int, RankCut], data: Path
) -> None:
    dataset = load_packed_dataset(str(data))
    cut = cuts[270]
    found = spelled_dataset(dataset, Pieces.of(whole, cut, 320), cut.tokenizer, 5, 43)
    assert (len(found.train), len(found.test), found.sequence_length, found.vocab_size) == (5, 0, 32, 270)
    for row, number in enumerate(Shuffle(len(dataset.train), 43)[0:5]):
        block = naive(whole, cut.tokenizer, dataset.train.row(number))
        assert found.train.row(row).tolist() == [piece for token in block for piece in token][:32]
    every = spelled_dataset(dataset, Pieces.of(whole, cut, 320), cut.tokenizer, 10**9, 43)
    assert len(every.train) == len(dataset.train)


def test_every_vocabulary_has_finalists() -> None:
    ranked = [
        CutCandidate(depth, 32, 4, number, size, 1, 1, 1.0, CutScore(float(number)))
        for number, (depth, size) in enumerate([(4, 320), (4, 320), (4, 320), (3, 320), (2, 320), (4, 270), (3, 270)])
    ]
    chosen = [(one.vocab_size, one.n_inner) for one in best_of_each_vocabulary(ranked, 5)]
    assert chosen == [(320, 0), (270, 5), (320, 1), (270, 6), (320, 3)]
    assert len(best_of_each_vocabulary(ranked, 20)) == 7


def test_the_search_looks_through_vocabularies(
    trained: Path, data: Path, tmp_path: Path, cli: Callable[..., Outcome], small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read = tmp_path / "s", []
    run = module.distill

    def watched(options: object, given: PackedDataset | None = None) -> object:
        read.append(given and given.vocab_size)
        return run(options, given)

    monkeypatch.setattr(module, "distill", watched)
    monkeypatch.setattr(module, "FINALISTS", 3)
    given = ("truncate-student", "--teacher", trained, "--data", data, "--target-params", "45k")
    outcome = cli(*given, "--out", out, "--vocab-sizes", "290,320,270", "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    plain, tokenizer = GPT2LMHeadModel.from_pretrained(str(out)).eval(), load_tokenizer(str(out))
    assert plain.config.vocab_size == len(tokenizer) == result["vocab_size"]
    assert 0.98 * 45_000 <= plain.num_parameters() == result["parameters"] <= 45_000
    assert sorted(read, key=str) == [270, 290, None]  # the teacher's own tokens need no other data
    found = result["candidates"]
    assert {one["vocab_size"] for one in found} == {320, 290, 270}
    assert all(0.98 * 45_000 <= one["parameters"] <= 45_000 for one in found)
    ended = [one for one in found if one.get("trained")]
    assert sorted(one["vocab_size"] for one in ended) == [270, 290, 320]
    assert result["unit"] == "bits per byte"
    assert result["score"]["loss"] == min(one["trained"]["loss"] for one in ended) == ended[0]["trained"]["loss"]
    assert result["vocab_size"] == ended[0]["vocab_size"]
    lengths = {one["vocab_size"]: one["length"] for one in result["vocabularies"]}
    assert lengths[320] == 1 < lengths[290] < lengths[270]
    assert "perplexity" not in result
    assert verify(VerifyConfig(path=str(out))).ok
    card, page = (out / "README.md").read_text(), (out / "report.html").read_text()
    assert "(bits per byte)" in card
    assert "tokens per byte" in card
    assert "after distillation, 270 tokens" in page
    assert "bits per byte above the teacher" in page
    assert "290 tokens: " in outcome.err
    assert "bits per byte above the teacher after the fit, " in outcome.err
    shown = cli(*given, "--out", tmp_path / "t", "--vocab-sizes", "270")
    assert shown.code == 0, shown.err
    assert "losses in bits per byte above the teacher's on the same text" in shown.out

    # the score and the held-out figure, from the saved student and by plain softmaxes
    whole, teacher = load_tokenizer(str(trained)), GPT2LMHeadModel.from_pretrained(str(trained)).eval()
    others = [cut_by_rank(whole, size, 320).tokenizer for size in (290, 270)]
    batches = calibration_batches(load_packed_dataset(str(data)).train, 128, torch.device("cpu"))[1::2]
    judged = [row for ids in batches for row in ids.tolist()]
    bits = [naive_bits(model, whole, own, judged, others, 32) for model, own in ((plain, tokenizer), (teacher, whole))]
    assert result["score"]["loss"] == pytest.approx(bits[0] - bits[1], abs=1e-4)
    assert result["bits_per_byte"]["student"] > result["bits_per_byte"]["teacher"] > 0


def test_small_students_are_cut_in_rounds_whose_last_one_has_their_tokens(
    trained: Path, data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read = module.distill, []

    def watched(options: object, given: PackedDataset | None = None) -> object:
        read.append(given and (given.vocab_size, len(given.train)))
        return run(options, given)

    monkeypatch.setattr(module, "distill", watched)
    out = tmp_path / "s"
    result = cut_to_target(
        TruncateStudentConfig(
            teacher=str(trained), data=str(data), out=str(out), target_params=15_000, vocab_sizes="270,280"
        )
    )
    assert result.rounds is not None
    assert result.rounds.rounds >= 2
    size, rounds = result.vocab_size, result.rounds.rounds
    *_, one, last = [given for given in read if given is not None]
    assert (one, last) == ((size, 4 * 3 * rounds), (size, 4 * 3))
    assert read[-rounds:-1] == [None] * (rounds - 1)
    assert GPT2LMHeadModel.from_pretrained(str(out)).config.vocab_size == len(load_tokenizer(str(out))) == size
    assert verify(VerifyConfig(path=str(out))).ok


def test_times_are_those_of_the_same_text(
    trained: Path, data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def milliseconds(model: GPT2LMHeadModel) -> float:
        shape = model.config
        inside = 1e-4 * shape.n_embd * (shape.n_inner or 4 * shape.n_embd) ** 0.9
        return shape.n_layer * (0.3 + inside) + 1e-3 * shape.vocab_size

    for place in (module, timing, vocabularies):
        monkeypatch.setattr(place, "token_milliseconds", milliseconds)
    config = TruncateStudentConfig(
        teacher=str(trained), data=str(data), out=str(tmp_path / "s"), target_ms=1.6, vocab_sizes="320,270"
    )
    result = cut_to_target(config)
    assert result.vocabularies is not None
    lengths = {one.vocab_size: one.length for one in result.vocabularies}
    student = GPT2LMHeadModel.from_pretrained(str(tmp_path / "s"))
    assert result.milliseconds == pytest.approx(lengths[result.vocab_size] * milliseconds(student))
    assert {one.vocab_size for one in result.candidates} == {320, 270}
    assert all(one.milliseconds <= 1.6 for one in result.candidates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-layers", "2", "--vocab-sizes", "270"), "--vocab-sizes needs --target-params"),
        (("--target-params", "40k", "--vocab-sizes", "270,x"), "expected numbers of tokens such as 8192,4096"),
        (("--target-params", "40k", "--vocab-sizes", "270,270"), "list each vocabulary once"),
        (("--target-params", "40k", "--vocab-sizes", "1,2,3,4,5,6,7,8,9"), "at most 8 of them"),
        (("--target-params", "40k", "--vocab-sizes", "270", "--vocab-size", "280"), "cannot be combined"),
        (("--target-params", "40k", "--vocab-sizes", "270", "--for", "draft"), "a draft has its teacher's tokens"),
        (("--target-params", "40k", "--vocab-sizes", "270,400"), "--vocab-sizes 400: the teacher has only 320 tokens"),
        (("--target-params", "40k", "--vocab-sizes", "320"), "these are all of the teacher's tokens"),
        (("--target-params", "40k", "--vocab-sizes", "90"), "--vocab-sizes 90 is too small: the bytes and special"),
        (("--target-params", "100", "--vocab-sizes", "320,270"), "too small: the smallest student"),
        (("--target-params", "1M", "--vocab-sizes", "320,270"), "is not smaller than the teacher"),
    ],
)
def test_vocabularies_that_cannot_be_searched(
    trained: Path, data: Path, tmp_path: Path, cli: Callable[..., Outcome], small: None, options: tuple, message: str
) -> None:
    outcome = cli("truncate-student", "--teacher", trained, "--data", data, "--out", tmp_path / "s", *options)
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_without_students_is_left_out(
    trained: Path, data: Path, tmp_path: Path, cli: Callable[..., Outcome], small: None
) -> None:
    """The whole teacher with 257 tokens has fewer parameters than 98 % of the target."""
    given = ("truncate-student", "--teacher", trained, "--data", data, "--out", tmp_path / "s")
    outcome = cli(*given, "--target-params", "61900", "--vocab-sizes", "320,257", "--json")
    assert outcome.code == 0, outcome.err
    assert "no student with 257 tokens meets --target-params 61900" in " ".join(outcome.err.split())
    assert {one["vocab_size"] for one in outcome.json["candidates"]} == {320}
    assert outcome.json["unit"] == "bits per byte"


def test_blocks_with_marks_are_refused(trained: Path, tokenizer_dir: Path, tmp_path: Path, small: None) -> None:
    rows = [{"prompt": f"the cat {number}", "response": "sat on the mat."} for number in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pregenerate(
        PregenerateConfig(
            source=[str(tmp_path / "pairs.jsonl")], tokenizer=str(tokenizer_dir), out=str(tmp_path / "d"),
            sequence_length=32, prompt_column="prompt", response_column="response",
        )
    )  # fmt: skip
    config = TruncateStudentConfig(
        teacher=str(trained), data=str(tmp_path / "d"), out=str(tmp_path / "s"), target_params=40_000, vocab_sizes="270"
    )
    with pytest.raises(DataError, match="its blocks mark which tokens count"):
        cut_to_target(config)
