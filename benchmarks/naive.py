"""The distillation step of TinyGPT2's scripts, written in plain PyTorch and independent of this package.

It uses eager attention and element-wise losses, and it keeps every layer's scores and hidden states and the whole
logits. Autograd records the teacher's forward pass, and its outputs are detached afterwards. The weights come from
plain `transformers` models.

Source: TLB-MISS/TinyGPT2, general_distill.py and its modified modeling_gpt2.py. The reductions are those of its later
commits: the attention loss times 2L/(L+1), soft labels summed over the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel


def forward(model: GPT2LMHeadModel, input_ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return logits (B, T, V), N + 1 hidden states (B, T, D) and N masked score matrices (B, H, T, T)."""
    transformer, heads = model.transformer, model.config.n_head
    batch, length = input_ids.shape
    mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
    hidden = transformer.wte(input_ids) + transformer.wpe(torch.arange(length, device=input_ids.device))
    states, all_scores = [hidden], []
    for block in transformer.h:
        query, key, value = (
            part.view(batch, length, heads, -1).permute(0, 2, 1, 3)
            for part in block.attn.c_attn(block.ln_1(hidden)).split(hidden.shape[-1], dim=2)
        )
        scores = torch.matmul(query, key.transpose(-1, -2)) / value.shape[-1] ** 0.5
        scores = torch.where(mask, scores, torch.tensor(-1e4, dtype=scores.dtype, device=scores.device))
        all_scores.append(scores)
        mixed = torch.matmul(scores.softmax(-1).to(value.dtype), value)
        mixed = mixed.permute(0, 2, 1, 3).contiguous().view(batch, length, -1)
        hidden = hidden + block.attn.c_proj(mixed)
        hidden = hidden + block.mlp(block.ln_2(hidden))
        states.append(hidden)
    states[-1] = transformer.ln_f(hidden)
    return model.lm_head(states[-1]), states, all_scores


class NaiveStep(nn.Module):
    """A student, a learned linear map of its hidden states, and TinyGPT2's three objectives, each with weight 1."""

    def __init__(self, student: GPT2LMHeadModel, teacher: GPT2LMHeadModel, projection: nn.Linear) -> None:
        super().__init__()
        self.student, self.projection = student, projection
        self._teacher = (teacher,)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its three terms."""
        logits, states, scores = forward(self.student, input_ids)
        states = [self.projection(state) for state in states]
        taught = forward(self._teacher[0], input_ids)  # stays in memory, with its graph, until the step ends
        soft, teacher_states = taught[0].detach(), [state.detach() for state in taught[1]]
        teacher_scores = [matrix.detach() for matrix in taught[2]]
        every = len(teacher_scores) // len(scores)
        length = input_ids.shape[1]
        attention = torch.zeros((), device=logits.device)
        for own, target in zip(scores, teacher_scores[every - 1 :: every], strict=True):
            own = torch.where(own <= -1e2, torch.zeros_like(own), own)
            target = torch.where(target <= -1e2, torch.zeros_like(target), target)
            attention = attention + nn.functional.mse_loss(own, target) * (2 * length / (length + 1))
        hidden = torch.zeros((), device=logits.device)
        for own, target in zip(states, teacher_states[::every], strict=True):
            hidden = hidden + nn.functional.mse_loss(own, target)
        prediction = (-soft.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        terms = {"attention": attention, "hidden": hidden, "prediction": prediction}
        return attention + hidden + prediction, {name: term.detach() for name, term in terms.items()}
