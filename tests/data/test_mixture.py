"""Several datasets as one: exact shares, in an order that can be entered anywhere, and figures for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conftest import LENGTH, sentences
from tinygpt2 import PregenerateConfig, PretrainConfig, pregenerate, pretrain
from tinygpt2.config.training import dataset_shares
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.data.mixture import MixedOrder, content_of_datasets, load_datasets, training_order
from tinygpt2.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def other(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another dataset of the same tokenizer, smaller than `data`."""
    root = tmp_path_factory.mktemp("other")
    for index in range(20):
        (root / f"{index}.txt").write_text(sentences(20, 500 + index), encoding="utf-8")
    out = root / "d"
    config = {"source": [str(root / "*.txt")], "tokenizer": str(tokenizer_dir), "sequence_length": LENGTH}
    pregenerate(PregenerateConfig(**config, out=str(out), test_fraction=0.1))
    return out


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    seed=st.integers(0, 3),
)
@example(weights=[5, 1, 1, 1], sizes=[9, 9, 9, 9], seed=0)
@example(weights=[9, 1, 1, 1], sizes=[9, 9, 9, 9], seed=0)
def test_shares_are_exact_to_a_block_anywhere(weights: list[int], sizes: list[int], seed: int) -> None:
    counts = sizes[: len(weights)]
    order = MixedOrder(counts, [Fraction(weight) for weight in weights], seed)
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    blocks = order[0:200]
    members = [next(number for number, end in enumerate(ends) if block < end) for block in blocks]
    for length in range(201):
        found = [members[:length].count(number) for number in range(len(counts))]
        assert order.counts(length) == found
        for number, weight in enumerate(weights):
            assert abs(found[number] - Fraction(weight, sum(weights)) * length) <= 1
    for number, count in enumerate(counts):  # each dataset's own blocks: every one once before any comes again
        own = [
            block - (ends[number] - count) for block, member in zip(blocks, members, strict=True) if member == number
        ]
        assert own == Shuffle(count, seed)[0 : len(own)]


def test_the_order_can_be_entered_at_any_position() -> None:
    order = MixedOrder([7, 5, 11], [Fraction("0.5"), Fraction("0.3"), Fraction("0.2")], 3)
    whole = order[0:100]
    again = MixedOrder([7, 5, 11], [Fraction(5), Fraction(3), Fraction(2)], 3)  # the same proportions
    assert [again[position : position + 1][0] for position in reversed(range(100))] == whole[::-1]


def test_names_and_shares(tmp_path: Path) -> None:
    assert dataset_shares("a") == {"a": None}
    assert dataset_shares(["a:0.7", "c:d:.3"]) == {"a": Fraction(7, 10), "c:d": Fraction(3, 10)}
    odd = tmp_path / "d:1"
    odd.mkdir()
    assert dataset_shares(str(odd)) == {str(odd): None}  # a directory of that name is one


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a:0.5", "b"], "only a has a share"),
        (["a", "a"], "--data a is given twice"),
        (["a:0", "b:1"], "a share must be larger than 0"),
    ],
)
def test_shares_that_contradict_each_other(data: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainConfig(model="m", data=data, out="o")


def test_shares_with_too_many_digits(data: Path, other: Path) -> None:
    mixed = load_datasets([f"{data}:0.3333333333333", f"{other}:0.6666666666667"])
    with pytest.raises(ConfigError, match="too many digits"):
        training_order(mixed, 1)


def test_one_dataset_is_what_it_was(data: Path, teacher: Path) -> None:
    assert load_datasets(str(data)).content == load_packed_dataset(str(data)).content == content_of_datasets(str(data))
    assert isinstance(training_order(load_datasets([str(data)]), 1), Shuffle)
    config = PretrainConfig(model=str(teacher), data=[str(data)], out="o")
    assert config.data == str(data)
    assert f"data: {data}\n" in config.to_yaml()


def test_without_shares_every_block_is_used_once(data: Path, other: Path) -> None:
    both = load_datasets([str(data), str(other)])
    sizes = [len(load_packed_dataset(str(one)).train) for one in (data, other)]
    assert len(both.train) == sum(sizes)
    order = training_order(both, 1)
    assert sorted(order[0 : sum(sizes)]) == list(range(sum(sizes)))
    assert (both.train.row(sizes[0]) == load_packed_dataset(str(other)).train.row(0)).all()


def test_datasets_that_do_not_mix(data: Path, corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    config = {"source": [str(corpus)], "tokenizer": str(tokenizer_dir)}
    pregenerate(PregenerateConfig(**config, out=str(tmp_path / "short"), sequence_length=LENGTH // 2))
    with pytest.raises(DataError, match=f"have {LENGTH} tokens, those of .*short {LENGTH // 2}"):
        load_datasets([str(data), str(tmp_path / "short")])


def test_a_mixed_run_resumes_and_gives_figures_for_each(
    teacher: Path, data: Path, other: Path, tmp_path: Path, cli: Callable
) -> None:
    def run(out: str, steps: int, *more: object) -> dict:
        outcome = cli(
            "pretrain", "--model", teacher, "--data", f"{data}:0.75", "--data", f"{other}:0.25", "--out", tmp_path / out,
            "--max-steps", steps, "--micro-batch-size", 4, "--lr-schedule", "constant", "--eval-every", 2, "--json", *more,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        return outcome.json

    whole = run("whole", 4)
    names = list(whole["tokens_by_data"])
    assert list(whole["tokens_by_data"].values()) == [12 * LENGTH, 4 * LENGTH]
    assert whole["tokens"] == 16 * LENGTH
    assert set(whole["eval_by_data"]) == set(names)
    first, second = (whole["eval_by_data"][name]["loss"] for name in names)
    assert min(first, second) <= whole["eval"]["loss"] <= max(first, second)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1][f"eval/{names[0]}/loss"] == first
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"| held-out perplexity on {names[1]} |" in card
    run("parts", 2)
    again = run("parts", 4, "--resume")
    assert (again["loss"], again["eval_by_data"]) == (whole["loss"], whole["eval_by_data"])
    outcome = cli(
        "pretrain", "--model", teacher, "--data", f"{data}:0.5", "--data", f"{other}:0.5", "--out", tmp_path / "parts",
        "--max-steps", 4, "--micro-batch-size", 4, "--lr-schedule", "constant", "--eval-every", 2, "--resume",
    )  # fmt: skip
    assert outcome.code == 2
    assert "--data" in outcome.err


def test_a_mixture_as_a_function_and_in_yaml(teacher: Path, data: Path, other: Path, tmp_path: Path) -> None:
    config = PretrainConfig(model=str(teacher), data=[str(data), str(other)], out=str(tmp_path / "o"), max_steps=1)
    result = pretrain(config)
    assert result.tokens_by_data is None
    assert len(result.eval_by_data or {}) == 2
    assert f"data:\n- {data}\n- {other}\n" in (tmp_path / "o" / "config.yaml").read_text()
