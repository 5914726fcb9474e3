"""A teacher to cut, and a search that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import make_model
from tinygpt2 import PretrainConfig, pretrain
from tinygpt2.workflows.cuts import search as module


@pytest.fixture(scope="session")
def trained(data: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that knows something, of 4 layers of 32."""
    root = tmp_path_factory.mktemp("trained")
    start = make_model(root / "start", tokenizer_dir, n_positions=32)
    how = {"max_steps": 100, "learning_rate": 3e-3, "lr_schedule": "cosine"}
    pretrain(PretrainConfig(model=str(start), data=str(data), out=str(root / "m"), **how))
    return root / "m"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of seconds."""
    for name, value in {"SHAPES": 6, "FINALISTS": 2, "STEPS": 3, "STEP_TOKENS": 128}.items():
        monkeypatch.setattr(module, name, value)
