"""Whole steps on a GPU that is not there: nothing raises, nothing waits, and planted faults are found."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fake_gpu.harness import compile_device, run

WAITS = 1  # of the host for the GPU, in an optimizer step: the losses and the norm are looked at
EVALUATION_WAITS = 1
MUON_KERNELS, ADAMW_KERNELS = 80, 8

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = compile_device(tmp_path_factory.mktemp("fake-gpu"))

    def of(*arguments: str) -> Any:
        done = run(library, "-m", "tests.fake_gpu.cases", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return of


def test_steps_of_every_kind_wait_once(seen: Any) -> None:
    """In every pair of two choices; all 96 combinations with FAKE_GPU_ALL=1, which takes minutes."""
    results = seen("cases", *(["--all"] if os.environ.get("FAKE_GPU_ALL") else []))
    assert len(results) >= 12
    for name, one in results.items():
        assert sum(one["waits"].values()) <= WAITS, (name, one["waits"])
        assert sum(one["evaluation_waits"].values()) <= EVALUATION_WAITS, (name, one["evaluation_waits"])
        assert one["wide"] == {}, name
        most = MUON_KERNELS if "muon" in name else ADAMW_KERNELS
        assert one["optimizer_kernels"] <= most, (name, one["optimizer_kernels"])


def test_planted_faults_are_found(seen: Any) -> None:
    found = seen("faults")
    assert len(found) >= 10
    assert all(found.values()), found


def test_the_benchmark_counts_what_it_promises(tmp_path: Path) -> None:
    from benchmarks import fake_gpu

    found = fake_gpu.measured(tmp_path)
    assert found["synchronisations"] <= 1
    assert found["padded_synchronisations"] <= 2
    assert found["optimizer_kernels"]["muon"] <= MUON_KERNELS
    assert found["logit_bytes_moved"] <= 6e9
