"""`verify`: check whether a dataset or a model is intact and works as it should."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinygpt2.config.workflows import VerifyConfig
from tinygpt2.data.dataset import is_packed_dataset
from tinygpt2.data.validation import check_dataset
from tinygpt2.errors import DataError, ModelError
from tinygpt2.models.weights import PICKLE, SAFETENSORS
from tinygpt2.utils.hub import is_hub_id, local_directory

if TYPE_CHECKING:
    from tinygpt2.workflows.model_verification import Agreement


@dataclass(frozen=True)
class VerifyResult:
    """The result of `verify`.

    Attributes:
        ok: whether there are no problems.
        problems: the faults that were found.
        notes: observations that are not faults.
        reference: how well a model agrees with the GPT-2 of `tinygpt2.reference`; None for a dataset.
        copies: with a teacher, the names of the student's tensors that are copies, each with the teacher's name.
    """

    path: str
    kind: Literal["dataset", "model"]
    ok: bool
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    reference: Agreement | None = None
    copies: dict[str, str] | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of the command line: 0, or the code for a faulty dataset or model."""
        faulty = DataError.exit_code if self.kind == "dataset" else ModelError.exit_code
        return 0 if self.ok else faulty


def verify(config: VerifyConfig) -> VerifyResult:
    """Check a pregenerated dataset or a model directory, and list every fault.

    Raises:
        DataError: there is neither a dataset nor a model at that path, or a dataset was given with a teacher.
        ModelError: a Hub id cannot be downloaded, or the teacher cannot be loaded.
    """
    path = _directory(config)
    # look for a model first: the directory of a model that was fine-tuned on a text also holds a dataset
    if not any((path / name).is_file() for name in ("config.json", SAFETENSORS, PICKLE)):
        if not is_packed_dataset(path):
            raise DataError(f"{path} is neither a pregenerated dataset nor a model directory")
        if config.teacher is not None:
            raise DataError(f"{path} is a dataset, but --teacher needs a student model")
        problems = list(check_dataset(path))
        return VerifyResult(str(path.resolve()), "dataset", not problems, problems)
    from tinygpt2.workflows.model_verification import check_model  # a dataset is checked without torch

    found = check_model(path, config)
    where, whole = str(path.resolve()), not found.problems
    return VerifyResult(where, "model", whole, found.problems, found.notes, found.reference, found.copies)


def _directory(config: VerifyConfig) -> Path:
    """Return the directory to check; the model of a Hub id is downloaded."""
    path = Path(config.path).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not is_hub_id(config.path):
        raise DataError(f"no such directory: {path}", "verify takes a pregenerated dataset or a model")
    return local_directory(config.path, "model", allow_pickle=config.allow_pickle, weights=True)
