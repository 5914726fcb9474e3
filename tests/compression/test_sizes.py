"""The students that the search for a target looks at: how large they are, and that all of them are there."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2 import TruncateStudentConfig
from tinygpt2.compression.sizes import (
    Shape,
    Space,
    shapes_by_vocabulary,
    shapes_within,
    space_of,
    spaces_of,
    spread,
)
from tinygpt2.config.compression import Target
from tinygpt2.errors import ConfigError

NOVELS = Space(Shape(6, 256, 8, 1024), 8192, 256, tied=True)
SMALL = Space(Shape(4, 32, 4, 128), 320, 32, tied=True)


def config(**options: object) -> TruncateStudentConfig:
    return TruncateStudentConfig(teacher="t", out="o", data="d", **options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [Shape(1, 4, 1, 1), Shape(4, 32, 4, 128), Shape(3, 20, 2, 50), Shape(2, 28, 4, 14)])
def test_parameters_are_counted_as_transformers_counts_them(shape: Shape, tied: bool) -> None:
    space = replace(SMALL, tied=tied)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=320, n_positions=32, n_layer=shape.n_layer, n_embd=shape.n_embd, n_head=shape.n_head,
            n_inner=shape.n_inner, tie_word_embeddings=tied,
        ))  # fmt: skip
        model.tie_weights()
    assert space.parameters(shape) == model.num_parameters()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [Shape(1, 4, 1, 1), Shape(4, 32, 4, 128), Shape(12, 20, 2, 50)])
def test_bytes_are_those_of_the_file(tmp_path: Path, shape: Shape, tied: bool) -> None:
    space = replace(SMALL, tied=tied)
    sizes = {"n_layer": shape.n_layer, "n_embd": shape.n_embd, "n_head": shape.n_head, "n_inner": shape.n_inner}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=32, tie_word_embeddings=tied, **sizes))
    model.save_pretrained(str(tmp_path))
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert stored <= space.bytes(shape) <= stored + 12 * (12 * shape.n_layer + 5)


def test_the_teachers_of_the_docs_are_counted() -> None:
    assert NOVELS.parameters(NOVELS.teacher) == 6_901_760
    gpt2 = Space(Shape(12, 768, 12, 3072), 50257, 1024, tied=True)
    assert gpt2.parameters(gpt2.teacher) == 124_439_808


@pytest.mark.parametrize("limit", [3_000_000, 3_450_000, 1_000_000, 6_000_000])
def test_shapes_fill_the_target_and_no_other_shape_could(limit: int) -> None:
    """Beside a search through every number of inner units."""
    target = Target("parameters", limit, f"--target-params {limit}")
    found = shapes_within(target, NOVELS, NOVELS.parameters)
    assert all(0.98 * limit <= NOVELS.parameters(shape) <= limit for shape in found)
    assert len(set(found)) == len(found)
    for layers in (1, 3, 6):
        for width in range(16, 257, 16):
            sizes = [
                Shape(layers, width, 8, inner) for inner in range(width // 2, 1025)
                if 0.98 * limit <= NOVELS.parameters(Shape(layers, width, 8, inner)) <= limit
            ]  # fmt: skip
            mine = [one for one in found if (one.n_layer, one.n_embd, one.n_head) == (layers, width, 8)]
            assert len(mine) == bool(sizes)
            assert all(one in sizes for one in mine)
    assert all(shape.n_embd % shape.n_head == 0 for shape in found)
    assert {shape.n_head for shape in found if shape.n_embd == 128} <= {8, 4}


def test_inner_units_are_multiples_that_every_export_takes_where_the_tolerance_lets_them() -> None:
    found = shapes_within(Target("parameters", 3_000_000, ""), NOVELS, NOVELS.parameters)
    assert sum(shape.n_inner % 32 == 0 for shape in found) > 0.8 * len(found)
    small = shapes_within(Target("parameters", 20_000, ""), SMALL, SMALL.parameters)
    assert all(0.98 * 20_000 <= SMALL.parameters(shape) <= 20_000 for shape in small)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (100, "the smallest student of this teacher has 1,534 parameters, 1,408 of them in the embeddings"),
        (10**9, "is not smaller than the teacher, which has"),
    ],
)
def test_impossible_targets_say_what_is_possible(limit: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shapes_within(Target("parameters", limit, f"--target-params {limit}"), SMALL, SMALL.parameters)
    assert message in caught.value.message


def test_the_smallest_student_is_possible() -> None:
    least = SMALL.parameters(SMALL.smallest(SMALL.parameters))
    assert shapes_within(Target("parameters", least, ""), SMALL, SMALL.parameters)
    with pytest.raises(ConfigError):
        shapes_within(Target("parameters", least - 1, ""), SMALL, SMALL.parameters)


def test_each_vocabulary_has_the_shapes_that_it_has_alone() -> None:
    teacher = SimpleNamespace(n_layer=4, n_embd=32, n_head=4, n_inner=None, vocab_size=320, n_positions=32)
    spaces = spaces_of(config(target_params=60_500, vocab_sizes="257,320,290"), teacher)
    assert [(one.vocab_size, one.fewer_tokens) for one in spaces] == [(320, False), (290, True), (257, True)]
    target = Target("parameters", 60_500, "--target-params 60500")
    found = shapes_by_vocabulary(target, {one: one.parameters for one in spaces})
    for one, shapes in found.items():
        assert all(0.98 * 60_500 <= one.parameters(shape) <= 60_500 for shape in shapes)
        assert shapes == shapes_within(target, one, one.parameters)
    # with fewer tokens, all blocks can stay
    assert [SMALL.teacher in found.get(one, []) for one in spaces] == [False, False, True]
    assert spaces_of(config(target_params=9000), teacher) == [SMALL]


@pytest.mark.parametrize(
    ("limit", "message"),
    [(61_900, None), (100, "has 1,282 parameters"), (10**6, "the teacher, which has 62,144 parameters")],
)
def test_vocabularies_without_students_are_left_out_or_refused(limit: int, message: str | None) -> None:
    spaces = [SMALL, replace(SMALL, vocab_size=257, fewer_tokens=True)]
    target, costs = Target("parameters", limit, f"--target-params {limit}"), {one: one.parameters for one in spaces}
    if message is None:
        assert list(shapes_by_vocabulary(target, costs)) == [SMALL]
        return
    with pytest.raises(ConfigError) as caught:
        shapes_by_vocabulary(target, costs)
    assert message in caught.value.message


def test_a_spread_has_every_depth_and_few_shapes() -> None:
    found = shapes_within(Target("parameters", 3_000_000, ""), NOVELS, NOVELS.parameters)
    few = spread(found, 24)
    assert len(few) <= 24
    assert {shape.n_layer for shape in few} == {shape.n_layer for shape in found}
    assert spread(found, 1000) == found
    deep = [Shape(layers, 32, 4, 64) for layers in range(1, 49)]
    assert len(spread(deep, 24)) <= 24
    assert {1, 48} <= {shape.n_layer for shape in spread(deep, 24)}


def test_options_change_the_space() -> None:
    teacher = SimpleNamespace(n_layer=4, n_embd=32, n_head=4, n_inner=None, vocab_size=320, n_positions=32)
    assert space_of(config(target_params=9000), teacher) == SMALL
    assert space_of(config(target_params=9000, untie_head=True, n_positions=16), teacher) == replace(
        SMALL, tied=False, n_positions=16
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [("30M", 30_000_000), ("3.5M", 3_500_000), ("900k", 900_000), ("1.5B", 1_500_000_000), ("3e6", 3_000_000), (7, 7)],
)
def test_numbers_of_parameters_have_units(text: object, count: int) -> None:
    asked = config(target_params=text)
    assert asked.target_params == count
    assert asked.target == Target("parameters", count, f"--target-params {count:.12g}")


def test_other_targets() -> None:
    assert config(target_mb=12.5).target == Target("bytes", 12.5e6, "--target-mb 12.5")
    assert config(target_ms=5).target == Target("milliseconds", 5.0, "--target-ms 5")
    assert config(n_embd=8).target is None
    assert "for: draft" in config(target_ms=5, purpose="draft").to_yaml()
    assert "--for draft" in config(target_ms=5, **{"for": "draft"}).flags()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_params": 9000, "target_mb": 1}, "--target-params and --target-mb cannot be combined"),
        ({"target_params": 9000, "num_layers": 2}, "--target-params cannot be combined with --num-layers"),
        ({"target_mb": 1, "n_embd": 8, "refit": True}, "--target-mb cannot be combined with --n-embd and --refit"),
        ({"n_embd": 8, "purpose": "draft"}, "--for needs --target-params"),
        ({"target_params": "30X"}, "--target-params: expected a whole number"),
        ({"target_ms": 0}, "--target-ms: expected more than 0"),
        ({"target_ms": math.inf}, "--target-ms"),
    ],
)
def test_options_that_contradict_a_target(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_a_target_needs_data() -> None:
    with pytest.raises(ConfigError, match="the search for a target needs --data, a dataset to measure on"):
        TruncateStudentConfig(teacher="t", out="o", target_params=9000)
