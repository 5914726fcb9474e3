"""Treat Ctrl-C and SIGTERM as a request to stop: the loop finishes its step, saves a checkpoint and ends."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from tinygpt2.errors import InterruptedRunError
from tinygpt2.runtime.processes import launched
from tinygpt2.utils.progress import say

T = TypeVar("T")


class StopRequest:
    """True as soon as a signal has asked the run to stop."""

    def __init__(self) -> None:
        self.requested = False

    def __bool__(self) -> bool:
        return self.requested


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While the block runs, turn the first SIGINT or SIGTERM into a request to stop; a second one stops immediately.

    If a launcher started several processes, a second signal does not stop them: Ctrl-C reaches each of them twice,
    from the terminal and from the launcher.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        request.requested = True
        if launched():
            say("Finishing this step and saving a checkpoint.")
            return
        say("Finishing this step and saving a checkpoint. Press Ctrl-C again to stop immediately.")
        restore()

    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    for number in earlier:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        restore()


def stop_like_ctrl_c() -> None:
    """Treat SIGTERM in the same way as Ctrl-C from now on."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, raise_interrupt)


def consumed_interruptibly(consume: Callable[[Iterator[T]], object], items: Iterable[T]) -> None:
    """Let a library consume an iterator in a thread, while this one waits for it and answers Ctrl-C at once.

    A library that iterates in threads of its own would keep Python from seeing a signal until it has finished.
    """
    stopped, ended, errors = threading.Event(), threading.Event(), []

    def until_stopped() -> Iterator[T]:
        for item in items:
            if stopped.is_set():
                return
            yield item

    def work() -> None:
        try:
            consume(until_stopped())
        except BaseException as error:  # it is raised in the thread that waits
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=work, daemon=True).start()
    try:
        ended.wait()  # an interrupted join would call the thread ended
    except KeyboardInterrupt:
        atexit.register(_end_unless, ended)
        raise
    finally:
        stopped.set()
    if errors:
        raise errors[0]


def _end_unless(ended: threading.Event) -> None:
    """End the program at once if a library still runs in a thread: as Python ends, the thread would abort it."""
    if not ended.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(InterruptedRunError.exit_code)


def raise_interrupt(number: int, frame: Any) -> None:
    """Handle a signal in the same way as Ctrl-C."""
    raise KeyboardInterrupt
