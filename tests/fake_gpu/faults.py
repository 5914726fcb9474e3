"""Faults that only a GPU shows, to be planted in the package: the harness must find each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.fake_gpu.cases import Bench, Case
from tinygpt2.objectives import logits
from tinygpt2.training import loop

Planted = Callable[[Bench], AbstractContextManager[None]]

CASE = Case("default", "bf16", "muon")


def _before(change: Callable[[Tensor], Tensor]) -> Planted:
    """Change the tokens of a micro-batch."""

    def change_tokens(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if arguments:  # in an evaluation
            return (change(arguments[0]), *arguments[1:]), named
        return arguments, {**named, "input_ids": change(named["input_ids"])}

    return _hooked(lambda one: one.step.register_forward_pre_hook(change_tokens, with_kwargs=True))


def _after(change: Callable[[Tensor], Tensor]) -> Planted:
    """Change the loss."""
    return _hooked(
        lambda one: one.step.register_forward_hook(
            lambda module, _, output: (change(output[0]), output[1]) if module.training else None
        )
    )


def _hooked(register: Callable[[Bench], Any]) -> Planted:
    @contextmanager
    def planted(one: Bench) -> Iterator[None]:
        handle = register(one)
        yield
        handle.remove()

    return planted


def _item(loss: Tensor) -> Tensor:
    return loss + 0 * loss.item()


def _mask(tokens: Tensor) -> Tensor:
    return tokens[tokens >= 0].view(tokens.shape)


def _nonzero(tokens: Tensor) -> Tensor:
    return tokens + 0 * (tokens >= 0).nonzero().sum()


def _list_to_gpu(tokens: Tensor) -> Tensor:
    return tokens + torch.tensor([0] * tokens.shape[1], device=tokens.device)


def _to_host_and_back(loss: Tensor) -> Tensor:
    return loss + 0 * loss.detach().cpu().to(loss.device, non_blocking=True)


def _waiting(loss: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return loss


def _in_float64(_: Any, __: Any, states: Tensor) -> Tensor:
    return states.double().float()


def _on_the_host(_: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
    (positions,) = arguments
    return (torch.arange(positions.shape[-1], device="cpu"),)


@contextmanager
def _softmax_in_16_bits(_: Bench) -> Iterator[None]:
    with patch.object(logits, "wide", lambda x: x.dtype):
        yield


@contextmanager
def _gradients_on_the_host(one: Bench) -> Iterator[None]:
    compute = loop.gradients

    def moved(*arguments: Any) -> Any:
        parts = compute(*arguments)
        for parameter in one.step.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to("cpu", non_blocking=True)
        return parts

    with patch.object(loop, "gradients", moved):
        yield


@contextmanager
def _changed_state(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    make = loop.make_optimizer

    def changing(*arguments: Any) -> Any:
        optimizer = make(*arguments)
        own = optimizer.step

        def step(*arguments: Any) -> Any:
            found = own(*arguments)
            for row in optimizer.state.values():
                row |= {name: change(value) for name, value in row.items() if isinstance(value, Tensor) and value.ndim}
            return found

        optimizer.step = step
        return optimizer

    with patch.object(loop, "make_optimizer", changing):
        yield


@contextmanager
def _one_by_one(_: Bench) -> Iterator[None]:
    make = loop.make_optimizer

    def slow(*arguments: Any) -> Any:
        optimizer = make(*arguments)
        own = optimizer.step

        def step(*arguments: Any) -> Any:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        for _ in range(20):
                            parameter.grad.mul_(1.0)
            return own(*arguments)

        optimizer.step = step
        return optimizer

    with patch.object(loop, "make_optimizer", slow):
        yield


@contextmanager
def _whole_attention(_: Bench) -> Iterator[None]:
    from torch.nn import functional as F  # noqa: N812

    def plain(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return (query @ key.mT).softmax(-1) @ value

    with patch.object(F, "scaled_dot_product_attention", plain):
        yield


# each with what shows it: a wait, more kernels, or a tensor that is wrong, at which torch may raise an error, too
FAULTS: dict[str, tuple[str, Planted]] = {
    "position ids on the CPU": ("wrong", _hooked(
        lambda one: one.step.student.transformer.wpe.register_forward_pre_hook(_on_the_host))),
    ".item() of the loss": ("waits", _after(_item)),
    "tokens chosen by a mask": ("waits", _before(_mask)),
    "nonzero": ("waits", _before(_nonzero)),
    "a tensor made of a list": ("waits", _before(_list_to_gpu)),
    "the loss copied to the host": ("waits", _after(_to_host_and_back)),
    "torch.cuda.synchronize()": ("waits", _after(_waiting)),
    "hidden states in float64": ("wrong", _hooked(
        lambda one: one.step.student.transformer.ln_f.register_forward_hook(_in_float64))),
    "a loss in bfloat16": ("wrong", _after(lambda loss: loss.bfloat16())),
    "a softmax of logits in 16 bits": ("wrong", _softmax_in_16_bits),
    "gradients on the CPU": ("wrong", _gradients_on_the_host),
    "moments on the CPU": ("wrong", lambda _: _changed_state(lambda value: value.to("cpu", non_blocking=True))),
    "moments in bfloat16": ("wrong", lambda _: _changed_state(lambda value: value.bfloat16())),
    "twenty kernels for each parameter": ("kernels", _one_by_one),
    "T x T attention": ("wrong", _whole_attention),
}  # fmt: skip
