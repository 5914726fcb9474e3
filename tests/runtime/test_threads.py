"""Threads: one for work that is too small for several, and never against the user's own number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tinygpt2 import GenerateConfig
from tinygpt2.decoding import generation
from tinygpt2.runtime import threads
from tinygpt2.runtime.cpu import wait_passively
from tinygpt2.utils import progress


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute on two threads, which the user has not asked for."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_work_has_one_thread_and_the_number_returns(two: None) -> None:
    with threads.enough_threads(threads.SHARED - 1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyboardInterrupt), threads.enough_threads(0):
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 2
    with threads.enough_threads(threads.SHARED):
        assert torch.get_num_threads() == 2


def test_the_users_own_number_is_kept(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with threads.enough_threads(0):
        assert torch.get_num_threads() == 2


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_passively()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT")) == ("ACTIVE", None)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    wait_passively()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("PASSIVE", "1000")


def test_the_number_of_threads_does_not_change_the_text(
    two: None, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one thread, as the rule has it, and on two, the greedy text is the same; --verbose says which it was."""
    monkeypatch.setattr(progress, "_mode", "plain")
    monkeypatch.setattr(progress, "_level", "verbose")
    monkeypatch.setattr(progress, "_told", set())
    config = GenerateConfig(model=[str(teacher)], prompt=["the cat"], max_new_tokens=20)
    one = generation.generate(config).results[0].text
    assert "1 thread instead of 2" in capsys.readouterr().err
    monkeypatch.setattr(threads, "SHARED", 0.0)
    assert generation.generate(config).results[0].text == one
    assert "1 thread" not in capsys.readouterr().err
