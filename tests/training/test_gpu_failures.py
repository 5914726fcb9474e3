"""Errors of a GPU, its driver and its libraries, by their messages: explained, never an internal error."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.training import TrainOptions
from tinygpt2.errors import ConfigError, DataError, MachineError, machine_failure, out_of_gpu_memory, out_of_memory
from tinygpt2.training.failures import step_explained
from tinygpt2.workflows import budget

ASYNC = "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below ..."
MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB"),
    torch.AcceleratorError("CUDA error: out of memory" + ASYNC),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("NCCL error in: ...: unhandled cuda error. Last error: Cuda failure 'out of memory'"),
    RuntimeError("HIP error: hipErrorOutOfMemory"),
]
OTHERS = [
    (torch.AcceleratorError("CUDA error: device-side assert triggered" + ASYNC), DataError, "refused its input"),
    (torch.AcceleratorError("CUDA error: unspecified launch failure" + ASYNC), MachineError, "unspecified launch"),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        MachineError,
        "cublasGemm",
    ),
    (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), MachineError, "illegal memory"),
]
OPTIONS = TrainOptions(out="o", precision="bf16", logit_chunk=512, micro_batch_size=16)


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[:40])
def test_lack_of_gpu_memory_is_explained_whoever_reports_it(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 8 * 10**9))
    assert out_of_gpu_memory(error)
    with pytest.raises(MachineError) as caught, step_explained(OPTIONS, 1024):
        raise error
    assert caught.value.message == "out of memory in a step of 16 x 1024 tokens: 7.0 GB of the GPU's 8.0 GB were in use"
    assert "--micro-batch-size" in str(caught.value.hint)
    assert "--logit-chunk (now 512)" in str(caught.value.hint)
    assert "--precision bf16" not in str(caught.value.hint)


@pytest.mark.parametrize(
    "text", ["[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory", "std::bad_alloc"]
)
def test_lack_of_main_memory_is_not_the_gpus(text: str) -> None:
    assert out_of_memory(RuntimeError(text))
    assert not out_of_gpu_memory(RuntimeError(text))
    with pytest.raises(MachineError, match="the process held"), step_explained(OPTIONS, 1024):
        raise RuntimeError(text)


def test_a_gpu_that_answers_nothing_more_does_not_hide_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", dead)
    with pytest.raises(MachineError, match="out of memory in a step of 16 x 1024 tokens: the GPU no longer says"):  # noqa: SIM117
        with step_explained(OPTIONS, 1024):
            raise MEMORY[1]


@pytest.mark.parametrize(("error", "kind", "text"), OTHERS, ids=lambda value: str(value)[:30])
def test_a_gpu_that_fails_is_no_bug_of_this_program(error: RuntimeError, kind: type[Exception], text: str) -> None:
    assert not out_of_memory(error)
    with pytest.raises(kind, match=text) as caught, step_explained(OPTIONS, 1024):
        raise error
    assert "asynchronously" not in str(caught.value)
    assert "--resume" in str(caught.value)
    assert isinstance(machine_failure(error), kind)


def test_errors_of_this_program_stay_what_they_are() -> None:
    bug = RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0")
    with pytest.raises(RuntimeError, match="size of tensor"), step_explained(OPTIONS, 1024):
        raise bug
    assert machine_failure(bug) is None
    missing = RuntimeError("some_cuda_kernel does not have a deterministic implementation, but you set ...")
    with pytest.raises(RuntimeError, match="does not have"), step_explained(OPTIONS, 1024):
        raise missing
    strict = OPTIONS.model_copy(update={"deterministic": True})
    with pytest.raises(ConfigError, match="--deterministic: some_cuda_kernel does not"), step_explained(strict, 1024):
        raise missing


def test_a_student_that_does_not_fit_leaves_no_memory_behind(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of the first cut must not keep its step alive while the next one is timed."""
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    real = budget._timed

    def timed(*arguments: object) -> object:
        if kept:
            gc.collect()
            alive.append(kept[0]() is not None)
            return real(*arguments)  # type: ignore[arg-type]
        step = torch.zeros(10)
        kept.append(weakref.ref(step))
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(budget, "_timed", timed)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 8 * 10**9))
    base = {"teacher": str(teacher), "data": str(data), "out": str(tmp_path / "s"), "micro_batch_size": 2}
    found = budget.plan_budget(DistillConfig(**base, plan=True, budget_minutes=0.01))
    assert [one.num_layers for one in found.candidates] == budget.cuts(_shape(teacher))[1:]
    assert not any(alive)


def _shape(teacher: Path) -> object:
    from transformers import GPT2Config

    return GPT2Config.from_pretrained(teacher)


def test_the_command_line_reports_a_gpu_that_fails(
    monkeypatch: pytest.MonkeyPatch, teacher: Path, tmp_path: Path, cli: Callable
) -> None:
    def cut(*_: object) -> None:
        raise OTHERS[1][0]

    monkeypatch.setattr("tinygpt2.truncate_student", cut)
    outcome = cli("truncate-student", "--teacher", teacher, "--num-layers", 1, "--out", tmp_path / "cut")
    assert outcome.code == 6
    assert "unspecified launch failure" in outcome.err
    assert "internal error" not in outcome.err
