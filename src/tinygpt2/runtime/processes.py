"""The place of this process among several that a launcher started, and when its command began."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

BEGAN = "TINYGPT2_BEGAN"  # tells the processes that a command starts when the command began
_began: ContextVar[float | None] = ContextVar("began", default=None)


@contextmanager
def command_begins() -> Iterator[None]:
    """While the block runs, `command_began` returns the time at which it was entered."""
    token = _began.set(time.time())
    try:
        yield
    finally:
        _began.reset(token)


def command_began() -> float:
    """Return when the command of this process began, in seconds since 1970; now, if there is no command."""
    known = float(os.environ[BEGAN]) if BEGAN in os.environ else _began.get()
    return time.time() if known is None else known


def launched() -> bool:
    """Return whether this process is one of several that a launcher started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Return this process's number, or 0 if it is the only one."""
    return int(os.environ.get("RANK", "0")) if launched() else 0
