"""GPT-2 for decoding: a cache that is allocated once, and a short function for each layer.

A token costs about a dozen calls of torch for each layer, so that Python does not slow a small model down, and each
weight is read from memory once. benchmarks/decoding.py compares it with `transformers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from tinygpt2.config.decoding import DecodingWeights
from tinygpt2.decoding.products import Layout, Matrix, Product
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.threads import on_several_threads


class Cache:
    """Keys and values of the tokens that were read, for B texts side by side.

    Attributes:
        layers: for each layer (2, B, H, columns, K): the keys, then the values.
        columns: the most tokens that can be read.
        length: the number of tokens that were read. To forget the last ones, set a smaller number.
        pads: (B,), how many tokens at the beginning of each text only fill it up; None if there are none.
    """

    def __init__(self, layers: list[Tensor], pads: Tensor | None) -> None:
        self.layers, self.pads, self.length = layers, pads, 0
        self.columns = layers[0].shape[3]


class _Layer(NamedTuple):
    """What a layer computes with."""

    before_attention: Product
    qkv: Product
    heads: int
    width: int  # of a head
    scale: float
    mix: Product
    before_mlp: Product
    up: Product
    activation: Callable[[Tensor], Tensor]
    down: Product


class GPT2Decoder:
    """Reads tokens and returns the logits of the next ones.

    With fp32 weights and without `copies`, the model's own tensors are used: the decoder is made at once, and follows
    the weights while they are trained. Otherwise it holds copies. Sums of the layers and layer norms stay in the
    model's own format.

    Args:
        model: on any device; its dropout is not applied.
        weights: the format of the matrices.
        copies: with fp32 on a CPU, copy matrices into the layouts that are faster for few rows: the output matrix, or
            all of them where several threads compute.

    Attributes:
        positions: the most tokens of a text.
        vocabulary: the number of tokens.
        device: where it computes.
        bytes_per_token: what it reads from memory for one token: every matrix once; keys and values do not count.
    """

    def __init__(self, model: GPT2LMHeadModel, weights: DecodingWeights = "fp32", *, copies: bool = False) -> None:
        transformer, head = model.transformer, model.lm_head.weight
        self.positions, self.vocabulary = int(model.config.n_positions), int(model.config.vocab_size)
        self.device: torch.device = head.device
        self._embeddings: Tensor = transformer.wte.weight
        self._places: Tensor = transformer.wpe.weight
        self._dtype = head.dtype if weights == "fp32" else torch.bfloat16
        matrices: list[Matrix] = []
        layout = _layout(model) if copies else "in place"

        def product(weight: Tensor, bias: Tensor | None, *, transposed: bool = False) -> Product:
            matrices.append(Matrix(weight, bias, weights, layout, transposed=transposed))
            return matrices[-1].product

        self._layers = [self._layer(block, product, _activation(model, block)) for block in transformer.h]
        self._last_norm = self._norm(transformer.ln_f)
        if weights != "fp32":  # logits share a large offset, at which bfloat16 is coarse; the softmax needs none
            self._head = product(head - head.mean(0), None, transposed=True)
        else:
            self._head = product(head, None, transposed=True)
        self.bytes_per_token = sum(matrix.bytes for matrix in matrices)

    def _layer(
        self, block: GPT2Block, product: Callable[[Tensor, Tensor], Product], activation: Callable[[Tensor], Tensor]
    ) -> _Layer:
        attention, mlp = block.attn, block.mlp
        parts = (attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj)
        qkv, mix, up, down = (product(part.weight, part.bias) for part in parts)
        heads = int(attention.num_heads)
        width = attention.c_attn.weight.shape[1] // 3 // heads
        return _Layer(
            self._norm(block.ln_1), qkv, heads, width, float(attention.scaling), mix,
            self._norm(block.ln_2), up, activation, down,
        )  # fmt: skip

    def _norm(self, norm: nn.LayerNorm) -> Product:
        """Return a layer norm, as a function that returns the format of the products."""
        shape, gain, bias, eps, dtype = norm.normalized_shape, norm.weight, norm.bias, norm.eps, self._dtype
        if gain.dtype == dtype:
            return lambda x: torch.layer_norm(x, shape, gain, bias, eps, False)
        return lambda x: torch.layer_norm(x, shape, gain, bias, eps, False).to(dtype)

    def cache(self, rows: int, columns: int, pads: Tensor | None = None) -> Cache:
        """Return an empty cache for `rows` texts of up to `columns` tokens each.

        Args:
            pads: (B,), how many tokens at the beginning of each text only fill it up; None if there are none.
        """
        shapes = [(2, rows, layer.heads, columns, layer.width) for layer in self._layers]
        return Cache([torch.empty(shape, dtype=self._dtype, device=self.device) for shape in shapes], pads)

    def read(self, cache: Cache, tokens: Tensor, *, every: bool = False) -> Tensor:
        """Read the next tokens of each text, and return the logits of the tokens after them.

        Args:
            cache: it is extended by the tokens.
            tokens: (B, T), int64.
            every: whether to return the logits after each of the tokens.

        Returns:
            (B, V), or (B, T, V) with `every`.
        """
        rows, count = tokens.shape
        start, stop = cache.length, cache.length + count
        x = (torch.embedding(self._embeddings, tokens) + self._positions(cache, start, stop)).view(rows * count, -1)
        mask = _mask(cache, start, stop)
        causal = mask is None and count > 1
        for layer, kept in zip(self._layers, cache.layers, strict=True):
            qkv = layer.qkv(layer.before_attention(x)).view(rows, count, 3, layer.heads, layer.width)
            query, new = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1:].permute(2, 0, 3, 1, 4)
            kept[:, :, :, start:stop] = new
            keys, values = kept[:, :, :, :stop]
            mixed = F.scaled_dot_product_attention(query, keys, values, mask, 0.0, causal, scale=layer.scale)
            x = x + layer.mix(mixed.transpose(1, 2).reshape(rows * count, -1))
            x = x + layer.down(layer.activation(layer.up(layer.before_mlp(x))))
        cache.length = stop
        if not every:
            return self._head(self._last_norm(x.view(rows, count, -1)[:, -1]))
        return self._head(self._last_norm(x)).view(rows, count, -1)

    def _positions(self, cache: Cache, start: int, stop: int) -> Tensor:
        """Return the embeddings of the positions from `start` to `stop`: (T, D), or (B, T, D) if texts are padded."""
        if cache.pads is None:
            return self._places[start:stop]
        columns = torch.arange(start, stop, device=self.device)
        return torch.embedding(self._places, (columns - cache.pads[:, None]).clamp_min_(0))


def _layout(model: GPT2LMHeadModel) -> Layout:
    """Return the layout of float32 matrices that is the fastest where a model decodes one text."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return "in place"
    several = on_several_threads(2.0 * count_parameters(model))
    known = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return "packed" if several and known else "transposed head"


def _mask(cache: Cache, start: int, stop: int) -> Tensor | None:
    """Return which tokens each of the tokens from `start` to `stop` attends to, where that is not all or causal.

    Returns:
        (T, stop), or (B, 1, T, stop) if texts are padded; None if one token attends to all of them, or if the tokens
        are the first ones.
    """
    if cache.pads is None and (start == 0 or stop - start == 1):
        return None
    columns = torch.arange(stop, device=cache.layers[0].device)
    queries = columns[start:, None]
    causal = columns <= queries
    if cache.pads is None:
        return causal
    real = columns >= cache.pads[:, None, None, None]
    return (causal & real) | (columns == queries)  # what only fills up attends to itself, so that nothing becomes NaN


_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # names of the tanh GELU in configurations


def _activation(model: GPT2LMHeadModel, block: GPT2Block) -> Callable[[Tensor], Tensor]:
    """Return the tanh GELU as torch's one kernel, and any other activation as it is."""
    if model.config.activation_function in _TANH:
        return lambda x: F.gelu(x, approximate="tanh")
    activation: Callable[[Tensor], Tensor] = block.mlp.act
    return activation
