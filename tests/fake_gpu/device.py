"""A CUDA GPU of fake tensors: they have a device, a type and a shape, but no numbers, and no work is done.

`start` runs a module in a process whose torch accepts the device type "cuda" (guard.cpp). There, `fake_gpu` makes every
new tensor a fake one, and answers for the parts of torch that ask the driver.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
MEMORY = 80 * 10**9
ON_FAKE_GPU = "TINYGPT2_FAKE_GPU"  # the environment variable of a process that has the fake GPU


def compiled_guard(folder: Path | None = None) -> Path:
    """Compile guard.cpp, once for each version of it and of torch, and return the library.

    Raises:
        FileNotFoundError: there is no g++.
        subprocess.CalledProcessError: it cannot compile the file.
    """
    from importlib.util import find_spec

    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch, source = Path(spec.origin).parent, Path(__file__).with_name("guard.cpp")
    key = source.read_bytes() + (torch / "version.py").read_bytes() + sysconfig.get_platform().encode()
    folder = folder or Path(tempfile.gettempdir()) / f"tinygpt2-fake-gpu-{os.getuid()}"
    library = folder / f"guard-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = library.with_suffix(f".{os.getpid()}")
    command = ["g++", "-shared", "-fPIC", "-std=c++20", "-w", f"-I{torch}/include", str(source), "-o", str(part)]
    subprocess.run([*command, f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"], check=True)
    part.rename(library)
    return library


def start(program: str, *arguments: str, capture: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a Python module or file in a process with the fake GPU, and return what it wrote.

    PYTHONPATH may name the source of another version of the package, which is then tried instead of this one.
    """
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT / "src"), str(ROOT)]
    environment = os.environ | {
        "LD_PRELOAD": str(compiled_guard()),
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        ON_FAKE_GPU: "1",
    }
    program_of = [program] if program.endswith(".py") else ["-m", program]
    command, out = [sys.executable, *program_of, *arguments], subprocess.PIPE if capture else None
    return subprocess.run(command, env=environment, cwd=ROOT, text=True, stdout=out, check=False)


@contextmanager
def fake_gpu(recorder: Any) -> Iterator[Any]:
    """While the block runs, tensors are fake, the GPU is there, and the recorder sees every operation.

    Yields:
        The device.
    """
    import torch
    from torch._subclasses import fake_tensor
    from torch.nn import functional as F  # noqa: N812

    mode = fake_tensor.FakeTensorMode()
    device = torch.device("cuda:0")

    def answers(**values: Any) -> list[Any]:
        return [patch.object(torch.cuda, name, lambda *_, value=value, **__: value) for name, value in values.items()]

    with ExitStack() as stack:
        for one in answers(
            is_available=True, is_initialized=True, is_bf16_supported=True, device_count=1, current_device=0,
            get_device_name="fake GPU", get_device_capability=(9, 0), mem_get_info=(MEMORY, MEMORY),
            memory_reserved=0, memory_allocated=0, max_memory_reserved=0, max_memory_allocated=0, manual_seed=None,
            manual_seed_all=None, empty_cache=None, set_per_process_memory_fraction=None, _lazy_init=None,
            reset_peak_memory_stats=None, get_rng_state=torch.empty(0), set_rng_state=None,
        ):  # fmt: skip
            stack.enter_context(one)
        for one in (
            patch.object(torch.cuda, "synchronize", lambda *_: recorder.waits("torch.cuda.synchronize")),
            patch.object(fake_tensor, "init_gpu_context", lambda *_: None),
            patch.object(fake_tensor.FakeTensorMode, "avoid_device_init", True),
            patch.object(fake_tensor.FakeTensorMode, "__deepcopy__", lambda self, _: self, create=True),
            patch.object(torch.Tensor, "numpy", _numbers(torch.Tensor.numpy)),
            patch.object(fake_tensor.FakeTensor, "tolist", _list(recorder)),
            patch.object(torch.nn.Module, "to", _moved(torch.nn.Module.to)),
            patch.object(torch.nn.Module, "cpu", lambda self: self.to("cpu")),
            patch.object(F, "scaled_dot_product_attention", _attention(F.scaled_dot_product_attention)),
            # fake tensors belong to one thread: what another one would do is done at once
            patch.object(ThreadPoolExecutor, "submit", _at_once),
            mode, recorder,
        ):  # fmt: skip
            stack.enter_context(one)
        yield device


def _numbers(original: Any) -> Any:
    """A fake tensor has no numbers: NumPy gets zeros."""

    def numpy(self: Any, **options: Any) -> Any:
        import numpy as np
        from torch._subclasses.fake_tensor import FakeTensor

        if not isinstance(self, FakeTensor):
            return original(self, **options)
        assert self.device.type == "cpu", "a tensor on the GPU has no NumPy array"
        return np.zeros(tuple(self.shape), str(self.dtype).removeprefix("torch."))

    return numpy


def _list(recorder: Any) -> Any:
    """Torch would ask a fake tensor for one number after another; a GPU's numbers come in one copy."""

    def tolist(self: Any) -> Any:
        import numpy as np

        if self.device.type == "cuda":
            recorder.waits("tolist")
        value = 0.0 if self.is_floating_point() else recorder.integer
        return np.full(tuple(self.shape), value).tolist()

    return tolist


def _moved(original: Any) -> Any:
    """`Module.to`, which torch cannot do in place with fake parameters: they are replaced, and tied ones stay tied."""

    def to(self: Any, *arguments: Any, **options: Any) -> Any:
        import torch
        from torch import nn

        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **options)
        moved: dict[Any, Any] = {}
        for module in self.modules():
            for name, one in module._parameters.items():
                if one is not None and one not in moved:
                    kind = dtype if dtype is not None and one.is_floating_point() else one.dtype
                    value = one.detach().to(device or one.device, kind)
                    same = value.device == one.device and value.dtype == one.dtype
                    moved[one] = one if same else nn.Parameter(value, one.requires_grad)
                module._parameters[name] = None if one is None else moved[one]
        return self

    return to


def _attention(original: Any) -> Any:
    """Torch's choice of a kernel on a recent card (ATen/native/transformers/cuda/sdp_utils.cpp).

    FlashAttention takes 16 bits and pads the heads itself. The memory-efficient kernel takes float32 whose heads are a
    multiple of 4 numbers. What is left falls to plain operations with T x T matrices.
    """

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, **_: Any,
    ) -> Any:  # fmt: skip
        import torch

        aten = torch.ops.aten
        if query.device.type != "cuda" or attn_mask is not None:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        if query.dtype != torch.float32 and query.shape[-1] <= 256:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if query.shape[-1] % 4 == 0:
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, None, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
            )[0]
        return original(query, key, value, None, dropout_p, is_causal, scale=scale)

    return attention


def _at_once(_: Any, function: Any, *arguments: Any, **options: Any) -> Future[Any]:
    done: Future[Any] = Future()
    try:
        done.set_result(function(*arguments, **options))
    except Exception as error:
        done.set_exception(error)
    return done
