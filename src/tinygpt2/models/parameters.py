"""Count, freeze, cast, round and average a model's parameters, and set its dropout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tinygpt2.errors import ConfigError
from tinygpt2.models.quantization import rounded
from tinygpt2.utils.progress import say

_STEPS = "steps"  # in `TailAverage.mean`; no parameter has this name


def set_dropout(model: GPT2LMHeadModel, rate: float) -> None:
    """Set one dropout rate for embeddings, attention and residuals. The model's configuration is not changed."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Exclude from training all parameters whose names match a shell-style pattern.

    Raises:
        ConfigError: a pattern matches no parameter, or no parameter is left to train.
    """
    for pattern in patterns:
        matched = [parameter for name, parameter in model.named_parameters() if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(
                f"--freeze {pattern!r} matches no parameter",
                "names look like transformer.h.0.attn.c_attn.weight",
            )
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"--freeze {', '.join(patterns)} leaves nothing to train")


def cast_linear_layers(layers: nn.Module, dtype: torch.dtype) -> None:
    """Cast the linear layers among some layers of a model to autocast's type, in place.

    For a frozen model, autocast would do so again in every forward pass, with the same numbers as result. Embeddings,
    layer norms and the output matrix keep their type, because autocast computes with them as they are, or rounds later.
    The model can then be used only under autocast.
    """
    for module in layers.modules():
        if isinstance(module, Conv1D | nn.Linear):
            module.to(dtype)


def count_parameters(model: nn.Module) -> int:
    """Count a model's weights. Tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


class Rounding:
    """Rounds a model's matrices to the blocks of an exported type while it is trained.

    The model always holds the rounded weights, so that training, evaluation and the saved model use the same ones. The
    optimizer changes the weights before rounding, the masters, by the gradients at the rounded weights: the
    straight-through estimator (Bengio et al. 2013, arXiv:1308.3432, section 4; with masters as in Courbariaux et al.
    2015, arXiv:1511.00363, algorithm 1). Rounding twice changes nothing more, so an export of the saved model as the
    same type holds exactly its weights.

    Args:
        model: its parameters are changed in place. Biases and layer norms stay as they are.
        kind: q8_0 or q4_0; None never rounds.
        start: the share of the run from which on the model is rounded.

    Attributes:
        masters: the weights before rounding, by their names; empty until the rounding has begun.
    """

    def __init__(self, model: GPT2LMHeadModel, kind: str | None, start: float) -> None:
        self._model, self._kind, self._start = model, kind, start
        self.masters: dict[str, Tensor] = {}

    def reach(self, share: float) -> None:
        """Begin to round, and say so, if this share of the run is over and it is the start or more."""
        if self._kind is None or self.masters or share < self._start - 1e-9:
            return
        matrices = {name: one for name, one in self._model.named_parameters() if one.ndim > 1}
        self.masters.update({name: one.detach().clone() for name, one in matrices.items()})
        self._round()
        say(f"{share:.0%} of the run is over: from here on, all matrices are rounded to {self._kind}")

    @contextmanager
    def undone(self) -> Iterator[None]:
        """While the block runs, the model holds the masters; what it changes in them is kept."""
        own = self._matrices()
        for one, master in own:
            one.detach().copy_(master)
        yield
        for one, master in own:
            master.copy_(one.detach())
        self._round()

    def _matrices(self) -> list[tuple[nn.Parameter, Tensor]]:
        own = dict(self._model.named_parameters()) if self.masters else {}
        return [(own[name], master) for name, master in self.masters.items()]

    @torch.no_grad()
    def _round(self) -> None:
        for (one, master), name in zip(self._matrices(), self.masters, strict=True):
            one.copy_(rounded(name, master.float(), self._kind or "f32"))


class TailAverage:
    """The mean of a model's weights over the last steps of a run, which takes the place of the last weights.

    Args:
        model: its trained parameters are averaged.
        share: the share of the run, at its end, whose steps count; 0 averages nothing.

    Attributes:
        mean: the mean so far in float32, by the parameters' names, and the number of steps; empty before the tail.

    Source: tail averaging, Jain et al. 2018, arXiv:1610.03774; of networks, Izmailov et al. 2018, arXiv:1803.05407.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self._model, self._start, self._on = model, 1 - share, share > 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def reach(self, share: float) -> None:
        """Count the weights of the step after which this share of the run is over, if that lies in the tail."""
        if not self._on or share <= self._start + 1e-9:
            return
        own = {name: one.detach() for name, one in self._model.named_parameters() if one.requires_grad}
        if not self.mean:
            self.mean.update({name: torch.zeros_like(one, dtype=torch.float32) for name, one in own.items()})
            self.mean[_STEPS] = torch.zeros((), device=next(iter(own.values())).device)
        steps = self.mean[_STEPS].add_(1)
        for name, one in own.items():
            self.mean[name].lerp_(one.float(), steps.reciprocal())

    @contextmanager
    def used(self) -> Iterator[None]:
        """While the block runs, the model holds the mean, if there is one."""
        own = {name: one.detach().clone() for name, one in self._model.named_parameters() if name in self.mean}
        self.take()
        try:
            yield
        finally:
            self._copy(own)

    def take(self) -> None:
        """Replace the model's weights by the mean, if there is one."""
        self._copy(self.mean)

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, one in self._model.named_parameters():
            if name in weights:
                one.copy_(weights[name])


def fingerprint_of_weights(model: nn.Module) -> str:
    """Return a SHA-256 of the names, types, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
