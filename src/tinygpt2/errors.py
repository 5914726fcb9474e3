"""The exceptions of this package. Each expected failure has a message, a hint and an exit code.

The library raises these exceptions. The command line prints them in a few lines and exits with `exit_code`. Any other
exception is a bug in this package; the command line then exits with 1.
"""

from __future__ import annotations


def one_line(error: object, limit: int | None = None) -> str:
    """Return a message, which may span several lines, as one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


class TinyGPT2Error(Exception):
    """Base class of all expected failures.

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
    """An option, a YAML file or a model shape is wrong, or the output directory is not empty."""

    exit_code = 2


class DataError(TinyGPT2Error):
    """A text or dataset is missing, unreadable, empty, too short, or was made with another tokenizer."""

    exit_code = 3


class UnreadableError(DataError):
    """A source could not be read this time because a disk or a network failed. Another try may succeed."""


class ModelError(TinyGPT2Error):
    """A model or checkpoint cannot be used: no download, broken weights, pickles, or the wrong vocabulary."""

    exit_code = 4


class DivergedError(TinyGPT2Error):
    """The loss or the gradient became NaN or infinite during training."""

    exit_code = 5


class InterruptedRunError(TinyGPT2Error):
    """A signal stopped the run after its state was saved."""

    exit_code = 130


def internal_error(error: BaseException, where: str = "") -> TinyGPT2Error:
    """Return the message for an unexpected error, which is a bug to report."""
    return TinyGPT2Error(
        f"{where}internal error: {type(error).__name__}: {one_line(error, 500)}",
        "this is a bug in tinygpt2: please run the command again with TINYGPT2_DEBUG=1 and report the traceback",
    )
