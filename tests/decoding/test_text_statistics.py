"""The statistics of texts beside plain counts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tinygpt2 import GenerateConfig, generate
from tinygpt2.decoding.text_statistics import Written, text_statistics


def test_the_statistics_are_those_of_plain_counts() -> None:
    pick = random.Random(3)
    texts = [Written([pick.randrange(6) for _ in range(pick.randrange(40))], pick.random() < 0.5) for _ in range(30)]
    found = text_statistics(texts)
    for n, ours in ((1, found.distinct_1), (2, found.distinct_2), (3, found.distinct_3)):
        counts = Counter(tuple(t.tokens[i : i + n]) for t in texts for i in range(len(t.tokens) - n + 1))
        assert ours == pytest.approx(len(counts) / counts.total())
    repeated = total = 0
    for text in texts:
        seen = []
        for start in range(len(text.tokens) - 3):
            gram = text.tokens[start : start + 4]
            repeated, total = repeated + (gram in seen), total + 1
            seen.append(gram)
    assert found.repeated_4 == pytest.approx(repeated / total)
    ended = [len(text.tokens) for text in texts if text.ended]
    assert found.length_to_end == pytest.approx(sum(ended) / len(ended))
    assert found.ended == pytest.approx(len(ended) / 30)
    assert (found.texts, found.tokens) == (30, sum(len(text.tokens) for text in texts))
    assert found.length == pytest.approx(found.tokens / 30)


def test_nothing_to_count_is_none() -> None:
    assert text_statistics([]).distinct_1 is None
    short = text_statistics([Written([5, 5], False)])
    assert (short.distinct_1, short.distinct_2, short.distinct_3) == (0.5, 1.0, None)
    assert (short.repeated_4, short.length_to_end, short.ended) == (None, None, 0.0)


def test_generate_counts_the_samples_of_each_model(cli: Callable, teacher: Path) -> None:
    options = ["--prompt", "the cat", "--prompt", "a dog", "--num-samples", "3", "--max-new-tokens", "12", "--stats"]
    outcome = cli("generate", "--model", teacher, *options, "--json")
    (found,) = outcome.json["statistics"]
    assert found["statistics"]["texts"] == 6
    assert found["statistics"]["tokens"] == sum(text["tokens"] for text in outcome.json["results"])
    assert 0 < found["statistics"]["distinct_1"] <= 1
    shown = cli("generate", "--model", teacher, *options).out
    for word in ("distinct-1", "repeated 4-grams", "ended"):
        assert word in shown
    plain = generate(GenerateConfig(model=[str(teacher)], prompt=["the cat"], max_new_tokens=4))
    assert plain.statistics is None
