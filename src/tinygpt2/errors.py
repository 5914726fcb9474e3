"""The error family: every expected failure is a message, a hint and an exit code.

The library raises these; the command line prints them as a few lines and exits with `exit_code`. Anything
else that escapes is a defect of ours and exits 1.
"""

from __future__ import annotations


def one_line(error: object, limit: int | None = None) -> str:
    """Return a message, which may span several lines, as one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


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


def internal_error(error: BaseException, where: str = "") -> TinyGPT2Error:
    """Return the message for an error that nobody expected: a bug to report."""
    return TinyGPT2Error(
        f"{where}internal error: {type(error).__name__}: {one_line(error, 500)}",
        "this is a bug in tinygpt2: please run the command again with TINYGPT2_DEBUG=1 and report the traceback",
    )
