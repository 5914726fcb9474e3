"""Take steps of many kinds on the fake GPU and print what was seen, as JSON: `cases [--all]`, or `faults`."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fake_gpu import harness
from tests.fake_gpu.harness import GPU, Case, Taken, Watch, model, take_step
from tinygpt2.compression.calibration import calibration_batches, mean_loss
from tinygpt2.compression.importance import block_influence, depth_importance, width_importance
from tinygpt2.config.distillation import DistillConfig, built_in_recipes
from tinygpt2.data import dataset
from tinygpt2.data.dataset import Blocks
from tinygpt2.objectives.combined import LossWeights
from tinygpt2.training import optimizers
from tinygpt2.training.step import Step

CHOICES: dict[str, list[Any]] = {
    "recipe": sorted(built_in_recipes()),
    "precision": ["fp32", "bf16", "fp16"],
    "optimizer": ["adamw", "muon"],
    "padded": [False, True],
    "accumulation": [1, 4],
}


def pairwise() -> list[tuple[Any, ...]]:
    """Return combinations of the choices in which every pair of two choices occurs."""
    every = list(itertools.product(*CHOICES.values()))

    def pairs(one: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
        return {(i, one[i], j, one[j]) for i, j in itertools.combinations(range(len(one)), 2)}

    left, chosen = set().union(*map(pairs, every)), []
    while left:
        best = max(every, key=lambda one: len(pairs(one) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def case_of(recipe: str, precision: str, optimizer: str, padded: bool, accumulation: int) -> Case:
    """Return a case by its choices. Where the recipe compares last states, the teacher is as wide as the student."""
    weights = LossWeights.of(DistillConfig(teacher="t", student="s", data="d", out="o", recipe=recipe))
    teacher = (12, 48, 4) if weights.cosine else (12, 64, 4)
    return Case(weights, precision, optimizer, padded, accumulation, teacher=teacher)


def told(taken: Taken) -> dict[str, Any]:
    """Return what a case did as JSON's types."""
    return {
        "waits": dict(taken.waits),
        "evaluation_waits": dict(taken.evaluation.waits),
        "wide": dict(taken.gradients.wide + taken.optimizer.wide),
        "optimizer_kernels": sum(taken.optimizer.kernels.values()),
    }


def calibration() -> None:
    """Measure the importance of blocks and widths, as `truncate-student` does before it cuts."""
    case = Case(LossWeights(), "fp32", "adamw")
    with harness.on_gpu(), Watch():
        teacher = model((3, 48, 4), case).eval()
        blocks = Blocks([harness.Part(4, case.length, 0)], case.length)
        batches = calibration_batches(blocks, 4, GPU)
        mean_loss(teacher, batches)
        depth_importance(teacher, batches, 2)
        block_influence(teacher, batches)
        width_importance(teacher, batches)


def _in_forward(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a fault: the loss of every micro-batch goes through `change`."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        forward = Step.forward

        def faulty(self: Step, *arguments: Any, **named: Any) -> Any:
            loss, terms = forward(self, *arguments, **named)
            return (change(loss), terms) if self.training else (loss, terms)

        monkeypatch.setattr(Step, "forward", faulty)

    return plant


def _in_optimizer(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a fault: every orthogonalized matrix goes through `change`."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        whole = optimizers.orthogonalized
        monkeypatch.setattr(optimizers, "orthogonalized", lambda matrices: change(whole(matrices)))

    return plant


def _half_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = optimizers.Muon._step_matrices

    def faulty(self: optimizers.Muon) -> None:
        whole(self)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["momentum_buffer"] = self.state[parameter]["momentum_buffer"].bfloat16()

    monkeypatch.setattr(optimizers.Muon, "_step_matrices", faulty)


def _blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "to_device", lambda host, device: host.to(device))


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a tensor of the CPU in the loss": _in_forward(lambda loss: (loss + torch.zeros(3)).sum()),
    "a tensor of the CPU in the optimizer": _in_optimizer(lambda x: x * torch.ones(x.shape[-1])),
    "a number is read": _in_forward(lambda loss: loss * float(loss.detach() > 0)),
    "a decision on the GPU's numbers": _in_optimizer(lambda x: -x if x.sum() > 0 else x),
    "a number of the host is copied": _in_forward(lambda loss: loss * loss.new_tensor(2.0)),
    "a boolean mask": _in_forward(lambda loss: loss[None][loss[None] > 0].sum()),
    "nonzero": _in_forward(lambda loss: loss + loss.detach().nonzero().sum()),
    "tokens from memory that can be paged": _blocking,
    "float64": _in_forward(lambda loss: loss.double().float()),
    "a loss in 16 bits": _in_forward(lambda loss: loss.bfloat16()),
    "moments in 16 bits": _half_moments,
}


def faults() -> dict[str, str]:
    """Plant each fault, and return how it is found; an empty text if it is not."""
    case, found = case_of("default", "bf16", "muon", False, 1), {}
    waits = sum(take_step(case).waits.values())
    for name, plant in FAULTS.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            plant(monkeypatch)
            try:
                taken = take_step(case)
                more = sum(taken.waits.values()) > waits
                found[name] = "wait" if more else "float64" if told(taken)["wide"] else ""
            except (AssertionError, RuntimeError, TypeError) as error:
                found[name] = type(error).__name__
    return found


def main() -> None:
    if sys.argv[1] == "faults":
        result: Any = faults()
    else:
        chosen = list(itertools.product(*CHOICES.values())) if sys.argv[2:] == ["--all"] else pairwise()
        result = {" ".join(map(str, one)): told(take_step(case_of(*one))) for one in chosen}
        calibration()
    print(json.dumps(result), flush=True)
    os._exit(0)  # the library of the device does not survive the interpreter's end


if __name__ == "__main__":
    main()
