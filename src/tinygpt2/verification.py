"""`verify`: whether a dataset or model is what it should be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinygpt2.config import VerifyConfig
from tinygpt2.dataset import check_dataset, is_packed
from tinygpt2.errors import DataError, ModelError
from tinygpt2.model import check_model, model_tokenizer


@dataclass(frozen=True)
class VerifyResult:
    """What was found: `problems` are faults, `notes` are not."""

    path: str
    kind: Literal["dataset", "model"]
    ok: bool
    problems: list[str]
    notes: list[str]

    @property
    def exit_code(self) -> int:
        """What the command line exits with: 0, or the code of a faulty dataset or model."""
        faulty = DataError.exit_code if self.kind == "dataset" else ModelError.exit_code
        return 0 if self.ok else faulty


def verify(config: VerifyConfig) -> VerifyResult:
    """Check a pregenerated dataset or a model directory and list every fault found.

    Raises:
        DataError: there is neither at that path.
    """
    path = Path(config.path)
    if not path.is_dir():
        raise DataError(f"no such directory: {path}", "verify takes a pregenerated dataset or a model directory")
    if is_packed(path):
        problems = list(check_dataset(path))
        return VerifyResult(str(path.resolve()), "dataset", not problems, problems, [])
    if not any((path / name).is_file() for name in ("config.json", "model.safetensors", "pytorch_model.bin")):
        raise DataError(f"{path} is neither a pregenerated dataset nor a model directory")
    problems = list(check_model(path))
    notes = [] if problems or model_tokenizer(path) else ["no tokenizer beside the weights"]
    return VerifyResult(str(path.resolve()), "model", not problems, problems, notes)
