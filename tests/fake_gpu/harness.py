"""Take whole training steps on fake tensors of device type "cuda", and watch what a GPU would have to do.

Fake tensors have shapes, types and devices, but no numbers: values, speed and the choice of kernels cannot be seen.
`compile_device` makes a library that the process must load before torch: see `command`.
"""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tinygpt2.config.training import TrainOptions
from tinygpt2.data.dataset import Blocks
from tinygpt2.models.lm_head import operand_rows
from tinygpt2.models.loading import random_model
from tinygpt2.models.parameters import set_dropout
from tinygpt2.objectives import logits
from tinygpt2.objectives.combined import LossWeights
from tinygpt2.runtime.devices import DTYPES
from tinygpt2.training.failures import may_step
from tinygpt2.training.loop import _agree
from tinygpt2.training.optimizers import clip_gradients, make_optimizer
from tinygpt2.training.state import RunState
from tinygpt2.training.step import Step, evaluate, gradients

GPU = torch.device("cuda:0")
SOURCE = Path(__file__).with_name("device.cpp")


def compile_device(folder: Path) -> Path:
    """Compile the library that makes the device type known, and return its path; it takes a few seconds."""
    from torch.utils.cpp_extension import include_paths, library_paths

    library = folder / "device.so"
    how = ["-std=c++20", "-shared", "-fPIC", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    places = [f"-I{path}" for path in include_paths()]
    places += [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command = ["g++", *how, str(SOURCE), *places, "-lc10", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a process that knows the device."""
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@dataclass
class Seen:
    """What a GPU would have done.

    Attributes:
        waits: places where the host waits for the GPU, with their numbers.
        kernels: operations that compute something, by name.
        wide: places with float64 numbers on the GPU.
        logit_bytes: bytes that element-wise work on logits reads and writes.
        bytes, operations: of all kernels: what they read and write, and the floating-point operations of products.
        floor: seconds that they take at least, each by an H100's peak rate or its bandwidth, whichever is slower.
    """

    waits: collections.Counter[str] = field(default_factory=collections.Counter)
    kernels: collections.Counter[str] = field(default_factory=collections.Counter)
    wide: collections.Counter[str] = field(default_factory=collections.Counter)
    logit_bytes: int = 0
    bytes: int = 0
    operations: int = 0
    floor: float = 0.0

    def add(self, moved: int, operations: int = 0, width: int = 4) -> None:
        """Count a kernel that moves bytes, and computes with numbers of `width` bytes."""
        self.bytes, self.operations = self.bytes + moved, self.operations + operations
        self.floor += max(moved / BANDWIDTH, operations / PEAK[width])


_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_NO_WORK = ("prim::", "empty", "new_empty", "_pin_memory", "detach", "_local_scalar_dense")
# an H100's data sheet (SXM): operations per second in 16 bits and in float32, and bytes per second
PEAK = {2: 989e12, 4: 67e12, 8: 67e12}
BANDWIDTH = 3.35e12


class Watch(TorchDispatchMode):
    """Counts the operations below it.

    Args:
        columns: of a matrix of logits: element-wise work on matrices of these widths is that of the losses.
    """

    def __init__(self, columns: Collection[int] = ()) -> None:
        super().__init__()
        self.seen, self._columns = Seen(), columns

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it does."""
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(x.device.type == "cuda" for x in tensors)
        if name == "_pin_memory":  # nothing can be pinned here
            return args[0].clone()
        if name == "_local_scalar_dense":
            if on_gpu:
                self._note(self.seen.waits, "item")
            return 1.0 if args[0].dtype.is_floating_point else 1
        if name == "nonzero":
            self._note(self.seen.waits, "nonzero")
            return torch.zeros(args[0].numel(), args[0].ndim, dtype=torch.int64, device=args[0].device)
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self._note(self.seen.waits, "boolean index")
            args = (args[0], [self._numbers(x) for x in args[1]])
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        moved = {x.device.type for x in tensors + made} >= {"cpu", "cuda"} and "copy" in name
        if moved and not kwargs.get("non_blocking") and not (name == "copy_" and len(args) > 2 and args[2]):
            self._note(self.seen.waits, "copy")
        if not func.is_view and not name.startswith(_NO_WORK) and (on_gpu or any(x.is_cuda for x in made)):
            self._count(name, tensors, made)
        return out

    def _numbers(self, index: Tensor | None) -> Tensor | None:
        if index is None or index.dtype != torch.bool:
            return index
        return torch.zeros(index.numel(), dtype=torch.int64, device=index.device)

    def _count(self, name: str, tensors: list[Tensor], made: list[Tensor]) -> None:
        seen, device = self.seen, [x for x in tensors + made if x.is_cuda]
        seen.kernels[name] += 1
        if any(x.dtype == torch.float64 for x in device):
            self._note(seen.wide, "float64")
        moved, operations = sum(x.numel() * x.element_size() for x in device), 0
        if name in _PRODUCTS:
            left, right = [x for x in tensors if x.ndim >= 2][-2:]
            operations = 2 * left.numel() * right.shape[-1]
        elif "scaled_dot_product" in name:  # two products of half a matrix of scores; five in the backward pass
            query = next(x for x in tensors if x.ndim == 4)
            operations = 2 * query.numel() * query.shape[-2] * (5 if "backward" in name else 2) // 2
        elif any(x.ndim and x.shape[-1] in self._columns for x in device):
            seen.logit_bytes += moved
        seen.add(moved, operations, min(x.element_size() for x in device if x.is_floating_point()) if operations else 4)

    def _note(self, counter: collections.Counter[str], what: str) -> None:
        """Count a thing at the line of this program, or of a loss scaler, that does it."""
        frames = [one for one in reversed(traceback.extract_stack()) if "/tests/fake_gpu/" not in one.filename]
        known = [one for one in frames if "/tinygpt2/" in one.filename or "grad_scaler" in one.filename]
        place = (known or frames)[0]
        counter[f"{what} at {Path(place.filename).name}:{place.lineno}"] += 1


@contextmanager
def compiled_losses(seen: Seen) -> Iterator[None]:
    """Count the losses as the one compiled pass that a GPU runs: both logits are read twice, the gradient written once."""
    eager = logits._differentiate

    def counted(student: Tensor, soft: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        matrices = [student] + ([] if soft is None else [soft])
        moved = sum(2 * x.numel() * x.element_size() for x in matrices) + student.numel() * student.element_size()
        seen.logit_bytes += moved
        seen.add(moved)
        seen.kernels["compiled losses"] += 1
        return student.new_zeros(2, dtype=torch.float32), student

    logits._differentiate = counted
    try:
        yield
    finally:
        logits._differentiate = eager


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Call the kernel that torch would choose on a GPU of today; fake tensors alone would take the one for no GPU."""
    ops, width = torch.ops.aten, query.shape[-1]
    if query.dtype == torch.float32:
        assert width % 4 == 0, f"heads of {width} need T x T matrices"
        return ops._scaled_dot_product_efficient_attention(
            query, key, value, None, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]
    assert width % 8 == 0, f"heads of {width} need T x T matrices"
    return ops._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def on_gpu() -> Iterator[None]:
    """Make all tensors fake while the block runs, and attend as on a GPU."""
    with FakeTensorMode(), patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention):
        yield


class Part:
    """Blocks of zeros, of which the last tokens may be padding."""

    def __init__(self, count: int, length: int, padding: int) -> None:
        self._count, self._length, self._padding = count, length, padding
        self.padded = bool(padding)

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return tokens and mask of some blocks."""
        mask = np.zeros((stop - start, self._length), np.int64)
        mask[:, self._length - self._padding :] = 1
        return np.zeros_like(mask), mask if self.padded else None

    def lengths(self) -> np.ndarray:
        """Return the number of real tokens in every block."""
        return np.full(self._count, self._length - self._padding, np.int32)


class FakeAccelerator:
    """What the loop uses of Accelerate, for one process on the device."""

    device, process_index, num_processes, is_main_process = GPU, 0, 1, True
    distributed_type = DistributedType.NO

    def __init__(self, precision: str) -> None:
        self._dtype = None if precision == "fp32" else DTYPES[precision]
        self.optimizer: Any = None
        self.scaler = None
        if precision == "fp16":
            torch.cuda.amp.common.amp_definitely_not_available = lambda: False
            self.scaler = torch.amp.GradScaler("cuda")

    def autocast(self) -> Any:
        """Return the context of a forward pass."""
        return nullcontext() if self._dtype is None else _autocast(self._dtype)

    def accumulate(self, _module: Any) -> Any:
        """Return the context of a micro-batch."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def unscale_gradients(self) -> None:
        """Undo the loss scale."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)

    def reduce(self, tensor: Tensor, _how: str) -> Tensor:
        """Return the tensor, as there is one process."""
        return tensor


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    # torch.autocast turns itself off where torch.cuda.is_available() is false
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


@dataclass(frozen=True)
class Case:
    """One way to train."""

    weights: LossWeights
    precision: str
    optimizer: str
    padded: bool = False
    accumulation: int = 1
    student: tuple[int, int, int] = (6, 48, 4)  # layers, width, heads
    teacher: tuple[int, int, int] = (12, 64, 4)
    vocabulary: int = 509
    length: int = 160
    size: int = 2
    dropout: float = 0.0


@dataclass
class Taken:
    """What one case did: the gradients of a step, its optimizer step, the rest of it, and an evaluation."""

    gradients: Seen
    decision: Seen
    optimizer: Seen
    evaluation: Seen

    @property
    def waits(self) -> collections.Counter[str]:
        """Where the host waits for the GPU during a step."""
        return self.gradients.waits + self.decision.waits + self.optimizer.waits


def model(shape: tuple[int, int, int], case: Case) -> GPT2LMHeadModel:
    """Return a fake model on the device."""
    layers, width, heads = shape
    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": case.length}
    with torch.device(GPU):
        return random_model(GPT2Config(**sizes, vocab_size=case.vocabulary, bos_token_id=None, eos_token_id=None), 0)


def take_step(case: Case, *, compiled: bool = False) -> Taken:
    """Take two optimizer steps and an evaluation; return what the second step, which has optimizer state, did.

    Args:
        compiled: count the losses as a compiled pass instead of running them eagerly.

    Raises:
        Whatever torch raises, for example where tensors of two devices meet.
    """
    with on_gpu():
        accelerator: Any = FakeAccelerator(case.precision)
        options = TrainOptions(out="o", optimizer=case.optimizer, learning_rate=1e-3, dropout=case.dropout)
        student = model(case.student, case)
        set_dropout(student, options.dropout)
        teacher = None
        if any(value for name, value in vars(case.weights).items() if name in _TAUGHT):
            teacher = model(case.teacher, case).eval().requires_grad_(False)
            if case.precision != "fp32":
                _cast(teacher, DTYPES[case.precision])
        with torch.device(GPU):
            step = Step(student, teacher, case.weights, options).train()
        step.register_forward_hook(_check_loss)
        optimizer = accelerator.optimizer = make_optimizer(step, options)
        blocks = Blocks([Part(64, case.length, 7 * case.padded)], case.length)
        indices = list(range(case.size * case.accumulation))
        columns = () if compiled else (case.vocabulary, operand_rows(case.vocabulary, "cuda"))
        for _ in range(2):
            taken = [Watch(columns), Watch(), Watch()]
            with taken[0] as watch, compiled_losses(watch.seen) if compiled else nullcontext():
                parts = gradients(accelerator, step, blocks, indices, case.size)
            _check_types(step, parts)
            with taken[1]:
                norm = clip_gradients(accelerator, optimizer, list(step.parameters()), 0.5)
                terms, norm, *_ = _agree(accelerator, parts, norm, False, False, 5)
                may_step(accelerator, RunState(8, "x"), terms, norm, [0], options)
            with taken[2]:
                optimizer.step()
            if accelerator.scaler is not None:
                accelerator.scaler.update()
            for parameter in step.parameters():
                parameter.grad = None
        for state in optimizer.state.values():
            assert all(x.device == GPU and x.dtype == torch.float32 for x in state.values() if x.ndim)
        with Watch() as watch:
            evaluate(accelerator, step, Blocks([Part(2, case.length, 7 * case.padded)], case.length), 2)
        return Taken(*(one.seen for one in taken), watch.seen)


def _cast(teacher: GPT2LMHeadModel, dtype: torch.dtype) -> None:
    """Do what `cast_linear_layers` does; nn.Module.to fails on fake parameters."""
    for module in teacher.transformer.h.modules():
        if isinstance(module, Conv1D):
            for name, parameter in list(module.named_parameters()):
                setattr(module, name, torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


_TAUGHT = {"attention", "hidden", "prediction", "cosine", "relation"}


def _check_loss(step: Any, _inputs: Any, outputs: tuple[Tensor, Any]) -> None:
    assert (outputs[0].device, outputs[0].dtype) == (GPU, torch.float32), "the loss"


def _check_types(step: Step, parts: dict[str, Tensor]) -> None:
    for name, value in parts.items():
        assert (value.device, value.dtype) == (GPU, torch.float32), name
    for name, parameter in step.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad.device, parameter.grad.dtype) == (GPU, torch.float32), name
