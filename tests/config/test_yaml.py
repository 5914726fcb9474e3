"""YAML as every command reads it: numbers of YAML 1.2, and no key twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinygpt2.config.cerebras import options_of
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.yaml_files import load_yaml, read_yaml
from tinygpt2.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("6E+2", 600.0), ("-1e3", -1000.0), (".5e1", 5.0), ("1.e2", 100.0), ("1.5", 1.5), ("0.1e-3", 1e-4),
        ("7", 7), ("e5", "e5"), ("1e", "1e"), ("1e5x", "1e5x"), ("'1e-5'", "1e-5"), ("yes", True), ("~", None),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = load_yaml(f"key: {text}", "f.yaml")["key"]
    assert found == value
    assert type(found) is type(value)


def test_a_key_that_stands_twice_is_named_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"f\.yaml, line 3 .*'a' stands twice"):
        load_yaml("a: 1\nb: 2\na: 3\n", "f.yaml")
    with pytest.raises(ConfigError, match=r"line 2 .*'x' stands twice"):
        load_yaml("outer:\n  {x: 1, x: 1}\n", "f.yaml")
    merged = load_yaml("base: &b {x: 1, y: 2}\nnext: &n {<<: *b, x: 3}\nlast: {<<: *n, y: 4}\n", "f.yaml")
    assert (merged["next"], merged["last"]) == ({"x": 3, "y": 2}, {"x": 3, "y": 4})


@pytest.mark.parametrize(
    "text", ["a: [", "a: 2024-13-45", "{[1]: 2}", "\x00", "!!python/object:os.system {}", "[" * 3000]
)
def test_what_is_not_yaml_is_an_error_with_the_files_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"f\.yaml.* is not valid YAML"):
        load_yaml(text, "f.yaml")


def test_an_option_with_a_dash_and_an_underscore(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("max-steps: 1\n")
    assert read_yaml(file) == {"max_steps": 1}
    file.write_text("max-steps: 1\nmax_steps: 2\n")
    with pytest.raises(ConfigError, match="max_steps stands twice"):
        read_yaml(file)


def test_cerebras_phases_without_a_length() -> None:
    phases = [
        {"scheduler": "Linear", "initial_learning_rate": 0, "end_learning_rate": 6e-5, "total_iters": 10},
        {"scheduler": "CosineDecay", "initial_learning_rate": 6e-5, "end_learning_rate": 0.0, "total_iters": None},
    ]
    values = {
        "model": {}, "runconfig": {"max_steps": 100}, "optimizer": {"learning_rate": phases},
    }  # fmt: skip
    options, _ = options_of(values, "f.yaml")
    assert options["warmup_ratio"] == 0.1
    assert options["lr_schedule"] == "cosine"
    for length in ("many", float("nan"), 2.5):
        phases[1]["total_iters"] = length
        with pytest.raises(ConfigError, match=f"{length!r} is not a number of steps"):
            options_of(values, "f.yaml")


def test_times_are_texts_and_numbers_may_be(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("prompt_tokens: 16:32\nspan_temperatures: 0.5\nmax_steps: 1_000\nseed: 010\nlearning_rate: 1.\n")
    values = read_yaml(file)
    assert values["prompt_tokens"] == "16:32"
    assert (values["max_steps"], values["seed"], values["learning_rate"]) == (1000, 8, 1.0)
    common = {"teacher": "t", "student": "s", "data": "d", "out": "o", "on_policy_fraction": 1}
    found = DistillConfig(**common, prompt_tokens=32, alignment="spans", span_temperatures=values["span_temperatures"])
    assert (found.prompt_tokens, found.span_temperatures) == ("32", "0.5")


def test_what_is_printed_is_read_as_it_was() -> None:
    texts = ["1e-3", "1e5", "0x1f", "010", "1_000", ".5", "16:32", "yes", "null", "1.", "-3", "no: thing", "日本"]
    for name in texts:
        how = {"student": "s", "data": "d", "seed": 7, "learning_rate": 1e-5, "freeze": [name, "x"]}
        config = DistillConfig(teacher=name, out=name, **how)
        values = load_yaml(config.to_yaml(), "printed")
        assert (values["teacher"], values["freeze"], values["out"]) == (name, [name, "x"], name)
        assert DistillConfig(**values) == config
