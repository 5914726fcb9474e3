"""One declaration gives types, bounds, YAML and messages; every problem is reported at once."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from tinygpt2.config.base import Config
from tinygpt2.config.compression import TruncateStudentConfig
from tinygpt2.config.data import PregenerateConfig
from tinygpt2.config.decoding import GenerateConfig
from tinygpt2.config.distillation import DistillConfig, read_recipe
from tinygpt2.config.evaluation import PplConfig
from tinygpt2.config.training import FinetuneConfig, PretrainConfig
from tinygpt2.config.workflows import ExportConfig, PushConfig, VerifyConfig
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.errors import ConfigError
from tinygpt2.models.configuration import preset_names, read_model_config

PRETRAIN = {"data": "d", "out": "o", "model": "m"}


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        PretrainConfig(learning_rate="fast", micro_batch_size=0, max_step=3, max_steps=2, num_epochs=1, model="m")
    message = str(caught.value)
    for part in (
        "--learning-rate: expected a number, got 'fast'", "--micro-batch-size: expected at least 1, got 0", "'max_step', did you mean 'max_steps'?", "--data is required: Pregenerated",
        "--out is required: Directory", "--max-steps and --num-epochs cannot be combined",
    ):  # fmt: skip
        assert part in message, part


def test_names_between_commas_and_repeated_ones_mean_the_same() -> None:
    both = [PretrainConfig(**PRETRAIN, report_to=value) for value in ("tensorboard,tensorboard", ["tensorboard"] * 2)]
    assert both[0].report_to == both[1].report_to == ["tensorboard", "tensorboard"]
    with pytest.raises(ConfigError, match="got 'aim'"):
        PretrainConfig(**PRETRAIN, report_to="tensorboard,aim")


def test_a_shape_names_the_ends_of_the_tokenizer_or_none(tokenizer_dir: Path, tmp_path: Path) -> None:
    shape, tokenizer = tmp_path / "shape.yaml", load_tokenizer(str(tokenizer_dir))
    size = "{n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32"
    for ends in ("", ", eos_token_id: 0", ", bos_token_id: 50256, eos_token_id: 50256"):
        shape.write_text(f"{size}{ends}}}")
        assert read_model_config(str(shape), tokenizer).eos_token_id == 0
    shape.write_text(f"{size}, eos_token_id: 7}}")
    with pytest.raises(ConfigError, match="eos_token_id is 7, but the data's tokenizer has 0"):
        read_model_config(str(shape), tokenizer)


@pytest.mark.parametrize("config", [DistillConfig, ExportConfig, FinetuneConfig, PushConfig, VerifyConfig])
def test_what_is_missing_is_all_that_is_said(config: type[Config]) -> None:
    with pytest.raises(ConfigError) as caught:
        config()
    lines = str(caught.value).split("\n")
    assert all(" is required" in line for line in lines), lines
    assert len(lines) == len(set(lines))


def test_contradictions_are_found_beside_other_problems_and_not_invented() -> None:
    with pytest.raises(ConfigError) as caught:
        GenerateConfig(num_beams="4", num_samples="9")
    assert "--model is required: " in str(caught.value)
    assert "--num-samples 9 is more than --num-beams 4" in str(caught.value)
    with pytest.raises(ConfigError, match="--to: expected gguf, onnx or safetensors, got 'ggml'") as caught:
        ExportConfig(model="m", out="o", to="ggml", type="int8")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        DistillConfig(student="s", data="d", recipe="truncation", attention_weight="0")
    assert str(caught.value).startswith("--out is required: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="expected a text"):
        PretrainConfig(model="m", data="d", out=["a", "b"])


@pytest.mark.parametrize(
    ("kind", "values", "part"),
    [
        (PretrainConfig, {"data": "d", "out": "o"}, "--model-config"),
        (PretrainConfig, {**PRETRAIN, "model_config": "gpt2"}, "--model-config"),
        (PretrainConfig, {**PRETRAIN, "max_steps": True}, "--max-steps: expected a number, got yes"),
        (PretrainConfig, {**PRETRAIN, "lr_schedule": "cosin"}, "cosine"),
        (PretrainConfig, {**PRETRAIN, "report_to": ["papyrus"]}, "tensorboard"),
        (
            PretrainConfig,
            {**PRETRAIN, "lr_schedule": "plateau", "warmup_ratio": 0.5, "plateau_ratio": 0.6},
            "more than 1",
        ),
        (DistillConfig, {"student": "s", "data": "d", "out": "o"}, "--teacher is required: "),
        (
            DistillConfig,
            {"student": "s", "teacher": "t", "data": "d", "out": "o", "prediction_weight": 0},
            "nothing to learn",
        ),
        (
            DistillConfig,
            {"student": "s", "teacher": "t", "data": "d", "out": "o", "layer_map": "middle"},
            "--layer-map",
        ),
        (DistillConfig, {"student": "s", "data": "d", "out": "o", "recipe": "nosuch"}, "built-in recipes"),
        (TruncateStudentConfig, {"teacher": "t", "out": "o"}, "give --num-layers or --layers"),
        (TruncateStudentConfig, {"teacher": "t", "out": "o", "layers": "0,2", "strategy": "last"}, "--strategy"),
        (TruncateStudentConfig, {"teacher": "t", "out": "o", "layers": "0;2"}, "--layers"),
        (PregenerateConfig, {"source": ["a"], "tokenizer": "t", "out": "o", "stride": 2000}, "--stride 2000"),
        (PregenerateConfig, {"source": ["a"], "tokenizer": "t", "out": "o", "document": "page"}, "--document"),
        (PregenerateConfig, {"source": ["a"], "tokenizer": "t", "out": "o", "document": "separator:("}, "regular"),
        (
            PregenerateConfig,
            {"source": ["a"], "tokenizer": "t", "out": "o", "document": "separator:x*"},
            "empty string",
        ),
        (GenerateConfig, {"model": "m", "prompt": "a", "interactive": True}, "cannot be combined"),
        (GenerateConfig, {"model": "m", "num_beams": 2, "top_k": 3}, "--num-beams"),
        (GenerateConfig, {"model": "m", "num_beams": 2, "num_samples": 3}, "--num-samples"),
    ],
)
def test_contradictions_and_bounds(kind: type, values: dict, part: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + part.replace("(", r"\(")):
        kind(**values)


def test_natural_yaml_is_accepted() -> None:
    assert TruncateStudentConfig(teacher="t", out="o", layers=[0, 2, 4]).layers == "0,2,4"
    assert TruncateStudentConfig(teacher="t", out="o", layers=4).layers == "4"
    assert PplConfig(task="a.txt").task == ["a.txt"]
    assert PretrainConfig(**PRETRAIN, learning_rate="1e-3").learning_rate == 1e-3  # PyYAML reads 1e-3 as text


def test_the_recipe_lies_between_defaults_and_given_values() -> None:
    config = DistillConfig(teacher="t", student="s", data="d", out="o", recipe="distilgpt2", temperature=3)
    assert (config.temperature, config.prediction_weight, config.ce_weight, config.cosine_weight) == (3, 5, 2, 1)


RECIPES = ["default", "tinygpt2", "distilgpt2", "truncation", "gkd", "distillm", "minillm", "seqkd"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_resolves_and_names_every_objective(recipe: str) -> None:
    config = DistillConfig(teacher="t", student="s", data="d", out="o", recipe=recipe)
    again = DistillConfig(**yaml.safe_load(config.to_yaml()))
    assert again == config
    stated = read_recipe(recipe)
    assert {f"{name}_weight" for name in ("attention", "hidden", "prediction", "ce", "cosine")} <= stated.keys()
    assert config.needs_teacher == (recipe != "truncation")


def test_no_recipe_file_is_left_untested() -> None:
    shipped = {
        Path(item.name).stem
        for item in files("tinygpt2.config").joinpath("recipes").iterdir()
        if item.name.endswith(".yaml")
    }
    assert shipped == set(RECIPES)


def test_a_recipe_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("ce-weight: 1\nprediction-weight: 0.5\n")
    config = DistillConfig(teacher="t", student="s", data="d", out="o", recipe=str(file))
    assert (config.ce_weight, config.prediction_weight) == (1, 0.5)
    file.write_text("n_layer: 3\nteacher: gpt2\n")
    with pytest.raises(ConfigError, match="n_layer, teacher"):
        DistillConfig(teacher="t", student="s", data="d", out="o", recipe=str(file))


@pytest.mark.needs_torch
@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_shape_resolves(name: str, tokenizer_dir: Path) -> None:
    config = read_model_config(name, load_tokenizer(str(tokenizer_dir)))
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (320, 0, 0)


@pytest.mark.needs_torch
def test_presets_have_their_published_sizes(shared_data: Path) -> None:
    from tinygpt2.models.loading import random_model
    from tinygpt2.models.parameters import count_parameters

    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    published = {"gpt2": 124_439_808, "distilgpt2": 81_912_576}
    for name, parameters in published.items():
        assert count_parameters(random_model(read_model_config(name, tokenizer), 0)) == parameters
    tiny = read_model_config("tinygpt2-4l-312", tokenizer)
    assert (tiny.n_layer, tiny.n_embd, tiny.n_head, tiny.vocab_size) == (4, 312, 12, 50257)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_map": "average"}, "--head-map average has no effect"),
        ({"layer_map": "last"}, "--layer-map last has no effect"),
        ({"hidden_map": "0,3=10"}, "--hidden-map 0,3=10 has no effect"),
        ({"hidden_map": "3:10", "hidden_weight": 1.0}, "expected all, inner or numbers"),
        ({"recipe": "truncation", "teacher_dtype": "bf16"}, "--teacher-dtype bf16 has no effect"),
    ],
)
def test_choices_without_their_objective_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillConfig(teacher="t", student="s", data="d", out="o", **options)


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = PretrainConfig(model="~/m", data=["~/d:0.5", "e:0.5"], out="~/o", eval_task=["~/t.txt"])
    assert (config.model, config.out) == (f"{tmp_path}/m", f"{tmp_path}/o")
    assert config.data == [f"{tmp_path}/d:0.5", "e:0.5"]
    assert config.eval_task == [f"{tmp_path}/t.txt"]
    assert GenerateConfig(model="~nobody-of-that-name/m", prompt="~/x").prompt == ["~/x"]  # a text is no path


@pytest.mark.parametrize(("value", "expected"), [(1e3, 1000), ("1e3", 1000), ("2.0", 2), (7, 7), ("7", 7)])
def test_whole_numbers_may_be_written_as_floats(value: object, expected: int) -> None:
    config = PretrainConfig(model="m", data="d", out="o", max_steps=value)
    assert (config.max_steps, type(config.max_steps)) == (expected, int)


@pytest.mark.parametrize("value", [1.5, "1.5", "nan", "inf", "1e400", "x", True])
def test_other_numbers_are_not_whole(value: object) -> None:
    with pytest.raises(ConfigError, match=r"--max-steps: expected a (whole |finite )?number, got "):
        PretrainConfig(model="m", data="d", out="o", max_steps=value)
