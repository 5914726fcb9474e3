from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from tinygpt2 import TruncateStudentConfig, truncate_student
from tinygpt2.errors import ConfigError
from tinygpt2.truncate import choose_layers


@pytest.mark.parametrize(
    ("total", "keep", "strategy", "expected"),
    [
        (12, 6, "uniform", [0, 2, 4, 7, 9, 11]), (12, 6, "alternate", [0, 2, 4, 6, 8, 10]), (12, 4, "first", [0, 1, 2, 3]),
        (12, 4, "last", [8, 9, 10, 11]), (12, 1, "uniform", [0]), (24, 3, "uniform", [0, 12, 23]), (7, 7, "uniform", list(range(7))),
        (7, 7, "alternate", list(range(7))), (36, 12, "alternate", list(range(0, 36, 3))),
    ],
)  # fmt: skip
def test_layer_choices(total: int, keep: int, strategy: str, expected: list[int]) -> None:
    assert choose_layers(total, keep, strategy) == expected


def test_weights_are_the_teachers(teacher: Path, tmp_path: Path) -> None:
    result = truncate_student(TruncateStudentConfig(teacher=str(teacher), layers="0,3", out=str(tmp_path / "s")))
    plain_teacher = GPT2LMHeadModel.from_pretrained(str(teacher))
    student = GPT2LMHeadModel.from_pretrained(str(tmp_path / "s"))
    assert result.layers == [0, 3]
    assert student.config.n_layer == 2
    assert result.parameters == sum(p.numel() for p in student.parameters())
    assert result.teacher_parameters == sum(p.numel() for p in plain_teacher.parameters())
    for name, tensor in student.state_dict().items():
        origin = name.replace(".h.1.", ".h.3.")
        assert torch.equal(tensor, plain_teacher.state_dict()[origin]), name
    assert len(AutoTokenizer.from_pretrained(str(tmp_path / "s"))) == 320
    assert "blocks 0, 3" in (tmp_path / "s" / "README.md").read_text()


def test_all_layers_is_the_teacher(teacher: Path, tmp_path: Path) -> None:
    truncate_student(TruncateStudentConfig(teacher=str(teacher), num_layers=4, out=str(tmp_path / "s")))
    ids = torch.arange(32)[None]
    models = [GPT2LMHeadModel.from_pretrained(str(path)).eval() for path in (teacher, tmp_path / "s")]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)


@pytest.mark.parametrize("options", [{"num_layers": 5}, {"layers": "0,4"}, {"layers": "2,1"}, {"layers": "1,1"}])
def test_impossible_layers(teacher: Path, tmp_path: Path, options: dict) -> None:
    with pytest.raises(ConfigError):
        truncate_student(TruncateStudentConfig(teacher=str(teacher), out=str(tmp_path / "s"), **options))
    assert not (tmp_path / "s").exists()
