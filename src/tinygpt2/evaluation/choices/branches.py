"""Windows that begin alike as one sequence: what they share goes through the model once.

The candidates of a question share its context. Their tokens are laid out as a stem and a branch for each candidate. A
mask lets a branch see the stem and itself, and the positions of every branch continue those of the stem. So the stem's
keys and values serve all branches, and each candidate's predictions are those that it would have alone.

    stem     The cat sat on
    branches                 the mat.   a log.
    position 0   1   2   3   4   5      4 5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor
from transformers import GPT2LMHeadModel

from tinygpt2.models.activations import collect_activations


@dataclass(frozen=True)
class Tree:
    """Windows as one sequence of L tokens: what all of them begin with, then the rest of each.

    Attributes:
        tokens: the tokens, without those that are only targets.
        positions: their positions in the window.
        branch: the branch that each belongs to, counted from 1; 0 is the stem.
        predicting: for each of the N targets of all windows, window by window, the place in `tokens` that predicts it.
        targets: the targets.
    """

    tokens: Integer[np.ndarray, " L"]
    positions: Int[np.ndarray, " L"]
    branch: Int[np.ndarray, " L"]
    predicting: Int[np.ndarray, " N"]
    targets: Integer[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, parts: Sequence[Integer[np.ndarray, " _"]], first: Sequence[int]) -> Tree:
        """Lay out the tokens of windows; those of each from `first` on are its targets."""
        stem = _shared([part[:-1] for part in parts])
        lengths = [len(part) - 1 - stem for part in parts]
        begins = stem + np.cumsum([0, *lengths[:-1]])
        predicting = []
        for part, start, begin in zip(parts, first, begins, strict=True):
            places = np.arange(start - 1, len(part) - 1)
            predicting.append(np.where(places < stem, places, places - stem + begin))
        return cls(
            np.concatenate([parts[0][:stem], *(part[stem:-1] for part in parts)]),
            np.concatenate([np.arange(stem), *(np.arange(stem, stem + length) for length in lengths)]),
            np.repeat(np.arange(len(parts) + 1), [stem, *lengths]),
            np.concatenate(predicting),
            np.concatenate([part[start:] for part, start in zip(parts, first, strict=True)]),
        )


def _shared(parts: Sequence[Integer[np.ndarray, " _"]]) -> int:
    """Return how many tokens all parts begin with."""
    least = min(map(len, parts))
    same = np.logical_and.reduce([part[:least] == parts[0][:least] for part in parts])
    return least if same.all() else int(same.argmin())


def branch_states(
    model: GPT2LMHeadModel, trees: Sequence[Tree], device: torch.device
) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
    """Return the last hidden states that predict the targets of some trees, tree by tree, and the targets."""
    longest = max(map(len, trees))
    ids, positions, branch = np.zeros((3, len(trees), longest), np.int64)
    predicting = []
    for row, tree in enumerate(trees):
        length = len(tree)
        ids[row, :length], positions[row, :length], branch[row, :length] = tree.tokens, tree.positions, tree.branch
        branch[row, length:] = -1  # padding sees itself and the stem, and nothing sees it
        predicting.append(tree.predicting + row * longest)
    number = torch.from_numpy(branch).to(device)
    last = len(model.transformer.h)
    states = collect_activations(
        model,
        torch.from_numpy(ids).to(device),
        states=[last],
        positions=torch.from_numpy(positions).to(device),
        mask=_mask(number),
    ).states[last]
    wanted, targets = np.concatenate(predicting), np.concatenate([tree.targets for tree in trees]).astype(np.int64)
    return states.flatten(0, 1)[torch.from_numpy(wanted).to(device)], torch.from_numpy(targets).to(device)


def _mask(branch: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """Return which tokens each token sees: those before it and itself, in the stem and in its own branch."""
    own = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
    return (own & torch.ones_like(own[0]).tril()).unsqueeze(1)
