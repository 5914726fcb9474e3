"""AdamW and Muon, their parameter groups, and gradient clipping."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from tinygpt2.config.training import TrainOptions
from tinygpt2.training.schedule import DEFAULT_RATE

BETAS = (0.9, 0.95)  # GPT-3's, arXiv:2005.14165, appendix B: steadier than 0.999 in short runs


def make_optimizer(module: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """Make AdamW over what is trainable, or Muon over the layers' matrices and AdamW over the rest.

    Matrices and embeddings decay, biases and layer norms never do.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    layers = {m.weight for m in module.modules() if isinstance(m, Conv1D)} if options.optimizer == "muon" else set()
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2 and p not in layers], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = options.learning_rate or DEFAULT_RATE  # until the loop sets that of the step
    adamw = torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True) if groups else None
    matrices = [parameter for parameter in trainable if parameter in layers]
    if not matrices:
        assert adamw is not None  # something is trainable
        return adamw
    own = {m.c_attn.weight for m in module.modules() if isinstance(m, GPT2Attention)}
    split = ([p for p in matrices if p not in own], 1), ([p for p in matrices if p in own], 3)
    muon = [LayerMuon(found, rate, options.weight_decay, parts) for found, parts in split if found]
    return CombinedOptimizer([*muon, *([adamw] if adamw else [])])


class LayerMuon(torch.optim.Muon):
    """Muon for GPT-2's matrices, which lie as (in, out), some of them several side by side.

    Each of a matrix's parts is made orthogonal by itself and counts as (out, in). An update is as large as AdamW's
    would be, so one learning rate serves both (Liu et al. 2025, arXiv:2502.16982, section 2.2).

    Args:
        parts: matrices side by side in one: 3 for queries, keys and values.
    """

    def __init__(self, matrices: list[nn.Parameter], rate: float, decay: float, parts: int) -> None:
        super().__init__(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self._parts = parts
        self.grad_scale: Tensor | None = None  # as AdamW's

    def _init_group(self, group: Any, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> bool:
        """Give the update views of the parts, of parameters, gradients and momentum alike."""
        whole: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        super()._init_group(group, *whole)
        if self.grad_scale is not None:
            for gradient in whole[1]:
                gradient.div_(self.grad_scale)
        for found, wanted in zip(whole, (params, grads, buffers), strict=True):
            wanted += [part.T for matrix in found for part in matrix.chunk(self._parts, dim=1)]
        return False


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each of its own parameters, as one: one list of groups, one state."""

    def __init__(self, members: list[torch.optim.Optimizer]) -> None:
        self._members = members
        self.grad_scale: Tensor | None = None  # what the gradients of the next step are divided by
        super().__init__([group for member in members for group in member.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Make the members' groups and states those of the whole."""
        start = 0
        for member in self._members:
            count = len(member.param_groups)
            member.param_groups = self.param_groups[start : start + count]
            member.state = self.state
            start += count

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, as every optimizer does."""
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
    """Return the optimizer that Accelerate wrapped, where its wrapper has nothing to do but cost time.

    It serves loss scaling; DeepSpeed's is another one. Each of its steps looks for optional packages on the disk.
    """
    return optimizer.optimizer if type(optimizer) is AcceleratedOptimizer and accelerator.scaler is None else optimizer


def clip_gradients(accelerator: Accelerator, optimizer: Any, parameters: list[nn.Parameter], limit: float) -> float:
    """Return the gradients' norm; have the optimizer's next step scale them down to `limit` (0: never) if it is above.

    The scaling is part of the fused step, by the attribute that torch's loss scaler uses: no pass of its own.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # its engine clips; what is not finite it calls -1
        norm = float(accelerator.clip_grad_norm_(parameters, limit) or 0)
        return norm if norm >= 0 else math.inf
    accelerator.unscale_gradients()
    norm = float(nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
    scale = torch.full((), norm / limit, device=accelerator.device) if limit and norm > limit else None
    getattr(optimizer, "optimizer", optimizer).grad_scale = scale  # where losses are scaled, it is still wrapped
    return norm
