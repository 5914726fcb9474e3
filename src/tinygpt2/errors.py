"""The error family: every expected failure is a message, a hint and an exit code.

The library raises these; the command line prints them as a few lines and exits with `exit_code`. Anything
else that escapes is a defect of ours and exits 1.
"""

from __future__ import annotations


class TinyGPT2Error(Exception):
    """An expected failure.

    Args:
        message: what went wrong and where, in one or a few lines.
        hint: the command or option that helps, if there is one.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ConfigError(TinyGPT2Error):
    """Wrong usage or configuration: options, YAML, shapes, a non-empty output directory."""

    exit_code = 2


class DataError(TinyGPT2Error):
    """Texts and datasets: missing, unreadable, empty, too short, made with another tokenizer."""

    exit_code = 3


class UnreadableError(DataError):
    """A source that could not be read this time: a disk or a network failed, and another try may succeed."""


class ModelError(TinyGPT2Error):
    """Models and checkpoints: Hub, weights, pickles, vocabularies that do not fit."""

    exit_code = 4


class DivergedError(TinyGPT2Error):
    """Training met a loss or gradient that is not finite."""

    exit_code = 5


class InterruptedRunError(TinyGPT2Error):
    """The run was stopped by a signal after its state was saved."""

    exit_code = 130
