"""The package on a GPU of fake tensors: nothing raises, everything is where it must be, and the host hardly waits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fake_gpu.device import ROOT, start
from tests.fake_gpu.limits import BENCHMARK, CACHE, OPTIMIZER, OTHER, STEP

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the fake device")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Everything runs in one process, because to import torch takes longer than a case."""
    done = start("tests.fake_gpu", "--json", "--faults")
    assert done.returncode == 0, done.stdout
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _runs(rows: list[Row]) -> Iterator[Row]:
    yield from (row for row in rows if row["fault"] is None)


def _last_step(row: Row) -> Row:
    return row["parts"]["step 3"]


def test_nothing_raises_and_every_tensor_has_its_device_and_type(rows: list[Row]) -> None:
    wrong = [
        f"{row['case']}, {row['work']}: {row['error'] or counts['faults']}"
        for row in _runs(rows)
        for counts in (row["parts"] or {"": {"faults": "raised"}}).values()
        if row["error"] or counts["faults"]
    ]
    assert not wrong, "\n".join(wrong)
    trained = [row["case"].split("-") for row in _runs(rows) if row["work"] == "train"]
    for place, choices in enumerate((4, 3, 2, 2, 2)):  # recipe, precision, optimizer, padded, accumulation
        assert len({case[place] for case in trained}) == choices


def test_the_host_hardly_waits_for_the_gpu(rows: list[Row]) -> None:
    too_many = []
    for row in _runs(rows):
        limits = dict(OTHER)
        if "train" in row["work"]:
            limits["step 3"] = STEP[row["padded"], int(row["case"].rsplit("-", 1)[1])]
            limits["step 3"] += CACHE if row["work"] == "cached train" else 0
        for name, limit in limits.items():
            counts = row["parts"].get(name)
            if counts is not None and counts["synchronisations"] > limit:
                too_many.append(f"{row['case']}, {row['work']}, {name}: {counts['synchronisations']} > {limit}")
                too_many += [f"    {count} x {what}" for what, count in counts["waits"].items()]
    assert not too_many, "\n".join(too_many)


def test_an_optimizer_takes_its_step_in_few_kernels(rows: list[Row]) -> None:
    found = {"adamw": set(), "muon": set()}
    for row in _runs(rows):
        if "train" in row["work"]:
            found[row["optimizer"]].add(row["parts"]["optimizer"]["kernels"])
    for name, limit in OPTIMIZER.items():
        assert found[name]
        assert 0 < max(found[name]) <= limit, name


def test_every_planted_fault_is_found(rows: list[Row]) -> None:
    (clean,) = (row for row in _runs(rows) if row["case"] == "default-bf16-muon-full-1" and row["work"] == "train")
    planted = [row for row in rows if row["fault"] is not None]
    assert len(planted) >= 10
    missed = [row["fault"] for row in planted if row["expected"] not in _ways_found(row, clean)]
    assert not missed


def _ways_found(row: Row, clean: Row) -> set[str]:
    """Return how a fault shows itself."""
    if row["error"]:
        return {"wrong"}
    own, usual = _last_step(row), _last_step(clean)
    found = {"wrong"} if own["faults"] else set()
    found |= {"waits"} if own["synchronisations"] > usual["synchronisations"] else set()
    kernels = row["parts"]["optimizer"]["kernels"], clean["parts"]["optimizer"]["kernels"]
    return found | ({"kernels"} if kernels[0] > kernels[1] else set())


def test_the_benchmark_counts_a_step_of_gpt2_small() -> None:
    done = start(str(ROOT / "benchmarks" / "fake_gpu.py"), "--json")
    found = json.loads(done.stdout)
    found |= found["optimizer_kernels"]
    for name, limit in BENCHMARK.items():
        assert 0 < found[name] <= limit, name
    # teacher 1.6, student 2.3, output matrices 2.5, Muon 0.8
    assert 7 < found["teraflops"] < 7.5
    assert found["floor_ms"] > 1000 * found["teraflops"] / 989
    assert found["floor_ms"] < found["eager"]["floor_ms"]
