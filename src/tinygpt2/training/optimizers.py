"""AdamW and Muon, their parameter groups, and gradient clipping."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from tinygpt2.config.training import TrainOptions
from tinygpt2.training.schedule import DEFAULT_RATE

BETAS = (0.9, 0.95)  # GPT-3's, arXiv:2005.14165, appendix B: steadier than 0.999 in short runs


def make_optimizer(module: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
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
    adamw = torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True) if groups else None
    matrices = [parameter for parameter in trainable if parameter in layers]
    if not matrices:
        assert adamw is not None  # at least one parameter is trainable
        return adamw
    attention = {m.c_attn.weight for m in module.modules() if isinstance(m, GPT2Attention)}
    split = ([p for p in matrices if p not in attention], 1), ([p for p in matrices if p in attention], 3)
    muon = [LayerMuon(some, rate, options.weight_decay, parts) for some, parts in split if some]
    return CombinedOptimizer([*muon, *([adamw] if adamw else [])])


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


class LayerMuon(torch.optim.Muon):
    """Muon for GPT-2's matrices, which are stored as (in, out); c_attn.weight holds three of them side by side.

    Muon transposes each part to (out, in) and orthogonalizes it separately. An update is as large as AdamW's would
    be, so both can use the same learning rate (Liu et al. 2025, arXiv:2502.16982, section 2.2).

    Args:
        parts: the number of matrices side by side in one tensor: 3 for queries, keys and values, else 1.
    """

    def __init__(self, matrices: list[nn.Parameter], rate: float, decay: float, parts: int) -> None:
        super().__init__(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self._parts = parts
        self.grad_scale: Tensor | None = None  # gradients are divided by it, as in fused AdamW

    def _init_group(self, group: Any, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> bool:
        """Pass views of the parts to Muon's update, for parameters, gradients and momentum."""
        whole: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        super()._init_group(group, *whole)
        if self.grad_scale is not None:
            for gradient in whole[1]:
                gradient.div_(self.grad_scale)
        for matrices, views in zip(whole, (params, grads, buffers), strict=True):
            views += [part.T for matrix in matrices for part in matrix.chunk(self._parts, dim=1)]
        return False


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers with different parameters that act as one, with one list of groups and one state."""

    def __init__(self, members: list[torch.optim.Optimizer]) -> None:
        self._members = members
        self.grad_scale: Tensor | None = None  # the next step divides the gradients by it
        super().__init__([group for member in members for group in member.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the members use the groups and the state of the whole."""
        start = 0
        for member in self._members:
            count = len(member.param_groups)
            member.param_groups = self.param_groups[start : start + count]
            member.state = self.state
            start += count

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as every optimizer does."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Let each member take its step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for member in self._members:
            member.grad_scale = self.grad_scale  # type: ignore[attr-defined]
            member.step()
        return loss


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
