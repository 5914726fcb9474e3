"""Reading ahead: the same values in the same order, and errors where they belong."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from tinygpt2.runtime.read_ahead import ReadAhead


def test_the_next_value_is_read_in_a_thread_while_the_last_is_used() -> None:
    read, done = [], threading.Event()

    def double(number: int) -> int:
        read.append((number, threading.current_thread() is threading.main_thread()))
        if number == 6:
            done.set()
        return 2 * number

    with closing(ReadAhead(double)) as ahead:
        assert ahead(5) == 10
        assert done.wait(10)  # nobody has asked for 6 yet
        assert ahead(6) == 12
        assert ahead(3) == 6  # a number that was not expected
        assert ahead(4) == 8
        ahead.wait()
    assert read == [(5, True), (6, False), (7, False), (3, True), (4, False), (5, False)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_an_error_is_raised_for_the_number_that_it_belongs_to() -> None:
    def read(number: int) -> int:
        if number in (2, 5):
            raise ValueError(f"block {number}")
        return number

    with closing(ReadAhead(read)) as ahead:
        assert ahead(1) == 1
        ahead.wait()  # it has failed by now
        with pytest.raises(ValueError, match="block 2"):
            ahead(2)
        assert [ahead(3), ahead(4)] == [3, 4]  # the end: nobody asks for 5
