"""AdamW and Muon, their parameter groups, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from tinygpt2.config.training import TrainOptions
from tinygpt2.training.schedule import DEFAULT_RATE

BETAS = (0.9, 0.95)  # GPT-3's, arXiv:2005.14165, appendix B: steadier than 0.999 in short runs
MOMENTUM = 0.95
STACKED = 2**26  # largest number of weights that Muon stacks: 256 MiB, all layers of GPT-2 small


def make_optimizer(module: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """Make AdamW for all trainable parameters, or Muon for the matrices of the layers and AdamW for the rest.

    Weight decay applies to matrices and embeddings, and never to biases and layer norms.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    layers = {m.weight for m in module.modules() if isinstance(m, Conv1D)} if options.optimizer == "muon" else set()
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2 and p not in layers], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = options.learning_rate or DEFAULT_RATE  # the loop sets the rate of each step
    matrices = [parameter for parameter in trainable if parameter in layers]
    if not matrices:
        return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)
    attention = {m.c_attn.weight for m in module.modules() if isinstance(m, GPT2Attention)}
    split = [([p for p in matrices if p not in attention], 1), ([p for p in matrices if p in attention], 3)]
    return Muon([one for one in split if one[0]], groups, rate, options.weight_decay)


class FixedPositions:
    """Keeps the position embeddings beyond the length of the blocks as they are.

    No gradient reaches them, but weight decay treats the matrix as a whole and would shrink them in every step, and so
    damage the model for longer texts. Restoring them changes nothing else. Only ZeRO-3, which splits the parameters,
    lets them decay.

    Args:
        embeddings: the position embeddings (N, D), as the optimizer has them.
        length: of the blocks.
    """

    def __init__(self, embeddings: Tensor, length: int) -> None:
        rows = embeddings.detach()
        if isinstance(rows, DTensor):  # FSDP: this process has some of the rows
            _, (first, *_) = compute_local_shape_and_global_offset(rows.shape, rows.device_mesh, rows.placements)
            rows, length = rows.to_local(), max(0, length - first)
        self._rows = rows[length:]
        self._values = self._rows.clone()

    def restore(self) -> None:
        """Undo what the optimizer's step did to them."""
        self._rows.copy_(self._values)


class Muon(torch.optim.AdamW):
    """Muon for the matrices of GPT-2's layers, AdamW for all other parameters.

    GPT-2 stores its matrices as (in, out), and c_attn.weight holds those of queries, keys and values side by side;
    each is orthogonalized by itself. All matrices of one shape are stacked, so that a step takes a few batched
    products whatever the number of layers. An update is as large as AdamW's would be, so both can use the same learning
    rate (Liu et al. 2025, arXiv:2502.16982, section 2.2). The gradients of the matrices are overwritten.

    Args:
        matrices: groups of matrices, each with the number of parts that lie side by side in one of its tensors.
        groups: AdamW's parameter groups.
        rate, decay: learning rate of all parameters, and weight decay of the matrices.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the iteration, its coefficients and the Nesterov
    momentum are those of torch.optim.Muon.
    """

    def __init__(
        self, matrices: list[tuple[list[nn.Parameter], int]], groups: list[dict[str, Any]], rate: float, decay: float
    ) -> None:
        whole = [{"params": parameters, "weight_decay": decay} for parameters, _ in matrices] + groups
        super().__init__(whole, lr=rate, betas=BETAS, fused=True)
        self._parts = [parts for _, parts in matrices]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state over. AdamW's own method would look for its moments in the matrices' states, too."""
        torch.optim.Optimizer.__setstate__(self, state)
        for group in self.param_groups:  # the groups of an older state have fewer settings than AdamW reads
            group.update({key: value for key, value in self.defaults.items() if key not in group})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take Muon's step for the matrices, and AdamW's for the other parameters."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        found_inf = getattr(self, "found_inf", None)  # set by the loss scaler; AdamW's kernel skips such a step itself
        if found_inf is None or not found_inf:
            for group, parts in zip(self.param_groups, self._parts, strict=False):
                self._step_matrices(group, parts)
        for group, _ in zip(self.param_groups, self._parts, strict=False):
            for parameter in group["params"]:
                parameter.grad = None  # so AdamW passes over them
        super().step()
        return loss

    def _step_matrices(self, group: dict[str, Any], parts: int) -> None:
        """Update one group's matrices."""
        found = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not found:
            return
        gradients = [parameter.grad for parameter in found]
        scale = getattr(self, "grad_scale", None)  # as in fused AdamW, gradients are divided by it
        if scale is not None:
            torch._foreach_div_(gradients, scale)
        for parameter in found:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in found]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        torch._foreach_lerp_(gradients, momenta, MOMENTUM)
        torch._foreach_mul_(found, 1 - group["lr"] * group["weight_decay"])
        for same in _by_shape(found):
            width = same[0].shape[1] // parts
            size = 0.2 * math.sqrt(max(same[0].shape[0], width))
            updates = orthogonalized(torch.stack([p.grad for p in same]), parts)
            torch._foreach_add_(same, list(updates.unbind()), alpha=-group["lr"] * size)


def _by_shape(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the matrices of each shape, not more at a time than a stack of them may hold."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        shapes.setdefault(matrix.shape, []).append(matrix)
    for shape, same in shapes.items():
        count = max(1, STACKED // shape.numel())
        yield from (same[start : start + count] for start in range(0, len(same), count))


def orthogonalized(stack: Float[Tensor, "N I O"], parts: int = 1) -> Float[Tensor, "N I O"]:
    """Return the nearest semi-orthogonal matrices, about: all singular values are near 1.

    Five Newton-Schulz iterations in bfloat16, as in torch.optim.Muon, which takes each matrix as (out, in).

    Args:
        stack: matrices, (in, out).
        parts: the number of matrices that lie side by side in each of them, along O.
    """
    count, rows, columns = stack.shape
    x = stack.bfloat16().view(count, rows, parts, columns // parts).transpose(1, 2).flatten(0, 1)  # (N * parts, I, O)
    turned = x.shape[2] <= x.shape[1]  # the products of the shorter side with itself are the smaller ones
    x = x.mT if turned else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if turned else x
    return x.view(count, parts, rows, -1).transpose(1, 2).reshape(stack.shape).to(stack.dtype)


def unwrapped(accelerator: Accelerator, optimizer: Any) -> Any:
    """Return the optimizer without Accelerate's wrapper if the wrapper is not needed: it only costs time then.

    The wrapper is needed for loss scaling, and DeepSpeed has a different one. In each step the wrapper looks for
    optional packages on the disk.
    """
    return optimizer.optimizer if type(optimizer) is AcceleratedOptimizer and accelerator.scaler is None else optimizer


def clip_gradients(accelerator: Accelerator, optimizer: Any, parameters: list[nn.Parameter], limit: float) -> float:
    """Return the norm of the gradients. If it is above `limit`, the optimizer's next step scales them down to it.

    The scaling is part of the fused optimizer step and does not need a separate pass over the gradients: it uses the
    attribute `grad_scale`, as torch's loss scaler does.

    Args:
        limit: the largest norm; 0 turns clipping off.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it clips, and returns -1 for NaN and infinity
        norm = float(accelerator.clip_grad_norm_(parameters, limit) or 0)
        return norm if norm >= 0 else math.inf
    accelerator.unscale_gradients()
    norm = float(nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
    scale = torch.full((), norm / limit, device=accelerator.device) if limit and norm > limit else None
    getattr(optimizer, "optimizer", optimizer).grad_scale = scale  # with loss scaling it is still wrapped
    return norm
