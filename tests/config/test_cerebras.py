"""Cerebras' parameter files as options of pretrain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tinygpt2.config.cerebras import options_of, shape_of
from tinygpt2.errors import ConfigError

SMALL = """
train_input:
    data_processor: "GptHDF5DataProcessor"
    data_dir: "{data}"
    batch_size: 4
    shuffle: True
    num_workers: 8
eval_input:
    data_dir: "{data}"
model:
    hidden_size: 32
    vocab_size: 320
    position_embedding_type: "learned"
    share_embedding_weights: True
    max_position_embeddings: 32
    num_hidden_layers: 2
    dropout_rate: 0.1
    attention_dropout_rate: 0.1
    layer_norm_epsilon: 1.0e-5
    num_heads: 4
    use_ffn_bias: True
    filter_size: 64
    nonlinearity: "gelu"
    mixed_precision: False
optimizer:
    optimizer_type: "adamw"
    betas: [0.9, 0.95]
    max_gradient_norm: 1.0
    learning_rate:
      - {{scheduler: "Linear", initial_learning_rate: 0.0, end_learning_rate: 0.003, total_iters: 2}}
      - {{scheduler: "Linear", initial_learning_rate: 0.003, end_learning_rate: 0.0, total_iters: 6}}
    weight_decay: 0.01
runconfig:
    max_steps: 8
    log_steps: 1
    checkpoint_steps: 4
    seed: 1
    model_dir: "{out}"
"""


def params(**changes: object) -> dict:
    values = yaml.safe_load(SMALL.format(data="d", out="o"))
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    return values


@pytest.mark.needs_torch
def test_a_parameter_file_trains(cli: Callable, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(SMALL.format(data=data, out=tmp_path / "m"))
    printed = cli("pretrain", "--config", file, "--print-config")
    options = yaml.safe_load(printed.out)
    assert (
        printed.err
        == f"{file}: these keys have no counterpart and are ignored: optimizer.betas, train_input.data_processor, train_input.num_workers\n"
    )
    expected = {
        "max_steps": 8, "micro_batch_size": 4, "learning_rate": 0.003, "lr_schedule": "linear", "warmup_ratio": 0.25, "seed": 1,
        "grad_clip": 1.0, "weight_decay": 0.01, "save_every": 4, "log_every": 1, "dropout": 0.1, "precision": "fp32",
        "data": str(data), "eval_data": str(data), "out": str(tmp_path / "m"), "model_config": str(file),
    }  # fmt: skip
    assert {key: options[key] for key in expected} == expected
    outcome = cli("pretrain", "--config", file, "--max-steps", "3", "--json")
    assert outcome.json["steps"] == 3
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["n_inner"], config["activation_function"]) == (
        2,
        32,
        64,
        "gelu",
    )


def test_other_commands_do_not_take_it(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(SMALL.format(data="d", out="o"))
    outcome = cli("ppl", "--config", tmp_path / "params.yaml")
    assert outcome.code == 2
    assert "which only tinygpt2 pretrain reads" in outcome.err


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.001, (0.001, "constant", 0.0)),
        (
            {"scheduler": "CosineDecay", "initial_learning_rate": 0.01, "end_learning_rate": 0.0, "total_iters": 8},
            (0.01, "cosine", 0.0),
        ),
        ([{"scheduler": "Constant", "val": 0.02}], (0.02, "constant", 0.0)),
    ],
)
def test_rates(rate: object, expected: tuple) -> None:
    options, _ = options_of(params(optimizer__learning_rate=rate), "f.yaml")
    assert (options["learning_rate"], options["lr_schedule"], options["warmup_ratio"]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__position_embedding_type": "rotary"}, "a different model"),
        ({"optimizer__optimizer_type": "sgd"}, "a different model or a different training run"),
        (
            {"optimizer__learning_rate": [{"scheduler": "Exponential", "initial_learning_rate": 0.1}]},
            "expected a linear warm-up",
        ),
        (
            {
                "optimizer__learning_rate": {
                    "scheduler": "Linear",
                    "initial_learning_rate": 0.1,
                    "end_learning_rate": 0.01,
                }
            },
            "to 0",
        ),
        ({"optimizer__learning_rate": "fast"}, "expected a number"),
        ({"runconfig__max_steps": 100}, "its phases take 2"),
        ({"runconfig__max_steps": 1}, "its phases take 2"),
    ],
)
def test_what_would_be_another_training_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options_of(params(**change), "f.yaml")


def test_unknown_keys_are_named_and_unlike_dropouts_too() -> None:
    _, left = options_of(
        {**params(model__attention_dropout_rate=0.2, runconfig__precision_opt_level=1), "extra": 3}, "f.yaml"
    )
    assert {"extra", "model.attention_dropout_rate", "runconfig.precision_opt_level"} < set(left)
    with pytest.raises(ConfigError, match="nonlinearity 'relu6'"):
        shape_of(params(model__nonlinearity="relu6"), "f.yaml")
