"""GPT-2 from first principles, in plain PyTorch. This file is the whole model; read it from top to bottom.

It shares no code with `transformers` or with the rest of this package. It reads the same files (config.json,
model.safetensors) and computes the same numbers, so `verify` and the tests compare other models with it. It is written
to be clear, not fast. docs/gpt2-from-scratch.md explains it step by step.

Letters for tensor axes: B batch, T time (positions), V vocabulary, D width, H heads, K head width (D = H K), F inner
width (of the MLP).
Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# config.json may use these names too
OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}


@dataclass(frozen=True)
class Shape:
    """The values that describe a GPT-2 apart from its weights, under the names that config.json uses."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation_function: str
    layer_norm_epsilon: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    tie_word_embeddings: bool

    @classmethod
    def read(cls, directory: Path) -> Shape:
        """Read config.json.

        Raises:
            ValueError: config.json asks for a feature that this GPT-2 does not have.
        """
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config |= {name: config[other] for name, other in OTHER_NAMES.items() if other in config}
        if (name := config.get("activation_function", "gelu_new")) not in ACTIVATIONS:
            raise ValueError(f"config.json sets activation_function to {name}, which this GPT-2 does not have")
        width, inner = config.get("n_embd", 768), config.get("n_inner")
        return cls(
            vocab_size=config.get("vocab_size", 50257),
            n_positions=config.get("n_positions", 1024),
            n_embd=width,
            n_layer=config.get("n_layer", 12),
            n_head=config.get("n_head", 12),
            n_inner=4 * width if inner is None else inner,
            activation_function=config.get("activation_function", "gelu_new"),
            layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
            scale_attn_weights=config.get("scale_attn_weights", True),
            scale_attn_by_inverse_layer_idx=config.get("scale_attn_by_inverse_layer_idx", False),
            tie_word_embeddings=config.get("tie_word_embeddings", True),
        )


class Output(NamedTuple):
    """The result of a forward pass: logits (B, T, V), and N + 1 hidden states (B, T, D) of a model with N blocks.

    State 0 is the sum of the embeddings, and state i is the output of block i. But the last state, N, is the output of
    the final layer norm, which follows block N.
    """

    logits: Tensor
    states: list[Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute GELU with Hendrycks and Gimpel's tanh formula (arXiv:1606.08415, section 2), as GPT-2 does."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: Tensor) -> Tensor:
    """Compute GELU exactly: x times the standard normal distribution function. GPT-2 uses the tanh formula instead."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)) without overflow, a smooth version of ReLU."""
    return torch.relu(x) + torch.log1p(torch.exp(-x.abs()))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), gelu_tanh),
    **dict.fromkeys(("gelu", "gelu_python"), gelu_erf),
    "gelu_10": lambda x: gelu_erf(x).clamp(-10, 10),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    **dict.fromkeys(("silu", "swish"), lambda x: x * torch.sigmoid(x)),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "mish": lambda x: x * torch.tanh(softplus(x)),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x) ** 2,
    "relu6": lambda x: x.clamp(0, 6),
    "leaky_relu": lambda x: torch.maximum(x, 0.01 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "sqrtsoftplus": lambda x: torch.sqrt(softplus(x)),
}
"""Every activation of `transformers` that has no weights of its own."""


class LayerNorm(nn.Module):
    """Normalize the vector of each position to mean 0 and variance 1, then scale and shift each dimension.

    The scale (`weight`) and the shift (`bias`) are learned.
    """

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        """Normalize each vector separately."""
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)  # divided by D, not by D - 1
        return (x - mean) / torch.sqrt(variance + self.epsilon) * self.weight + self.bias


class Attention(nn.Module):
    """Causal self-attention with H heads: each position gathers information from itself and earlier positions."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.heads = shape.n_head
        self.scale = 1 / math.sqrt(shape.n_embd // shape.n_head) if shape.scale_attn_weights else 1.0
        if shape.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1  # layers count from 0
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd)  # queries, keys and values in one product
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        """Return, for each position, a mixture of the values of this position and all earlier ones."""
        B, T, D = x.shape
        K = D // self.heads
        query, key, value = (part.view(B, T, self.heads, K).transpose(1, 2) for part in self.c_attn(x).split(D, dim=-1))
        scores = self.scale * query @ key.transpose(-1, -2)  # (B, H, T, T): how much position t attends to position s
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)  # (T, T): true where s > t
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        mixed = weights @ value  # (B, H, T, K)
        return self.c_proj(mixed.transpose(1, 2).reshape(B, T, D))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """A small network that handles each position separately: from D to F dimensions, an activation, and back to D."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.n_embd, shape.n_inner)
        self.c_proj = nn.Linear(shape.n_inner, shape.n_embd)
        self.activation = ACTIVATIONS[shape.activation_function]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        """Apply the network to each vector separately."""
        return self.c_proj(self.activation(self.c_fc(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention and an MLP, whose outputs are added to the residual stream.

    Both read the stream through a layer norm. The stream itself is not normalized.
    """

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(shape.n_embd, shape.layer_norm_epsilon)
        self.attn = Attention(shape, layer)
        self.ln_2 = LayerNorm(shape.n_embd, shape.layer_norm_epsilon)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        """Add the output of attention to the stream, then the output of the MLP."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class GPT2(nn.Module):
    """The whole model: embeddings, N blocks, a final layer norm and the output matrix.

    If embeddings are tied, as in GPT-2, the output matrix is the matrix of token embeddings.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.wte = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.wpe = nn.Embedding(shape.n_positions, shape.n_embd)
        self.h = nn.ModuleList([Block(shape, layer) for layer in range(shape.n_layer)])
        self.ln_f = LayerNorm(shape.n_embd, shape.layer_norm_epsilon)
        self.lm_head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        if shape.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Output:  # (B, T)
        """Return the logits of the next token at each position, and the hidden states."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        states = [x]
        for block in self.h:
            x = block(x)
            states.append(x)
        states[-1] = self.ln_f(x)
        return Output(self.lm_head(states[-1]), states)

    def greedy(self, ids: Tensor, count: int) -> Tensor:  # (B, T) -> (B, T + count)
        """Append the likeliest next token, `count` times. The model sees at most the last `n_positions` tokens."""
        for _ in range(count):
            logits = self(ids[:, -self.shape.n_positions :]).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        return ids


def load(directory: Path | str, weights: dict[str, Tensor] | None = None) -> GPT2:
    """Load a model directory: config.json, and model.safetensors or the files that its index lists.

    The files store the blocks' matrices for `transformers`' Conv1D: with shape (in, out), to multiply from the right.
    nn.Linear needs (out, in), so they are transposed here.

    Args:
        weights: used instead of the files' tensors.

    Raises:
        ValueError: the weights do not fit config.json, or config.json asks for a feature that this GPT-2 does not have.
    """
    directory = Path(directory)
    shape = Shape.read(directory)
    weights = stored_weights(directory) if weights is None else weights
    # "student." begins the names of a training checkpoint. Some files leave "transformer." out.
    named = {name.removeprefix("student.").removeprefix("transformer."): tensor for name, tensor in weights.items()}
    if f"h.{shape.n_layer}.ln_1.weight" in named:
        raise ValueError(f"the weights have more blocks than the {shape.n_layer} of config.json")
    if shape.tie_word_embeddings and named.keys() & {"wte.weight", "lm_head.weight"}:
        named.setdefault("wte.weight", named.get("lm_head.weight", torch.empty(0)))
        named.setdefault("lm_head.weight", named["wte.weight"])
        # if a file has two different matrices, they are not tied, whatever config.json says
        shape = replace(shape, tie_word_embeddings=torch.equal(named["wte.weight"], named["lm_head.weight"]))
    model = GPT2(shape)
    # Other tensors are not used: old files also store the causal mask, and other models have other heads.
    used = model.state_dict().keys()
    named = {name: tensor for name, tensor in named.items() if name in used}
    for name in named:
        if name.startswith("h.") and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            named[name] = named[name].T
    try:
        model.load_state_dict(named)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return model.eval()


def stored_weights(directory: Path) -> dict[str, Tensor]:
    """Read model.safetensors; if there is none, read the files that model.safetensors.index.json lists."""
    if (file := directory / "model.safetensors").is_file():
        return load_file(file)
    index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return {
        name: tensor
        for shard in set(index["weight_map"].values())
        for name, tensor in load_file(directory / shard).items()
    }
