"""`verify`: check whether a dataset or a model is intact and works as it should."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinygpt2.config.workflows import VerifyConfig
from tinygpt2.data.layout import is_packed_dataset
from tinygpt2.data.validation import check_dataset
from tinygpt2.errors import ConfigError, DataError, ModelError
from tinygpt2.exporting.outputs import exported_format
from tinygpt2.models.directory import directory_to_verify, is_model_directory, nothing_to_verify
from tinygpt2.utils.hub import local_directory

if TYPE_CHECKING:
    from tinygpt2.exporting.checks import ExportChecks
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
        export: what the engine of an exported model computes beside the model; None if there is no exported model.
    """

    path: str
    kind: Literal["dataset", "model"]
    ok: bool
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    reference: Agreement | None = None
    copies: dict[str, str] | None = None
    export: ExportChecks | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of the command line: 0, or the code for a faulty dataset or model."""
        faulty = DataError.exit_code if self.kind == "dataset" else ModelError.exit_code
        return 0 if self.ok else faulty


def verify(config: VerifyConfig) -> VerifyResult:
    """Check a pregenerated dataset, a model directory or an exported model, and list every fault.

    Raises:
        ConfigError: the engine of an exported model is not installed, or what is there does not take an option.
        DataError: there is neither a dataset nor a model at that path.
        ModelError: a Hub id cannot be downloaded, or the teacher or the exported model's source cannot be loaded.
    """
    if exported_format(Path(config.path)) is not None:
        return _verify_export(Path(config.path), config)
    for name in ("model", "data"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{config.path} is not an exported model, which --{name} is for")
    path = _directory(config)
    # look for a model first: the directory of a model that was fine-tuned on a text also holds a dataset
    if not is_model_directory(path):
        if not is_packed_dataset(path):
            raise nothing_to_verify(path)
        if config.teacher is not None:
            raise ConfigError(f"{path} is a dataset, but --teacher needs a student model")
        problems = list(check_dataset(path))
        return VerifyResult(str(path.resolve()), "dataset", not problems, problems)
    from tinygpt2.workflows.model_verification import check_model  # a dataset is checked without torch

    found = check_model(path, config)
    where, whole = str(path.resolve()), not found.problems
    return VerifyResult(where, "model", whole, found.problems, found.notes, found.reference, found.copies)


def _verify_export(path: Path, config: VerifyConfig) -> VerifyResult:
    from tinygpt2.exporting.verification import check_export

    if config.teacher is not None:
        raise ConfigError(f"{path} is an exported model, and --teacher needs a student model", "use --model")
    found = check_export(path, config)
    where, whole = str(path.resolve()), not found.problems
    return VerifyResult(where, "model", whole, found.problems, found.notes, export=found.checks)


def _directory(config: VerifyConfig) -> Path:
    """Return the directory to check; the model of a Hub id is downloaded."""
    path = directory_to_verify(config.path)
    if path is not None:
        return path
    return local_directory(config.path, "model", allow_pickle=config.allow_pickle, weights=True)
