"""Students: which parts are kept, that they are the teacher's, and that better choices lose less."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.conftest import make_model
from tinygpt2 import PretrainConfig, TruncateStudentConfig, VerifyConfig, pretrain, truncate_student, verify
from tinygpt2.compression.calibration import calibration_batches, mean_loss
from tinygpt2.compression.cut import KeptParts, choose_layers, cut_model
from tinygpt2.compression.importance import (
    _first_order,
    active_dimensions,
    block_influence,
    depth_importance,
    important_dimensions,
    run_blocks,
)
from tinygpt2.compression.least_squares import refit
from tinygpt2.data.dataset import load_packed_dataset
from tinygpt2.errors import ConfigError, DataError, ModelError
from tinygpt2.models.loading import load_model

TABLE = {
    (12, 6): {
        "first": [0, 1, 2, 3, 4, 5], "middle": [3, 4, 5, 6, 7, 8], "last": [6, 7, 8, 9, 10, 11],
        "alternate": [0, 2, 4, 6, 8, 10], "uniform": [0, 2, 4, 7, 9, 11], "distilgpt2": [0, 2, 4, 7, 9, 11],
    },
    (12, 4): {
        "middle": [4, 5, 6, 7], "alternate": [0, 3, 6, 9], "uniform": [0, 4, 7, 11], "distilgpt2": [0, 3, 8, 11],
    },
    (12, 1): {"first": [0], "middle": [5], "last": [11], "alternate": [0], "uniform": [0], "distilgpt2": [0]},
    (24, 12): {
        "first": list(range(12)), "middle": list(range(6, 18)), "last": list(range(12, 24)), "alternate": list(range(0, 24, 2)),
        "uniform": [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23], "distilgpt2": [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23],
    },
    (24, 3): {"uniform": [0, 12, 23], "alternate": [0, 8, 16], "distilgpt2": [0, 8, 23], "middle": [10, 11, 12]},
    (36, 12): {
        "first": list(range(12)), "middle": list(range(12, 24)), "last": list(range(24, 36)), "alternate": list(range(0, 36, 3)),
        "uniform": [0, 3, 6, 10, 13, 16, 19, 22, 25, 29, 32, 35], "distilgpt2": [0, 3, 6, 9, 12, 15, 20, 23, 26, 29, 32, 35],
    },
    (48, 8): {
        "first": list(range(8)), "middle": list(range(20, 28)), "last": list(range(40, 48)), "alternate": list(range(0, 48, 6)),
        "uniform": [0, 7, 13, 20, 27, 34, 40, 47], "distilgpt2": [0, 6, 12, 18, 29, 35, 41, 47],
    },
    (7, 7): {name: list(range(7)) for name in ("first", "middle", "last", "alternate", "uniform", "distilgpt2")},
}  # fmt: skip


@pytest.mark.parametrize(
    ("total", "keep", "strategy", "expected"),
    [(*sizes, name, layers) for sizes, row in TABLE.items() for name, layers in row.items()],
)
def test_layer_choices(total: int, keep: int, strategy: str, expected: list[int]) -> None:
    assert choose_layers(total, keep, strategy) == expected


@pytest.fixture(scope="module")
def trained(data: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that knows something, of 4 layers of 32."""
    root = tmp_path_factory.mktemp("trained")
    start = make_model(root / "start", tokenizer_dir, n_positions=32)
    pretrain(PretrainConfig(model=str(start), data=str(data), out=str(root / "m"), max_steps=150, learning_rate=3e-3))
    return root / "m"


def test_weights_are_the_teachers(teacher: Path, tmp_path: Path) -> None:
    result = truncate_student(TruncateStudentConfig(teacher=str(teacher), layers="0,3", out=str(tmp_path / "s")))
    plain_teacher = GPT2LMHeadModel.from_pretrained(str(teacher))
    student = GPT2LMHeadModel.from_pretrained(str(tmp_path / "s"))
    assert result.layers == [0, 3]
    assert result.importance is None
    assert student.config.n_layer == 2
    assert result.parameters == sum(p.numel() for p in student.parameters())
    assert result.teacher_parameters == sum(p.numel() for p in plain_teacher.parameters())
    for name, tensor in student.state_dict().items():
        origin = name.replace(".h.1.", ".h.3.")
        assert torch.equal(tensor, plain_teacher.state_dict()[origin]), name
    assert len(AutoTokenizer.from_pretrained(str(tmp_path / "s"))) == 320
    card = (tmp_path / "s" / "README.md").read_text()
    assert "0, 3 (chosen with --layers)" in card


@pytest.mark.parametrize(
    "options", [{"num_layers": 4}, {"n_embd": 32}, {"n_head": 4, "n_inner": 128}, {"n_positions": 32}]
)
def test_all_of_it_is_the_teacher(teacher: Path, data: Path, tmp_path: Path, options: dict) -> None:
    truncate_student(TruncateStudentConfig(teacher=str(teacher), data=str(data), out=str(tmp_path / "s"), **options))
    ids = torch.arange(32)[None]
    models = [GPT2LMHeadModel.from_pretrained(str(path)).eval() for path in (teacher, tmp_path / "s")]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    assert models[1].config.n_inner is None


def test_a_narrow_student_is_the_teacher_with_the_rest_silenced(teacher: Path) -> None:
    """Heads and units that are cut are those whose outputs a teacher can be made to ignore."""
    model, _ = load_model(str(teacher))
    heads, units = [torch.tensor([1, 3])] * 4, [torch.arange(0, 128, 3)] * 4
    narrow = cut_model(model, KeptParts([0, 1, 2, 3], torch.arange(16), heads, units, (32, "first")))
    assert (narrow.config.n_embd, narrow.config.n_head, narrow.config.n_inner) == (16, 2, 43)
    block, whole = narrow.transformer.h[2], model.transformer.h[2]
    columns = torch.tensor([*range(8, 16), *range(24, 32)])
    for part in range(3):
        mine = block.attn.c_attn.weight[:, part * 16 : part * 16 + 16]
        assert torch.equal(mine, whole.attn.c_attn.weight[:16, part * 32 + columns])
    assert torch.equal(block.attn.c_proj.weight, whole.attn.c_proj.weight[columns][:, :16])
    assert torch.equal(block.mlp.c_fc.weight, whole.mlp.c_fc.weight[:16, ::3])
    assert torch.equal(block.mlp.c_proj.weight, whole.mlp.c_proj.weight[::3, :16])
    assert torch.equal(narrow.lm_head.weight, model.lm_head.weight[:, :16])
    # in full width, silencing heads and units in the teacher is the same as cutting them
    for layer in model.transformer.h:
        with torch.no_grad():
            layer.attn.c_proj.weight[[i for i in range(32) if i not in columns.tolist()]] = 0
            layer.mlp.c_proj.weight[[i for i in range(128) if i % 3]] = 0
    batch = torch.arange(32)[None]
    with torch.no_grad():
        wide = cut_model(model, KeptParts([0, 1, 2, 3], torch.arange(32), [torch.arange(4)] * 4, units, (32, "first")))
        torch.testing.assert_close(wide(batch).logits, model(batch).logits, rtol=1e-4, atol=1e-4)


def test_block_influence_is_one_minus_the_cosine(teacher: Path, data: Path) -> None:
    model, _ = load_model(str(teacher))
    ids = load_packed_dataset(str(data)).train.batch([0, 1, 2]).input_ids
    plain = GPT2LMHeadModel.from_pretrained(str(teacher)).eval()
    states: list[torch.Tensor] = []
    for block in plain.transformer.h:
        block.register_forward_hook(
            lambda _, x, y: states.append(torch.stack([x[0], y[0] if isinstance(y, tuple) else y]))
        )
    with torch.no_grad():
        plain(ids)
    expected = [1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item() for a, b in states]
    assert block_influence(model, [ids]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_greedy_removal_measures_again_after_each_round(trained: Path, data: Path) -> None:
    model, _ = load_model(str(trained))
    batches = calibration_batches(load_packed_dataset(str(data)).train, 16, torch.device("cpu"))
    found = depth_importance(model, batches, 2)
    assert found.loss == pytest.approx(mean_loss(model, batches))
    with run_blocks(model, [1, 2, 3]):
        without = mean_loss(model, batches)
    assert found.rounds[0].costs[0] == pytest.approx(without - found.loss, abs=1e-6)
    first, second = found.rounds
    assert first.costs[first.removed] == min(first.costs.values())
    assert set(second.costs) == set(range(4)) - {first.removed}
    assert found.kept == sorted(set(range(4)) - {first.removed, second.removed})
    with run_blocks(model, found.kept):
        total = mean_loss(model, batches)
    assert total == pytest.approx(found.loss + first.costs[first.removed] + second.costs[second.removed], abs=1e-5)
    assert len(model.transformer.h) == 4


@pytest.mark.slow
def test_refitting_whole_models_changes_nothing_and_cut_ones_get_better(trained: Path, data: Path) -> None:
    packed = load_packed_dataset(str(data))
    batches, held_out = (calibration_batches(split, 64, torch.device("cpu")) for split in (packed.train, packed.test))
    teacher, _ = load_model(str(trained))
    kept = KeptParts([0, 1, 2, 3], torch.arange(32), [torch.arange(4)] * 4, [torch.arange(128)] * 4, (32, "first"))
    whole = cut_model(teacher, kept)
    refit(whole, teacher, kept, batches)
    for a, b in zip(whole.parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    for kept in (
        KeptParts([0, 3], torch.arange(32), [torch.arange(4)] * 2, [torch.arange(128)] * 2, (32, "first")),
        KeptParts([0, 1, 2, 3], torch.arange(16), [torch.arange(2)] * 4, [torch.arange(64)] * 4, (32, "first")),
    ):
        student = cut_model(teacher, kept)
        before = mean_loss(student, held_out)
        refit(student, teacher, kept, batches)
        assert mean_loss(student, held_out) < before - 0.1


def test_first_order_scores_are_derivatives(teacher: Path, data: Path) -> None:
    """Of the loss, where a dimension fades from all layer norms' outputs: by differences, in float64."""
    model, _ = load_model(str(teacher))
    model.double().requires_grad_(False)
    ids = load_packed_dataset(str(data)).train.batch([0, 1, 2]).input_ids
    scores = _first_order(model, [ids])
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    for dimension in (0, 7, 31):
        losses = []
        for factor in (1 - 1e-4, 1 + 1e-4):
            for norm in norms:
                norm.weight[dimension] *= factor
                norm.bias[dimension] *= factor
            losses.append(mean_loss(model, [ids]))
            for norm in norms:
                norm.weight[dimension] /= factor
                norm.bias[dimension] /= factor
        assert float(scores[dimension]) == pytest.approx(3 * (losses[0] - losses[1]) / 2e-4, rel=1e-4)


def test_a_block_that_moves_keeps_its_scale(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Where attention is divided by the block's number, the queries make up for the new number."""
    model, _ = load_model(str(make_model(tmp_path / "m", tokenizer_dir)))
    model.config.scale_attn_by_inverse_layer_idx = True
    model.save_pretrained(str(tmp_path / "s"))
    scaled, _ = load_model(str(tmp_path / "s"))
    whole = [torch.arange(4)] * 2, [torch.arange(128)] * 2
    student = cut_model(scaled, KeptParts([1, 3], torch.arange(32), *whole, (32, "first")))
    ids = torch.arange(32)[None]
    with run_blocks(scaled, [1, 3]):
        expected = mean_loss(scaled, [ids])
    assert mean_loss(student, [ids]) == pytest.approx(expected, rel=1e-5)
    assert student.transformer.h[1].attn.scaling != scaled.transformer.h[3].attn.scaling


@pytest.mark.slow
def test_dimensions_that_matter_are_kept(teacher: Path, data: Path) -> None:
    """Where half of the dimensions are nothing but noise that no weight reads, the other half is kept."""
    model, _ = load_model(str(teacher))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight", "ln_1.bias", "ln_2.bias", "ln_f.bias")):
                parameter[::2] = 0
    batches = calibration_batches(load_packed_dataset(str(data)).train, 16, torch.device("cpu"))
    assert active_dimensions(model, batches, 16).tolist() == list(range(1, 32, 2))
    before = [parameter.clone() for parameter in model.parameters()]
    kept = important_dimensions(model, batches, 16)
    assert len(kept) == 16
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
def test_the_command_measures_and_says_why(cli: Callable, trained: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    outcome = cli(
        "truncate-student", "--teacher", trained, "--data", data, "--out", out, "--num-layers", "2", "--strategy", "importance",
        "--n-head", "2", "--refit", "--n-positions", "16", "--position", "interpolate", "--calibration-sequences", "16",
        "--axes", "coordinates", "--json",
    )  # fmt: skip
    found = outcome.json
    assert found["layers"] == found["importance"]["kept"]
    assert found["perplexity"]["teacher"] < found["perplexity"]["student"] < 320
    student = GPT2LMHeadModel.from_pretrained(str(out))
    shape = student.config
    assert (shape.n_layer, shape.n_embd, shape.n_head, shape.n_positions) == (2, 16, 2, 16)
    assert shape.n_ctx == 16
    wpe = GPT2LMHeadModel.from_pretrained(str(trained)).transformer.wpe.weight
    assert torch.isin(student.transformer.wpe.weight[0], wpe[0]).all()
    assert torch.isin(student.transformer.wpe.weight[-1], wpe[-1]).all()
    assert (out / "importance.png").read_bytes()[:4] == b"\x89PNG"
    card = (out / "README.md").read_text()
    assert "heads kept in block 1" in card
    assert "perplexity before any training" in card
    assert verify(VerifyConfig(path=str(out))).ok
    again = cli(
        "truncate-student", "--teacher", trained, "--data", data, "--out", tmp_path / "t", "--num-layers", "2",
        "--strategy", "importance",
    )  # fmt: skip
    assert "by how much the loss (" in again.out
    assert "without each block\n" in again.out


def test_everything_is_cut_at_once(trained: Path, data: Path, tmp_path: Path) -> None:
    """Depth, a rotated width, narrower heads, inner units and positions: the result loses less than coordinates do."""
    options = {"teacher": str(trained), "data": str(data), "n_embd": 20, "n_head": 2, "n_inner": 50, "layers": "0,1,3"}
    options |= {"n_positions": 24, "refit": True}
    found = {}
    for axes, untie in (("rotated", False), ("rotated", True), ("coordinates", False)):
        out = tmp_path / f"{axes}-{untie}"
        result = truncate_student(TruncateStudentConfig(**options, axes=axes, untie_head=untie, out=str(out)))
        student = GPT2LMHeadModel.from_pretrained(str(out))
        shape = student.config
        assert (shape.n_layer, shape.n_embd, shape.n_head, shape.n_inner, shape.n_positions) == (3, 20, 2, 50, 24)
        assert (student.lm_head.weight is student.transformer.wte.weight) is not untie
        assert result.parameters == sum(parameter.numel() for parameter in student.parameters())
        assert verify(VerifyConfig(path=str(out))).ok
        found[axes, untie] = result.perplexity.student
    assert found["rotated", False] < found["coordinates", False]
    assert found["rotated", True] < 1.1 * found["rotated", False]
    card = (tmp_path / "rotated-False" / "README.md").read_text()
    assert "in the main directions of its residual stream, with refitted projections" in card
    assert "| share of the norms' inputs kept |" in card


@pytest.mark.slow
def test_a_narrow_student_opens_where_this_package_is_not(trained: Path, data: Path, tmp_path: Path) -> None:
    config = {"teacher": str(trained), "data": str(data), "n_embd": 16, "num_layers": 3, "out": str(tmp_path / "s")}
    truncate_student(TruncateStudentConfig(**config))
    code = (
        "import sys; sys.modules['tinygpt2'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m, t = (k.from_pretrained(sys.argv[1]) for k in (AutoModelForCausalLM, AutoTokenizer))\n"
        "ids = t('the cat', return_tensors='pt')\n"
        "assert m.generate(**ids, max_new_tokens=5, do_sample=False).shape[1] > ids['input_ids'].shape[1]"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 5}, "only 4 layers"),
        ({"layers": "0,4"}, "does not exist"),
        ({"layers": "2,1"}, "in ascending order"),
        ({"layers": "1,1"}, "each of them once"),
        ({}, "give --num-layers or --layers, a width (--n-embd, --n-head, --n-inner) or --n-positions"),
        ({"num_layers": 2, "layers": "0"}, "--num-layers and --layers cannot be combined"),
        ({"layers": "0", "strategy": "first"}, "already names"),
        ({"num_layers": 2, "strategy": "importance"}, "--strategy importance needs --data, a dataset to measure on"),
        ({"n_embd": 16}, "a narrower student needs --data, a dataset to measure on"),
        ({"num_layers": 2, "refit": True}, "--refit needs --data, a dataset to measure on"),
        ({"num_layers": 2, "position": "first"}, "--n-positions"),
        ({"num_layers": 2, "calibration_sequences": 8}, "--calibration-sequences has no effect without --data"),
        ({"n_positions": 33}, "only 32 positions"),
        ({"n_embd": 20, "n_head": 3, "data": "DATA"}, "--n-head can be 1, 2, 4"),
        ({"n_head": 5, "data": "DATA"}, "only 4 heads"),
        ({"n_embd": 20, "n_head": 5, "data": "DATA"}, "only 4 heads"),
        ({"n_embd": 40, "data": "DATA"}, "the teacher's hidden size is only 32"),
        ({"num_layers": 2, "axes": "rotated"}, "--axes needs --n-embd, --n-head or a target"),
        ({"n_head": 3, "n_embd": 16, "data": "DATA"}, "--n-head can be 1, 2, 4"),
        ({"n_inner": 200, "data": "DATA"}, "only 128 inner units"),
    ],
)
def test_impossible_cuts(teacher: Path, data: Path, tmp_path: Path, options: dict, message: str) -> None:
    options = {key: str(data) if value == "DATA" else value for key, value in options.items()}
    with pytest.raises(ConfigError) as caught:
        truncate_student(TruncateStudentConfig(teacher=str(teacher), out=str(tmp_path / "s"), **options))
    assert message in f"{caught.value.message} {caught.value.hint}"
    assert not (tmp_path / "s").exists()


def test_an_output_matrix_of_its_own_stays_and_is_not_asked_for_twice(tokenizer_dir: Path, tmp_path: Path) -> None:
    teacher = make_model(tmp_path / "m", tokenizer_dir, tie_word_embeddings=False)
    cut = {"teacher": str(teacher), "num_layers": 2}
    with pytest.raises(ConfigError, match="--untie-head has no effect"):
        truncate_student(TruncateStudentConfig(**cut, untie_head=True, out=str(tmp_path / "s")))
    truncate_student(TruncateStudentConfig(**cut, out=str(tmp_path / "s")))
    student = GPT2LMHeadModel.from_pretrained(str(tmp_path / "s"))
    assert student.lm_head.weight is not student.transformer.wte.weight


def test_data_of_another_tokenizer_is_refused(data: Path, tmp_path: Path, corpus: Path) -> None:
    from tinygpt2 import TrainTokenizerConfig, train_tokenizer

    train_tokenizer(TrainTokenizerConfig(source=[str(corpus)], vocab_size=300, out=str(tmp_path / "t")))
    other = make_model(tmp_path / "m", tmp_path / "t", vocab_size=320)
    with pytest.raises(DataError, match="another tokenizer"):
        truncate_student(TruncateStudentConfig(teacher=str(other), n_head=2, data=str(data), out=str(tmp_path / "s")))


@pytest.mark.parametrize(
    ("shape", "part"),
    [({"add_cross_attention": True}, "crossattention"), ({"activation_function": "prelu"}, "mlp.act.weight")],
)
def test_a_teacher_with_other_parts_is_not_cut(
    tokenizer_dir: Path, tmp_path: Path, shape: dict[str, object], part: str
) -> None:
    teacher = make_model(tmp_path / "m", tokenizer_dir, **shape)
    with pytest.raises(ModelError, match=f"cannot be cut.*{part}"):
        truncate_student(TruncateStudentConfig(teacher=str(teacher), num_layers=2, out=str(tmp_path / "cut")))
    assert not (tmp_path / "cut").exists() or not any((tmp_path / "cut").iterdir())


def test_a_student_carries_no_settings_of_other_heads(tokenizer_dir: Path, tmp_path: Path) -> None:
    teacher = make_model(tmp_path / "m", tokenizer_dir)
    file = teacher / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "n_ctx": 7, "num_labels": 3, "task_specific_params": {}})
    )
    options = {"num_layers": 2, "n_positions": 16, "out": str(tmp_path / "cut")}
    truncate_student(TruncateStudentConfig(teacher=str(teacher), **options))
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 16
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert not config["add_cross_attention"]
    assert not {"id2label", "num_labels", "task_specific_params"} & set(config)


def test_the_card_has_the_commit_of_a_teacher_from_the_hub(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v2").write_text("b" * 40)
    shutil.copytree(teacher, repository / "snapshots" / ("b" * 40))
    truncate_student(TruncateStudentConfig(teacher="someone/tiny@v2", num_layers=2, out=str(tmp_path / "cut")))
    assert f"| revision of the teacher | {'b' * 40} |" in (tmp_path / "cut" / "README.md").read_text()
