"""What a run is set up with: vocabularies, and checkpoints that are models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.conftest import make_model
from tinygpt2 import DistillConfig, PretrainConfig, VerifyConfig, distill, pretrain, verify
from tinygpt2.models.loading import load_model
from tinygpt2.models.teachers import teacher as teacher_module
from tinygpt2.training.metrics import read_metrics


def test_a_student_with_random_weights_has_the_teachers_vocabulary(
    tokenizer_dir: Path, data: Path, tmp_path: Path
) -> None:
    teacher = make_model(tmp_path / "teacher", tokenizer_dir, vocab_size=384)
    shape = tmp_path / "shape.yaml"
    shape.write_text("{n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32}")
    config = DistillConfig(
        teacher=str(teacher),
        student=str(shape),
        data=str(data),
        out=str(tmp_path / "out"),
        max_steps=1,
        micro_batch_size=2,
    )
    distill(config)
    assert load_model(str(tmp_path / "out"))[0].config.vocab_size == 384


def test_a_checkpoint_opens_like_any_model(teacher: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pretrain(PretrainConfig(model=str(teacher), data=str(data), out=str(out), max_steps=2, micro_batch_size=2))
    (checkpoint,) = (out / "checkpoints").iterdir()
    ours, final = load_model(str(checkpoint))[0], GPT2LMHeadModel.from_pretrained(out)
    for name, tensor in final.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert verify(VerifyConfig(path=str(checkpoint))).ok
    assert len(AutoTokenizer.from_pretrained(checkpoint)) == 320
    listed = json.loads((checkpoint / "state.json").read_text())["files"]
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= set(listed)


def test_the_card_has_the_commit_of_a_model_from_the_hub(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    shutil.copytree(teacher, repository / "snapshots" / ("c" * 40))
    out = tmp_path / "out"
    pretrain(PretrainConfig(model="someone/tiny", data=str(data), out=str(out), max_steps=1, micro_batch_size=2))
    assert f"| revision of the base | {'c' * 40} |" in (out / "README.md").read_text()
    assert f"model: someone/tiny@{'c' * 40}\n" in (out / "config.yaml").read_text()
    path = repository / "snapshots" / ("c" * 40)  # given as a path, it is a directory like others
    pretrain(PretrainConfig(model=str(path), data=str(data), out=str(tmp_path / "2"), max_steps=1, micro_batch_size=2))
    assert f"model: {path}\n" in (tmp_path / "2" / "config.yaml").read_text()
    assert str(tmp_path) not in (tmp_path / "2" / "README.md").read_text()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_teacher_is_cast_once_for_the_runs_products(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Losses and the teacher's figures stay the same to the last bit."""
    rows, types = [], []
    for name in ("cast", "not cast"):
        config = DistillConfig(
            teacher=str(teacher), student=str(teacher), data=str(data), out=str(tmp_path / name), recipe="tinygpt2",
            max_steps=3, micro_batch_size=2, log_every=1, precision=precision,
        )  # fmt: skip
        if name == "not cast":
            monkeypatch.setattr(teacher_module, "cast_linear_layers", lambda model, dtype: types.append(dtype))
        made = distill(config)
        rows.append([(row["loss"], row.get("teacher/loss")) for row in read_metrics(Path(made.model))])
    assert rows[0] == rows[1]
    assert types == ([torch.bfloat16] if precision == "bf16" else [])
