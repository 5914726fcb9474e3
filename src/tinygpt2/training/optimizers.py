"""AdamW and Muon, their parameter groups, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tinygpt2.config.training import TrainOptions
from tinygpt2.runtime.devices import has_fast_bf16

BETAS = (0.9, 0.95)  # GPT-3's, arXiv:2005.14165, appendix B: steadier than 0.999 in short runs
MOMENTUM = 0.95
STACKED = 2**26  # largest number of weights that Muon stacks: all of a shape in GPT-2 small


def make_optimizer(module: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """Make AdamW for all trainable parameters, or Muon for the matrices of the layers and AdamW for the rest.

    Weight decay applies to matrices and embeddings, and never to biases and layer norms.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    layers = {m.weight for m in module.modules() if isinstance(m, Conv1D)} if options.optimizer == "muon" else set()
    own = _embeddings(module) if options.embedding_learning_rate else set()
    groups = [
        _group([p for p in trainable if p in own], options.weight_decay, options.embedding_learning_rate),
        _group([p for p in trainable if p.ndim >= 2 and p not in own and p not in layers], options.weight_decay),
        _group([p for p in trainable if p.ndim < 2], 0.0, options.vector_learning_rate),
    ]
    groups = [group for group in groups if group["params"]]
    rate = options.learning_rate or 0.0  # the loop sets the rate of each step
    matrices = [parameter for parameter in trainable if parameter in layers]
    shared = options.shard_optimizer and dist.is_initialized()
    if not matrices:
        return (ShardedAdamW if shared else torch.optim.AdamW)(groups, lr=rate, betas=BETAS, fused=True)
    attention = {m.c_attn.weight for m in module.modules() if isinstance(m, GPT2Attention)}
    # in this order, because checkpoints number the parameters
    ordered = [p for p in matrices if p not in attention] + [p for p in matrices if p in attention]
    parts: dict[Tensor, int] = {parameter: 3 if parameter in attention else 1 for parameter in ordered}
    return (ShardedMuon if shared else Muon)(parts, groups, rate, options.weight_decay)


def _embeddings(module: nn.Module) -> set[Tensor]:
    """Return the embeddings of tokens and positions, and the output matrix, which may be the former."""
    heads = {m.lm_head.weight for m in module.modules() if isinstance(m, GPT2LMHeadModel)}
    return heads | {m.weight for m in module.modules() if isinstance(m, nn.Embedding)}


def _group(parameters: list[nn.Parameter], decay: float, peak: float | None = None) -> dict[str, Any]:
    """Return a parameter group; `peak` is its own peak learning rate, if it has one (see `schedule.set_rates`)."""
    return {"params": parameters, "weight_decay": decay, **({"peak": peak} if peak else {})}


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
    products whatever the number of layers; several processes share the matrices of a stack. An update is as large as
    AdamW's would be, so both can use the same learning rate (Liu et al. 2025, arXiv:2502.16982, section 2.2). The
    gradients of the matrices are overwritten. For each weight of the largest stack, a step takes up to 8 bytes, which
    is half a GiB at most.

    Args:
        matrices: each with the number of parts that lie side by side in it.
        groups: AdamW's parameter groups.
        rate, decay: learning rate of all parameters, and weight decay of the matrices.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the iteration, its coefficients and the Nesterov
    momentum are those of torch.optim.Muon.
    """

    shares_stacks = True  # every process has all gradients

    def __init__(self, matrices: dict[Tensor, int], groups: list[dict[str, Any]], rate: float, decay: float) -> None:
        whole = [{"params": list(matrices), "weight_decay": decay}, *groups]
        super().__init__(whole, lr=rate, betas=BETAS, fused=True)
        self._parts = matrices

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state over. AdamW's own method would look for its moments in the matrices' states, too."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take Muon's step for the matrices, and AdamW's for the other parameters."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        found_inf = getattr(self, "found_inf", None)  # a loss scaler sets it; AdamW's kernel skips such a step itself
        if found_inf is None or not found_inf:
            self._step_matrices()
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None  # so AdamW passes over them
        super().step()
        return loss

    def _step_matrices(self) -> None:
        group = self.param_groups[0]
        by_matrix = {matrix: matrix.grad for matrix in group["params"] if matrix.grad is not None}
        if not by_matrix:
            return
        found, gradients = list(by_matrix), list(by_matrix.values())
        scale = getattr(self, "grad_scale", None)  # as in fused AdamW, gradients are divided by it
        if scale is not None:
            torch._foreach_div_(gradients, scale)
        for matrix in found:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in found]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        torch._foreach_lerp_(gradients, momenta, MOMENTUM)
        torch._foreach_mul_(found, 1 - group["lr"] * group["weight_decay"])
        orthogonalize = _orthogonalized_by_all if self.shares_stacks else _orthogonalized_here
        for stack in _stacks(found, self._parts):
            updates = orthogonalize(
                [part for matrix in stack for part in _wide(by_matrix[matrix], self._parts[matrix])]
            )
            for _, alike in groupby(stack, lambda matrix: matrix.shape):
                same = list(alike)
                parts = self._parts[same[0]]
                own, updates = updates[: parts * len(same)], updates[parts * len(same) :]
                size = 0.2 * math.sqrt(max(own.shape[1:]))
                torch._foreach_add_(same, _as_stored(own, same[0], parts), alpha=-group["lr"] * size)


def _stacks(matrices: list[Tensor], parts: dict[Tensor, int]) -> Iterator[list[Tensor]]:
    """Yield the matrices whose parts have the same shape, up to transposition; those stored alike lie together."""
    shapes: dict[tuple[int, ...], list[Tensor]] = {}
    for matrix in matrices:
        sides = matrix.shape[0], matrix.shape[1] // parts[matrix]
        shapes.setdefault((min(sides), max(sides)), []).append(matrix)
    for same in shapes.values():
        stack: list[Tensor] = []
        for matrix in sorted(same, key=lambda matrix: tuple(matrix.shape)):
            if stack and sum(one.numel() for one in stack) + matrix.numel() > STACKED:
                yield stack
                stack = []
            stack.append(matrix)
        yield stack


def _turned(rows: int, columns: int) -> bool:
    """Return whether `_wide` transposes matrices of this shape. Square ones, too: torch.optim.Muon has (out, in)."""
    return rows >= columns


def _wide(matrix: Float[Tensor, "I O"], parts: int) -> list[Tensor]:
    """Return the parts of a matrix, transposed if necessary to have no more rows than columns."""
    pieces = list(matrix.chunk(parts, dim=1))
    return [piece.mT for piece in pieces] if _turned(*pieces[0].shape) else pieces


def _as_stored(wide: Float[Tensor, "M R C"], like: Tensor, parts: int) -> list[Tensor]:
    """Undo `_wide` for M / parts matrices that are stored like one: as contiguous tensors of its type."""
    rows, columns = like.shape
    whole = (
        (wide.mT if _turned(rows, columns // parts) else wide).view(-1, parts, rows, columns // parts).transpose(1, 2)
    )
    return list(whole.to(like.dtype, memory_format=torch.contiguous_format).flatten(2).unbind())


def _orthogonalized_here(matrices: list[Tensor]) -> Float[Tensor, "N R C"]:
    return orthogonalized(torch.stack(matrices))


def _orthogonalized_by_all(matrices: list[Tensor]) -> Float[Tensor, "N R C"]:
    """Orthogonalize matrices of one shape. Each process does its share and receives the others' results."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return _orthogonalized_here(matrices)
    processes, rank = dist.get_world_size(), dist.get_rank()
    count = math.ceil(len(matrices) / processes)
    share = matrices[rank * count : (rank + 1) * count]
    own = matrices[0].new_zeros((count, *matrices[0].shape), dtype=_iterated(matrices[0].device))
    if share:
        own[: len(share)] = _orthogonalized_here(share)
    every = own.new_empty((processes * count, *own.shape[1:]))
    dist.all_gather(list(every.chunk(processes)), own)
    return every[: len(matrices)]


def orthogonalized(matrices: Float[Tensor, "N R C"]) -> Float[Tensor, "N R C"]:
    """Return the nearest semi-orthogonal matrices, about: all singular values are near 1.

    Five Newton-Schulz iterations, as in torch.optim.Muon. They need no precision: they are computed in bfloat16, but in
    float32 on a device that is slower with bfloat16.

    Args:
        matrices: they have no more rows than columns: then the products with themselves are the smaller ones.
    """
    x = matrices.to(_iterated(matrices.device))
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterated(device: torch.device) -> torch.dtype:
    """Return the number format of Newton-Schulz iterations."""
    return torch.bfloat16 if has_fast_bf16(device) else torch.float32


class _Sharded(torch.optim.Optimizer):
    """ZeRO-1 (arXiv:1910.02054): the processes divide the optimizer's state among themselves by whole parameters.

    Each process takes the step for its own parameters, with gradients that all have, and sends them to the others. Its
    state then holds nothing of the other parameters. `state_dict` collects the whole state in the main process, and
    `load_state_dict` takes from a whole state what is its own; so the number of processes may change in between. Every
    process must call both.
    """

    def _owners(self) -> dict[Tensor, int]:
        """Return the process of each parameter: from the largest on, the one that has the least so far."""
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        owners, held = dict.fromkeys(every, 0), [0] * dist.get_world_size()
        for parameter in sorted(every, key=lambda parameter: -parameter.numel()):
            owners[parameter] = held.index(min(held))
            held[owners[parameter]] += parameter.numel()
        return owners

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take the step for this process's parameters, and receive the others."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        owners = self._owners()
        for parameter, owner in owners.items():
            if owner != dist.get_rank():
                parameter.grad = None  # the step passes over it, and makes no state for it
        super().step()
        sent = [dist.broadcast(parameter.detach(), owner, async_op=True) for parameter, owner in owners.items()]
        for one in sent:
            one.wait()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state in the main process, and in the others what they have."""
        saved = super().state_dict()
        own = {index: {key: (v.shape, v.dtype) for key, v in row.items()} for index, row in saved["state"].items()}
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, own)
        parameters = list(self._owners())
        for process, rows in enumerate(everywhere[1:], 1):
            for index, key, (shape, dtype) in ((i, key, what) for i, row in rows.items() for key, what in row.items()):
                if dist.get_rank() == process:
                    dist.send(saved["state"][index][key].contiguous(), 0)
                elif dist.get_rank() == 0:
                    received = torch.empty(shape, dtype=dtype, device=parameters[index].device)
                    dist.recv(received, process)
                    saved["state"].setdefault(index, {})[key] = received.cpu()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take from a whole state that of this process's parameters."""
        owners = list(self._owners().values())
        own = {index: row for index, row in state_dict["state"].items() if owners[index] == dist.get_rank()}
        super().load_state_dict({**state_dict, "state": own})


class ShardedAdamW(_Sharded, torch.optim.AdamW):
    """AdamW whose state is divided among the processes."""


class ShardedMuon(_Sharded, Muon):
    """Muon whose state, and with it the work, is divided among the processes."""

    shares_stacks = False


def check_state(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Check that each row of a state fits its parameter: the optimizer itself would fail in its next step only.

    Raises:
        ValueError: another optimizer, or one with other parameters, wrote them.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, row in state.items():
        shapes = {tensor.shape for tensor in row.values() if tensor.ndim}
        if index >= len(parameters) or not shapes <= {parameters[index].shape}:
            raise ValueError("its optimizer state belongs to other parameters")


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer without Accelerate's wrapper, except for DeepSpeed's, which is a different one.

    In each step the wrapper looks for optional packages on the disk. What it does for a loss scaler, `clip_gradients`
    and the loop do: they know from the norm whether the scaled gradients have overflowed.
    """
    return optimizer.optimizer if type(optimizer) is AcceleratedOptimizer else optimizer


def clip_gradients(accelerator: Accelerator, optimizer: Any, parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Return the norm of the gradients. If it is above `limit`, the optimizer's next step scales them down to it.

    The scaling is part of the fused optimizer step and does not need a separate pass over the gradients: it uses the
    attribute `grad_scale`, as torch's loss scaler does. A GPU is not waited for.

    Args:
        limit: the largest norm; 0 turns clipping off.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it clips, and returns -1 for NaN and infinity
        norm = float(accelerator.clip_grad_norm_(parameters, limit) or 0)
        return torch.full((), norm if norm >= 0 else math.inf, device=accelerator.device)
    accelerator.unscale_gradients()
    total = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(total, DTensor):  # FSDP
        total = total.full_tensor()
    if not limit or (total.device.type != "cuda" and not total > limit):
        optimizer.grad_scale = None
    else:
        optimizer.grad_scale = (total / limit).clamp(min=1)
    return total
