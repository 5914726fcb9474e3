"""The exceptions of this package. Each expected failure has a message, a hint and an exit code.

The library raises these exceptions. The command line prints them in a few lines and exits with `exit_code`. Any other
exception is a bug in this package; the command line then exits with 1.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_MACHINE = {  # errors of the system that are the machine's, and what helps
    errno.ENOSPC: "free some disk space", errno.EDQUOT: "free some of your disk quota",
    errno.EFBIG: "raise the limit on the size of files", errno.EROFS: "make the disk writable",
    errno.EIO: "check the disk", errno.ENOMEM: "free some memory",
}  # fmt: skip
_NO_HOST_MEMORY = re.compile(r"can't allocate memory|bad_alloc|DefaultCPUAllocator")
# torch's allocator, the driver, cuBLAS (also when it starts), cuDNN, Triton, NCCL, and the same of ROCm
_NO_GPU_MEMORY = re.compile(
    r"out of memory|hipErrorOutOfMemory|_STATUS_ALLOC_FAILED|_STATUS_\w*ALLOCATION|cublasCreate"
)
_GPU_FAILED = re.compile(r"\b(CUDA|HIP)( driver)? error|\b(CUBLAS|HIPBLAS|CUDNN)_STATUS_|Triton Error \[|NCCL error")


def one_line(error: object, limit: int | None = None) -> str:
    """Return a message, which may span several lines, as one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


def first_sentence(text: str) -> str:
    """Return a text up to the end of its first sentence."""
    return re.split(r"(?<=[.?!]) (?=[A-Z-])", text, maxsplit=1)[0]


def listed(names: Iterable[object], most: int = 3) -> str:
    """Return the first few names as a list: `a, b, c and 12 more`."""
    words = [str(name) for name in names]
    return ", ".join(words[:most]) + (f" and {len(words) - most:,} more" if len(words) > most else "")


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


class MachineError(TinyGPT2Error):
    """The machine ran out of disk space, quota or memory, or its disk is read-only or broken."""

    exit_code = 6


class InterruptedRunError(TinyGPT2Error):
    """A signal stopped the run. The message says what was kept, the hint how to continue."""

    exit_code = 130


def internal_error(error: BaseException, where: str = "") -> TinyGPT2Error:
    """Return the message for an unexpected error, which is a bug to report."""
    return TinyGPT2Error(
        f"{where}internal error: {type(error).__name__}: {one_line(error, 500)}",
        "this is a bug in tinygpt2: please run the command again with TINYGPT2_DEBUG=1 and report the traceback",
    )


def reason_of(error: BaseException) -> str:
    """Return the reason of a library's or the system's error in one line."""
    return one_line(getattr(error, "strerror", None) or error)


def error_number(error: BaseException) -> int | None:
    """Return the system's number of an error; libraries that are not written in Python put it into their message."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"(?:os error|errno =|\[Errno) (\d+)", str(error))):
        number = int(found[1])
    return number


def os_failure(
    error: BaseException, what: str, hint: str, otherwise: type[TinyGPT2Error] = ConfigError
) -> TinyGPT2Error:
    """Return the expected failure for an error of the operating system, or of a library that writes files.

    A full disk, a quota, a read-only or broken disk and a lack of memory are a `MachineError`. A path that cannot be
    used, for example without permission, is a `ConfigError`.

    Args:
        what: what could not be done, and where.
        hint: what to do after the cause is removed.
        otherwise: the class of an error that has no number of the operating system.
    """
    number = errno.ENOMEM if isinstance(error, MemoryError) else error_number(error)
    if number is None:
        return otherwise(f"{what}: {reason_of(error)}", f"check the disk space and the permissions; {hint}")
    message = f"{what}: {os.strerror(number)}"
    if number in _MACHINE:
        return MachineError(message, f"{_MACHINE[number]}; {hint}")
    return ConfigError(message, f"check the path and its permissions; {hint}")


@contextmanager
def explained(what: str, hint: str, otherwise: type[TinyGPT2Error] = ConfigError) -> Iterator[None]:
    """Turn an error of the operating system in the block into an expected failure; the arguments are `os_failure`'s."""
    try:
        yield
    except (OSError, MemoryError) as error:
        raise os_failure(error, what, hint, otherwise) from error


def out_of_gpu_memory(error: BaseException) -> bool:
    """Return whether an error means that a GPU's memory ran out, whichever library or driver reports it.

    Only torch's allocator raises an error of a class of its own; the others are known by their messages.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or _NO_HOST_MEMORY.search(text):
        return False
    # torch need not be imported to know its error
    return type(error).__name__ == "OutOfMemoryError" or _NO_GPU_MEMORY.search(text) is not None


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out: in the machine, in this process or on the GPU."""
    return (
        isinstance(error, MemoryError)
        or out_of_gpu_memory(error)
        or (isinstance(error, RuntimeError) and _NO_HOST_MEMORY.search(str(error)) is not None)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    )


def gpu_failure(error: BaseException, then: str) -> TinyGPT2Error | None:
    """Return the expected failure if a GPU, its driver or one of its libraries reports an error, otherwise None.

    Args:
        then: a sentence that says what to do after the cause is removed.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or not _GPU_FAILED.search(text):
        return None
    first = one_line(text.strip().partition("\n")[0], 300)
    if "device-side assert" in text:
        return DataError(
            f"an operation on the GPU refused its input: {first}",
            f"the usual cause is a token outside the model's vocabulary: check the data with tinygpt2 verify. {then}",
        )
    return MachineError(
        f"the GPU, its driver or a library failed: {first}",
        f"nvidia-smi and the system's log may say why; if it happens again at the same place, report it. {then}",
    )


def machine_failure(error: BaseException) -> TinyGPT2Error | None:
    """Return the expected failure if the machine's memory, disk or GPU is the cause of an error, otherwise None."""
    if out_of_memory(error):
        return MachineError(
            f"out of memory: {one_line(error, 200) or type(error).__name__}",
            "use a smaller batch, model or --num-workers, or a machine with more memory",
        )
    if isinstance(error, OSError) and error_number(error) in _MACHINE:
        where = error.filename or "input or output"
        failure = os_failure(error, str(where), "then run the command again")
        return failure if isinstance(failure, MachineError) else None
    return gpu_failure(error, "Then run the command again")
