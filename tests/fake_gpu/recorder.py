"""Counts what the operations of a GPU do: waits of the host, kernels, bytes, floating-point operations, wrong types."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

PAGEABLE = 64 * 1024  # bytes: smaller copies from memory that can be paged are staged, so the host goes on
SIXTEEN = (torch.float16, torch.bfloat16)
HOST = ("prim.", "aten.empty", "aten.new_empty", "aten.detach", "aten.alias", "aten.lift", "aten.is_pinned")
SOFTMAX = ("softmax", "logsumexp")
FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}  # the place of the first one


class Work(NamedTuple):
    """What one kernel does.

    Attributes:
        name: of the operation.
        bytes: that it reads and writes.
        operations: floating-point operations, of matrix products and attention only.
        kind: the type of their factors.
    """

    name: str
    bytes: int
    operations: int
    kind: str


@dataclass
class Counts:
    """What was counted in one part of a run.

    Attributes:
        waits: why and where the host waited for the GPU, and how often.
        kernels: operations that start work on the GPU, and how often.
        logit_bytes: bytes that element-wise work on logits moves. Each operation of an eager pass reads its inputs and
            writes its outputs; a compiled pass over a chunk reads each logit matrix twice and writes the gradient once.
        work: what each kernel does, in order.
        faults: tensors on the wrong device or of the wrong type.
        float64: whether the part may use float64, which a GPU computes slowly.
    """

    waits: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    logit_bytes: int = 0
    work: list[Work] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    float64: bool = True

    def add(self, other: Counts) -> None:
        """Add what was counted in another part."""
        for name in ("waits", "kernels", "faults"):
            getattr(self, name).update(getattr(other, name))
        self.logit_bytes += other.logit_bytes
        self.work += other.work

    @property
    def synchronisations(self) -> int:
        """How often the host waited for the GPU."""
        return self.waits.total()


class Recorder(TorchDispatchMode):
    """Counts every operation on fake tensors. It stands above FakeTensorMode, which works out devices and shapes.

    Args:
        vocabulary: a tensor whose last axis has this length, or the next multiple of 64, holds logits.
        length: T; no operation may return a T x T matrix for several heads.

    Attributes:
        parts: what was counted, by the name of the part of the run.
        now: the part that is counted now.
        integer: what the host reads if it asks the GPU for a whole number; other numbers are 0.
    """

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.integer = length
        self._columns, self._length = {vocabulary, -(-vocabulary // 64) * 64}, length
        self.parts: dict[str, Counts] = {}
        self.now, self._compiled = Counts(), False
        self._pinned, self._sums = WeakIdKeyDictionary(), WeakIdKeyDictionary()

    def begin(self, name: str, *, float64: bool = True) -> None:
        """Count from now on for this part of the run. What was counted under the same name is forgotten."""
        self.now = self.parts[name] = Counts(float64=float64)

    @contextmanager
    def apart(self, name: str) -> Iterator[Counts]:
        """While the block runs, count for another part of the run, which may have begun before."""
        before, self.now = self.now, self.parts.setdefault(name, Counts(float64=name != "optimizer"))
        try:
            yield self.now
        finally:
            self.now = before

    def compiled(self, function: Any) -> Any:
        """Return a function of logits whose work counts as one compiled pass."""

        def call(*arguments: Any) -> Any:
            assert not self._compiled
            self._compiled = True
            try:
                values, gradient = function(*arguments)
            finally:
                self._compiled = False
            read = sum(_size(one) for one in arguments if isinstance(one, Tensor) and self._logits(one))
            moved = 2 * read + _size(gradient)
            self.now.kernels["compiled pass"] += 1
            self.now.logit_bytes += moved
            self.now.work.append(Work("compiled pass", moved, 0, ""))
            return values, gradient

        return call

    def waits(self, why: str) -> None:
        """Count that the host waits for the GPU."""
        self.now.waits[f"{why} in {_place()}"] += 1

    def wrong(self, what: str) -> None:
        """Count a tensor on the wrong device or of the wrong type."""
        self.now.faults[f"{what} in {_place()}"] += 1

    def check(self, name: str, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        """Count a fault if a tensor is not on the GPU or has another type."""
        if tensor is not None and (tensor.device.type, tensor.dtype) != ("cuda", dtype):
            self.wrong(f"{name} is {tensor.dtype} on {tensor.device.type}")

    def _logits(self, tensor: Tensor) -> bool:
        return tensor.ndim >= 2 and tensor.shape[-1] in self._columns

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), str(func)
        if name.startswith("prim."):
            return func(*args, **kwargs)
        answered, value = self._answer(name, func, args, kwargs)
        if answered:
            return value
        if name in ("aten.index.Tensor", "aten.index_put_.default", "aten._unsafe_index.Tensor"):
            args = (args[0], [part for one in args[1] for part in self._numbers(one)], *args[2:])
        ins = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        out = func(*args, **kwargs)
        outs = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        if name == "aten.lift_fresh.default" and not ins[0].is_floating_point():
            with _disable_current_modes():
                self._sums[out] = int(ins[0].sum())  # of numbers that the host gives: some shapes follow from it
        self._copies(name, ins, outs, args, kwargs)
        on_gpu = [one for one in [*ins, *outs] if one.device.type == "cuda"]
        if on_gpu and not func.is_view and not name.startswith(HOST):
            self._count(func, name, args, kwargs, ins, out, outs)
        return out

    def _answer(self, name: str, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
        """Return whether an operation asks for numbers or memory that fake tensors lack, and an answer."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "aten._local_scalar_dense.default":
            if args[0].device.type == "cuda":
                self.waits("item")
            kind = args[0].dtype
            return True, 0.0 if kind.is_floating_point else False if kind == torch.bool else self.integer
        if name in ("aten.nonzero.default", "aten.masked_select.default"):
            self.waits(name.split(".")[1]) if args[0].device.type == "cuda" else None
            shape = (args[0].numel(), args[0].ndim) if "nonzero" in name else (args[0].numel(),)
            kind = torch.int64 if "nonzero" in name else args[0].dtype
            return True, torch.zeros(shape, dtype=kind, device=args[0].device)
        if name == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is None:
            self.waits("repeat_interleave") if args[0].device.type == "cuda" else None
            length = self._sums.get(args[0], args[0].numel())
            return True, torch.zeros(length, dtype=torch.int64, device=args[0].device)
        if name == "aten._pin_memory.default":
            pinned = torch.empty_like(args[0])
            self._pinned[pinned] = True
            return True, pinned
        if name == "aten.is_pinned.default":
            return True, first in self._pinned
        if kwargs.pop("pin_memory", None):
            memory = func(*args, **kwargs)
            self._pinned[memory] = True
            return True, memory
        return False, None

    def _numbers(self, index: Tensor | None) -> list[Tensor | None]:
        """Return an index without masks: to count the places that a mask marks, the host waits."""
        if index is None or index.dtype != torch.bool:
            return [index]
        if index.device.type == "cuda":
            self.waits("index by a mask")
        return [torch.zeros(index.numel(), dtype=torch.int64, device=index.device) for _ in range(index.ndim)]

    def _copies(self, name: str, ins: list[Tensor], outs: list[Tensor], args: Any, kwargs: Any) -> None:
        if name not in ("aten._to_copy.default", "aten.copy_.default") or not outs:
            return
        source, target = (args[1], args[0]) if name == "aten.copy_.default" else (args[0], outs[0])
        kinds = source.device.type, target.device.type
        if kinds[0] == kinds[1]:
            return
        unblocked = bool(kwargs.get("non_blocking") or (name == "aten.copy_.default" and args[2:] and args[2]))
        pageable = kinds[0] == "cpu" and source not in self._pinned and _size(source) > PAGEABLE
        if not unblocked or pageable:
            self.waits(f"copy {kinds[0]} to {kinds[1]}")

    def _count(
        self, func: Any, name: str, args: Any, kwargs: Any, ins: list[Tensor], out: Any, outs: list[Tensor]
    ) -> None:
        now = self.now
        apart = [one for one in ins if one.device.type == "cpu" and one.ndim]
        if apart and "copy" not in name:
            self.wrong(f"operands of {name} on CPU and GPU")
        for one in outs:
            if one.dtype == torch.float64 and not now.float64 and "grad_scaler" not in _place():
                self.wrong(f"float64 of {name}")
            if any(part in name for part in SOFTMAX) and one.dtype in SIXTEEN and self._logits(one):
                self.wrong(f"{name} of logits in 16 bits")
            if one.ndim >= 3 and one.shape[-2:] == (self._length, self._length):
                self.wrong(f"T x T matrices of {name}")
        if self._compiled:
            return
        now.kernels[name] += 1
        read = ins[1:] if name == "aten.copy_.default" or name.startswith(("aten.zero_", "aten.fill_")) else ins
        written = outs
        if not outs:  # lists of tensors are changed in place; fused AdamW changes its moments, too
            written = tree_leaves([args[0], *(args[2:4] if "fused" in name else [])])
        moved = sum(_size(one) for one in [*read, *written] if one.device.type == "cuda")
        operations, kind = _operations(func, name, args, kwargs, out)
        now.work.append(Work(name, moved, operations, kind))
        if not operations and any(self._logits(one) for one in [*ins, *outs]):
            now.logit_bytes += moved


def _operations(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> tuple[int, str]:
    """Return the floating-point operations of a matrix product or of causal attention, and the type of its factors."""
    short = name.split(".")[1]
    if short in FACTORS:
        left, right = args[FACTORS[short] :][:2]
        return 2 * left.numel() * int(right.shape[-1]), str(left.dtype).removeprefix("torch.")
    if "_attention" in short:  # half of the pairs are masked
        count = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return int(count) // 2, str(args[0].dtype).removeprefix("torch.")
    return 0, ""


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _place() -> str:
    """Return the file and line in the package, in torch's loss scaler or among the planted faults, that runs now."""
    stack = traceback.extract_stack()
    for frame in reversed(stack):
        if any(part in frame.filename for part in ("/tinygpt2/", "grad_scaler.py", "/fake_gpu/faults.py")):
            return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
    return "?"
