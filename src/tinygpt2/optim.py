"""Parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from tinygpt2.config import TrainOptions

BETAS = (0.9, 0.95)  # GPT-3's, arXiv:2005.14165, appendix B: steadier than 0.999 in short runs
DECAY_SHARE = 0.2  # of the steps after warm-up: wsd's last phase (Hu et al. 2024, arXiv:2404.06395, use 10 %)


def make_optimizer(module: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """Make AdamW over what is trainable; matrices and embeddings decay, biases and layer norms never do."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=options.learning_rate, betas=BETAS, fused=True
    )


def learning_rate(step: int, total: int, options: TrainOptions) -> float:
    """Return the rate of optimizer step `step`, counted from 0, of `total`.

    It rises linearly over the first `warmup_ratio` of the steps. With t the share of the remaining steps
    that is past: constant 1; linear 1 - t; cosine (1 + cos pi t)/2; exponential exp(-0.693 t), half at the
    end; plateau is 1 for `plateau_ratio` of all steps, then linear to 0; wsd is 1, then linear to 0 in the
    last fifth. All are multiplied by the peak rate.

    Source: plateau and exponential: TinyGPT2; wsd: MiniCPM, arXiv:2404.06395, section 4.
    """
    warmup = math.ceil(options.warmup_ratio * total)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    past, rest = step - warmup, max(total - warmup, 1)
    t = past / rest
    if options.lr_schedule == "constant":
        factor = 1.0
    elif options.lr_schedule == "linear":
        factor = 1 - t
    elif options.lr_schedule == "cosine":
        factor = (1 + math.cos(math.pi * t)) / 2
    elif options.lr_schedule == "exponential":
        factor = math.exp(-0.693 * t)
    elif options.lr_schedule == "plateau":
        plateau = min(options.plateau_ratio * total, rest - 1)
        factor = min(1.0, (rest - past) / (rest - plateau))
    else:
        factor = min(1.0, (1 - t) / DECAY_SHARE)
    return options.learning_rate * factor
