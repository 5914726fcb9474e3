"""What is done for speed on a CPU changes no result and leaves no trace."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from tinygpt2.runtime.cpu import fast_products, usable_cores


def test_fast_products_are_float32_products() -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 700, generator=generator), torch.randn(700, 500, generator=generator)
    exact = a.double() @ b.double()
    plain = (a @ b - exact).norm()
    with fast_products():
        fast = (a @ b - exact).norm()
        batched = torch.bmm(a[None], b[None])[0]
        with_bias = torch.addmm(torch.ones(500), a, b)
    assert float(fast) < 3 * float(plain)
    torch.testing.assert_close(batched, exact.float(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(with_bias, (exact + 1).float(), rtol=1e-5, atol=1e-3)
    assert setting.fp32_precision == before


def test_fast_products_are_given_up_where_they_round(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, seen = torch.backends.mkldnn.matmul, []
    before = setting.fp32_precision
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    with fast_products():
        seen.append(setting.fp32_precision)
    assert seen == [before]


def test_kept_memory_is_used_again() -> None:
    code = """
import resource, tinygpt2.runtime.cpu
tinygpt2.runtime.cpu.keep_memory()
import torch
def turn():
    large, small = torch.ones(20_000_000), torch.ones(5_000_000)
    del large, small
[turn() for _ in range(10)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
[turn() for _ in range(10)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    # 100 MB are 24,400 pages of 4 KiB; now and then a hole in the heap is too small by its alignment
    assert faults < 5 * 24_400 or platform.libc_ver()[0] != "glibc"


def test_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64
