"""One writer for each output: a lock file next to the output, which the system releases when its process ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout, UnixFileLock

from tinygpt2.errors import ConfigError, os_failure
from tinygpt2.utils.files import LOCK_INSIDE

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, its host, and the time (seconds since 1970) since when."""

    process: int
    host: str
    since: float


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """While the block runs, no other run may write to `out`.

    The lock file is `.NAME.lock` next to `out`, and holds the process and the host. The operating system releases the
    lock when its process ends, however it ends, so a lock file that was left behind never blocks. If nothing can be
    written next to `out`, for example because `out` is a mounted volume, the lock file is `.lock` inside `out`.

    Raises:
        ConfigError: another run writes to `out` (the message says which), or nothing can be written there.
        MachineError: the disk is full or read-only.
    """
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = os.access(out.parent, os.W_OK) or not out.is_dir()
        file = out.parent / f".{out.name}.lock" if beside else out / LOCK_INSIDE
        lock = FileLock(file, timeout=0)
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another run writes to {out}: {_holder(file)}", "wait until it ends, or give another --out"
        ) from None
    except OSError as error:
        raise os_failure(error, f"cannot write next to {out}", "give another --out") from error
    try:
        if isinstance(lock, UnixFileLock):  # a SoftFileLock names its holder itself
            file.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        if isinstance(lock, UnixFileLock):
            file.unlink(missing_ok=True)  # whoever waits for the deleted file sees that it is deleted
        lock.release()


def holder_of(out: Path) -> Holder | None:
    """Return who holds the lock of an output according to its lock file, or None if there is none.

    A process that was killed leaves its lock file.
    """
    out = out.resolve()
    found = map(_read, (out.parent / f".{out.name}.lock", out / LOCK_INSIDE))
    return next((holder for holder in found if holder is not None), None)


def _read(file: Path) -> Holder | None:
    try:
        process, host = file.read_text(encoding="utf-8").split()[:2]
        return Holder(int(process), host, file.stat().st_mtime)
    except (OSError, ValueError):  # there is none, or it has just been taken or released
        return None


def _holder(file: Path) -> str:
    """Say who holds a lock."""
    holder = _read(file)
    if holder is None:
        return "a process that has just started"
    since = datetime.fromtimestamp(holder.since).astimezone()
    return f"process {holder.process} on {holder.host}, since {since:%Y-%m-%d %H:%M:%S}"


def writes_out(command: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Decorate a function whose first argument is a configuration: it is the only one that writes to `config.out`."""

    @wraps(command)
    def locked(config: Any, /, *arguments: P.args, **more: P.kwargs) -> R:
        with only_writer(Path(config.out)):
            return command(config, *arguments, **more)

    return locked
