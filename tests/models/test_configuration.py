"""Configurations: those in a checkpoint are read as `transformers` reads them; impossible ones name the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config

from tests.models.test_weights import configured, saved
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.models.configuration import read_model_config
from tinygpt2.models.loading import load_model
from tinygpt2.models.saving import save_model

IMPOSSIBLE = [
    ({"n_head": 0}, "n_head is 0"),
    ({"n_layer": 0}, "n_layer is 0"),
    ({"n_positions": -3}, "n_positions is -3"),
    ({"n_inner": 0}, "n_inner is 0"),
    ({"n_embd": 17}, "n_embd 17 is not a multiple of n_head 2"),
    ({"n_embd": 2**70}, "n_embd is"),
    ({"n_layer": 2.5}, "n_layer"),
    ({"n_embd": "wide"}, "n_embd"),
    ({"activation_function": "gelu_neu"}, "activation_function 'gelu_neu' is unknown, did you mean 'gelu_new'"),
    ({"activation_function": "foo"}, "known are gelu, "),
    ({"resid_pdrop": 3}, "resid_pdrop is 3"),
    ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon is -1.0"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings"),
    ({"model_type": "bert"}, "'bert' is not gpt2"),
]


@pytest.mark.parametrize(("values", "part"), IMPOSSIBLE, ids=str)
def test_impossible_values_name_the_field(
    tmp_path: Path, tokenizer_dir: Path, values: dict[str, object], part: str
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    file = tmp_path / "shape.json"
    file.write_text(json.dumps({"n_layer": 2, "n_embd": 16, "n_head": 2, **values}))
    with pytest.raises(ConfigError) as of_the_user:
        read_model_config(str(file), tokenizer)
    path = configured(saved(tmp_path / "m"), **values)
    with pytest.raises(ModelError) as of_a_checkpoint:
        load_model(str(path))
    for caught, where in ((of_the_user, file), (of_a_checkpoint, path / "config.json")):
        assert part in str(caught.value)
        assert str(where) in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "null", '"gpt2"', "{", "", "\ufeff\ufeff{}"])
def test_a_config_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = saved(tmp_path / "m")
    (path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(str(path))


def test_a_shape_may_have_more_rows_than_the_tokenizer(tmp_path: Path, tokenizer_dir: Path) -> None:
    tokenizer, file = load_tokenizer(str(tokenizer_dir)), tmp_path / "shape.yaml"
    file.write_text("{n_layer: 2, n_embd: 8, n_head: 2, vocab_size: 384}")
    assert read_model_config(str(file), tokenizer).vocab_size == 384
    assert read_model_config(str(file), tokenizer, 448).vocab_size == 384
    file.write_text("{n_layer: 2, n_embd: 8, n_head: 2}")
    assert read_model_config(str(file), tokenizer).vocab_size == 320
    assert read_model_config(str(file), tokenizer, 448).vocab_size == 448
    assert read_model_config("gpt2", tokenizer, 448).vocab_size == 448
    with pytest.raises(ConfigError, match="vocab_size 300 is less than the 320 tokens"):
        read_model_config("gpt2", tokenizer, 300)


def test_a_shape_from_another_models_config(tmp_path: Path, tokenizer_dir: Path) -> None:
    tokenizer, file = load_tokenizer(str(tokenizer_dir)), tmp_path / "config.json"
    values = {"n_layer": 2, "n_embd": 8, "n_head": 2, "activation": "relu"}
    file.write_text(json.dumps({**values, "architectures": ["GPT2LMHeadModel"]}))
    assert read_model_config(str(file), tokenizer).n_embd == 8
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="unknown keys: activation"):
        read_model_config(str(file), tokenizer)
    (tmp_path / "shape.yaml").write_text("{n_layer: 2, n_embd: 8, n_head: 2, layer_norm_epsilon: 1e-3}")
    assert read_model_config(str(tmp_path / "shape.yaml"), tokenizer).layer_norm_epsilon == 1e-3


def test_a_saved_model_carries_only_its_own_settings(tmp_path: Path) -> None:
    path = configured(
        saved(tmp_path / "m"), n_ctx=7, torch_dtype="float16", architectures=["GPT2ForSequenceClassification"], foo=[1],
        task_specific_params={"a": {}}, id2label={"0": "A"}, temperature=0.3, max_length=9, return_dict=False,
    )  # fmt: skip
    model, _ = load_model(str(path))
    save_model(model, tmp_path / "out", None, "")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    own = {*GPT2Config().to_dict(), "n_ctx"}
    assert set(config) <= own
    assert config["n_ctx"] == config["n_positions"] == 24
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["dtype"] == "float32"
    assert not {"id2label", "temperature", "max_length", "return_dict"} & set(config)
