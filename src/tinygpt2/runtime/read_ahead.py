"""Read what the next step needs in a thread, while the current step computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Reads the values of consecutive numbers, each while the one before it is used.

    Args:
        read: returns the value of a number. It runs in one thread, or in the caller's for a number that was not
            expected.
    """

    def __init__(self, read: Callable[[int], T]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._next: tuple[int, Future[T]] | None = None

    def __call__(self, number: int) -> T:
        """Return the value of a number, and begin to read that of the next.

        Raises:
            Whatever `read` raised for this number.
        """
        self.wait()  # two threads never read at the same time
        expected = self._next is not None and self._next[0] == number
        value = self._next[1].result() if self._next is not None and expected else self._read(number)
        self._next = number + 1, self._thread.submit(self._read, number + 1)
        return value

    def wait(self) -> None:
        """Wait until nothing is being read, so that the caller alone uses the files."""
        if self._next is not None:
            wait([self._next[1]])

    def close(self) -> None:
        """End the thread. A failure to read what nobody asked for is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
