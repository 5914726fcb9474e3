"""`--auto-batch-size` on a GPU: which sizes are tried, what is caught, what is left behind. The GPU is pretended."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.training.test_checkpoint import options
from tinygpt2 import DistillConfig
from tinygpt2.errors import ConfigError
from tinygpt2.planning.batch_size import _try, fit_batch, largest_fitting
from tinygpt2.training.job import Job, prepared_job
from tinygpt2.training.step import Step
from tinygpt2.workflows.train import _cache

FULL = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize("whole", [1, 7, 8, 96, 512])
def test_the_largest_divisor_is_found_by_doubling(whole: int) -> None:
    sizes = [size for size in range(1, whole + 1) if whole % size == 0]
    for limit in range(whole + 2):
        tried: list[int] = []

        def fits(size: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= limit

        assert largest_fitting(sizes, fits) == max((size for size in sizes if size <= limit), default=0)
        assert tried[0] == 1
        assert len(tried) == len(set(tried)) <= 2 * len(sizes).bit_length() + whole.bit_length()
        # no trial is more than twice as large as the one before, unless there is no size between
        for before, after in itertools.pairwise(tried):
            assert after <= max(2 * before, next((size for size in sizes if size > before), before))


@pytest.mark.parametrize("kind", ["states", "samples", "top"])
def test_a_trial_reads_what_a_step_reads(teacher: Path, data: Path, tmp_path: Path, kind: str) -> None:
    config = DistillConfig(
        teacher=str(teacher), student=str(teacher), data=str(data), out=str(tmp_path / "o"), max_steps=1,
        teacher_cache=str(tmp_path / "cache"), teacher_cache_kind=kind,
    )  # fmt: skip
    with prepared_job(config) as (job, accelerator):
        module = Step(job.model, job.teacher, job.weights, config, _cache(job))
        _try(job, accelerator, module, 2)
        assert all(one.grad is not None for one in module.student.parameters())


class Card:
    """Counts what fit_batch asks of torch.cuda."""

    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.emptied: list[bool] = []  # whether the graph of the last trial was gone when memory was given back
        self.graph: weakref.ref[torch.Tensor] | None = None


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """A GPU with 8 GB, of which another program holds 2, as far as `torch.cuda` is asked."""
    found = Card()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (5 * 10**9, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 10**9)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, device: found.fractions.append(part)
    )
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: found.emptied.append(found.graph is None or found.graph() is None)
    )
    return found


class Pretended:
    """An accelerator whose device is called cuda, though it computes on the CPU."""

    def __init__(self, real: Accelerator, processes: int = 1) -> None:
        self._real, self.num_processes = real, processes
        self.gradient_accumulation_steps = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    @property
    def device(self) -> object:
        return _Cuda("cpu")

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def _raise(kind: type[RuntimeError], message: str) -> None:
    raise kind(message)  # a new error: an old one would keep the trial in its traceback


class _Cuda(str):
    type = "cuda"


def fitted(
    config: object, card: Card, monkeypatch: pytest.MonkeyPatch, limit: int, error: RuntimeError, processes: int = 1
) -> tuple[Job, list[int], list[int]]:
    """Run fit_batch where micro-batches above the limit raise an error in the backward pass; return what was tried."""
    tried: list[int] = []
    room: list[int] = []
    real_empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda one, **more: (room.append(one.numel()), real_empty(one, **more))[1])
    with prepared_job(config) as (job, accelerator):  # type: ignore[arg-type]
        module = Step(job.model, None, job.weights, job.config)
        real = Step.forward

        def forward(self: Step, input_ids: torch.Tensor, **rest: object) -> object:
            tried.append(len(input_ids))
            loss, terms = real(self, input_ids, **rest)  # type: ignore[arg-type]
            card.graph = weakref.ref(loss)
            if len(input_ids) > limit:
                loss.register_hook(lambda _: _raise(type(error), str(error)))
            return loss, terms

        monkeypatch.setattr(Step, "forward", forward)
        monkeypatch.setattr(Step, "to", lambda self, device: self)
        fit_batch(job, Pretended(accelerator, processes), module)  # type: ignore[arg-type]
        assert all(parameter.grad is None for parameter in module.parameters())
        return job, tried, room


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError(FULL)], ids=["torch", "cublas"]
)
def test_trials_go_up_and_leave_nothing_behind(
    error: RuntimeError, card: Card, teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(teacher, data, tmp_path / "m", micro_batch_size=4, gradient_accumulation_steps=6)
    job, tried, room = fitted(config, card, monkeypatch, 6, error)
    assert (job.config.micro_batch_size, job.config.gradient_accumulation_steps) == (6, 4)
    assert tried == [1, 1, 2, 2, 4, 4, 8, 6, 6]  # every size that fits runs twice
    assert card.fractions == [pytest.approx(0.9 * 6 / 8), 1.0]
    assert card.emptied == [True] * 5
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    assert sum(room) >= 2 * parameters * 5


def test_room_is_left_for_the_buckets_of_several_processes(
    card: Card, teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(teacher, data, tmp_path / "m", micro_batch_size=1)
    counts = []
    for processes in (1, 2):
        with monkeypatch.context() as patch:
            _, _, room = fitted(config, card, patch, 1, RuntimeError(FULL), processes)
            counts.append(sum(room))
    parameters = sum(parameter.numel() for parameter in _model(teacher))
    assert counts[1] - counts[0] == parameters


def _model(teacher: Path) -> list[torch.nn.Parameter]:
    from tinygpt2.models.loading import load_model

    return list(load_model(str(teacher))[0].parameters())


def test_other_errors_are_not_taken_for_lack_of_memory(
    card: Card, teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(teacher, data, tmp_path / "m", micro_batch_size=4)
    with pytest.raises(RuntimeError, match="device-side assert"):
        fitted(config, card, monkeypatch, 1, RuntimeError("CUDA error: device-side assert triggered"))
    assert card.fractions[-1] == 1.0
    with pytest.raises(ConfigError, match="not even one block"):
        fitted(config, card, monkeypatch, 0, RuntimeError(FULL))


def test_what_the_trials_compiled_is_forgotten(
    card: Card, teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable
) -> None:
    """So that the run is compiled for its one size, and not for the sizes of all trials."""
    forgotten: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(1))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for compiled in (False, True):
        config = options(teacher, data, tmp_path / "m", micro_batch_size=2, compile=compiled)
        with monkeypatch.context() as patch:
            fitted(config, card, patch, 2, RuntimeError(FULL))
        assert len(forgotten) == compiled
