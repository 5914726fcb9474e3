"""`evaluate-text` beside plain loops in float64."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import OPTConfig, OPTForCausalLM

from tests.conftest import make_model, sentences
from tinygpt2 import EvaluateTextConfig, PregenerateConfig, evaluate_text, pregenerate
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.evaluation.texts.prompts import held_out_prompts
from tinygpt2.evaluation.texts.rouge import rouge_l
from tinygpt2.models.loading import load_model


@pytest.mark.parametrize(
    ("reference", "text", "expected"),
    [
        ("testing one two", "testing", 0.5),  # of rouge-score's own tests
        ("testing one two", "one two", 0.8),
        ("The cat's mat, 3 times!", "the CAT s mat 3 times", 1.0),
        ("", "words", 0.0),
        ("日本", "日本", 0.0),  # no letter or digit that the package knows
    ],
)
def test_rouge_l_is_that_of_rouge_score(reference: str, text: str, expected: float) -> None:
    assert rouge_l(reference, text) == pytest.approx(expected)


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    pick = random.Random(2)
    for _ in range(20):
        a, b = ([pick.choice("abcd") for _ in range(pick.randrange(1, 9))] for _ in range(2))

        @cache
        def longest(i: int, j: int, a: tuple = tuple(a), b: tuple = tuple(b)) -> int:
            if i == len(a) or j == len(b):
                return 0
            return 1 + longest(i + 1, j + 1) if a[i] == b[j] else max(longest(i + 1, j), longest(i, j + 1))

        common = longest(0, 0)
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(2 * common / (len(a) + len(b)))


@pytest.fixture(scope="module")
def student(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("s") / "m", tokenizer_dir, n_layer=1, n_embd=16, n_head=2, seed=3)


def predicted(model: torch.nn.Module, prompt: list[int], text: list[int]) -> torch.Tensor:
    """Log-probabilities at every token of a text."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *text]])).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_losses_and_excess_error_are_those_of_a_loop(data: Path, teacher: Path, student: Path) -> None:
    config = EvaluateTextConfig(
        model=[str(student)], judge=str(teacher), data=str(data), num_prompts=5, prompt_tokens=12, max_new_tokens=9
    )
    (found,) = evaluate_text(config).results
    prompts = held_out_prompts(load_packed_dataset(str(data)), 5, 12, 9, 32)
    model, judge = load_model(str(student))[0].eval(), load_model(str(teacher))[0].eval()
    sums, count, kl = [0.0, 0.0], 0, [[] for _ in range(9)]
    for prompt, following in prompts:
        own, other = (predicted(one, prompt, following) for one in (model, judge))
        places = range(len(following))
        sums = [total - float(x[places, following].sum()) for total, x in zip(sums, (own, other), strict=True)]
        count += len(following)
        for place in places:
            kl[place].append(float((other[place].exp() * (other[place] - own[place])).sum()))
    assert (found.loss, found.judge_loss) == pytest.approx((sums[0] / count, sums[1] / count), rel=1e-5)
    means = [sum(values) / len(values) for values in kl]
    assert [point.tokens for point in found.excess] == [1, 2, 4, 8, 9]
    for point in found.excess:
        assert point.real == pytest.approx(sum(means[: point.tokens]) / point.tokens, rel=1e-4)
        assert point.excess == pytest.approx(point.own / point.real - 1)
    assert found.excess[0].own == pytest.approx(found.excess[0].real, rel=1e-5)  # nothing is written before it
    assert found.statistics.texts == found.prompts == 5
    assert found.stderr > 0
    assert found.rouge_l is None
    assert math.isfinite(found.judged_loss)


def test_a_judge_that_is_the_model_sees_no_excess(data: Path, teacher: Path) -> None:
    config = EvaluateTextConfig(
        model=[str(teacher)], judge=str(teacher), data=str(data), num_prompts=4, prompt_tokens=8, max_new_tokens=6
    )
    (found,) = evaluate_text(config).results
    assert found.loss == pytest.approx(found.judge_loss)
    assert all(point.own == pytest.approx(0, abs=1e-6) for point in found.excess)


def test_pairs_have_their_own_prompts_and_references(
    cli: Callable, teacher: Path, student: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = [{"q": sentences(1, seed)[:12], "a": sentences(1, 50 + seed)[:14]} for seed in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pregenerate(PregenerateConfig(
        source=str(tmp_path / "pairs.jsonl"), tokenizer=str(tokenizer_dir), out=str(tmp_path / "d"), sequence_length=32,
        prompt_column="q", response_column="a", test_fraction=0.5,
    ))  # fmt: skip
    data = load_packed_dataset(str(tmp_path / "d"))
    prompts = held_out_prompts(data, 99, 1, 16, 32)
    texts = {(row["q"] + "\n", row["a"] + data.tokenizer().eos_token) for row in rows}
    assert {tuple(map(data.tokenizer().decode, prompt)) for prompt in prompts} <= texts
    assert len(prompts) == 10
    options = ["--judge", teacher, "--data", tmp_path / "d", "--max-new-tokens", "8", "--num-prompts", "6"]
    outcome = cli("evaluate-text", "--model", student, "--model", teacher, *options, "--json")
    first, second = outcome.json["results"]
    assert (first["prompts"], second["prompts"]) == (6, 6)
    assert 0 <= first["rouge_l"] <= 1
    shown = cli("evaluate-text", "--model", student, *options).out
    for word in ("judged", "ROUGE-L", "distinct-1", "excess", "8 tokens"):
        assert word in shown


def test_a_judge_reads_its_start_token_as_ppl_does(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """An OPT, whose tokenizer puts a token before every text, on the last token of 31."""
    torch.manual_seed(2)
    shape = OPTConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=32,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0, init_std=0.3,
    )  # fmt: skip
    judge = OPTForCausalLM(shape).eval()
    judge.save_pretrained(tmp_path / "opt")
    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(tmp_path / "opt")
    data = tmp_path / "d"
    source = {"source": str(corpus / "00.txt"), "tokenizer": str(tmp_path / "opt"), "test_fraction": 0.3}
    pregenerate(PregenerateConfig(**source, out=str(data), sequence_length=32))
    how = {"model": [str(tmp_path / "opt")], "judge": str(tmp_path / "opt"), "data": str(data), "num_prompts": 4}
    (found,) = evaluate_text(EvaluateTextConfig(**how, prompt_tokens=30, max_new_tokens=1)).results
    losses = []
    for prompt in held_out_prompts(load_packed_dataset(str(data)), 4, 30, 1, 31):
        losses.append(-float(predicted(judge, [0, *prompt.tokens], prompt.following[:1])[0, prompt.following[0]]))
    assert found.judge_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.model == str(tmp_path / "opt")


def test_models_with_other_positions_continue_the_same_prompts(
    cli: Callable, teacher: Path, data: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    short = make_model(tmp_path / "short", tokenizer_dir, n_positions=16)
    how = {"judge": str(teacher), "data": str(data), "num_prompts": 4, "prompt_tokens": 6, "max_new_tokens": 12}
    one, two = evaluate_text(EvaluateTextConfig(model=[str(teacher), str(short)], **how)).results
    (alone,) = evaluate_text(EvaluateTextConfig(model=[str(short)], **how)).results
    assert one.judge_loss == two.judge_loss == alone.judge_loss  # of the true continuations
    assert max(found.statistics.length for found in (one, two)) <= 8


def test_what_does_not_fit_is_said(
    cli: Callable, teacher: Path, data: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    options = ["--model", teacher, "--judge", teacher, "--data", data]
    for more, message in (
        (["--prompt-tokens", "32"], "do not fit into 32 positions"),
        (["--plot", tmp_path / "no" / "x.png"], "the directory does not exist"),
        (["--plot", tmp_path], "is a directory: give the name of a file"),
    ):
        outcome = cli("evaluate-text", *options, *more)
        assert outcome.code == 2
        assert message in outcome.err
    short = tmp_path / "short.txt"
    short.write_text(sentences(30, seed=1), encoding="utf-8")
    common = {"tokenizer": str(tokenizer_dir), "sequence_length": 16, "format": "hdf5"}
    (tmp_path / "tail.txt").write_text("the cat", encoding="utf-8")
    tail = PregenerateConfig(
        source=[str(short)], test_source=[str(tmp_path / "tail.txt")], out=str(tmp_path / "d"), **common
    )
    pregenerate(tail)
    outcome = cli("evaluate-text", *options[:-1], tmp_path / "d", "--prompt-tokens", "8", "--max-new-tokens", "4")
    assert (outcome.code, "goes on after 8 tokens" in outcome.err) == (3, True), outcome.err
    wide = make_model(tmp_path / "wide", None, vocab_size=384)
    outcome = cli("evaluate-text", "--model", teacher, "--judge", wide, "--data", data, "--prompt-tokens", "8")
    assert "has 320 tokens, and the judge" in outcome.err.replace("\n", " ")
