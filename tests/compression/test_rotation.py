"""Rotated streams: exact at full width, and otherwise what a naive float64 model with projected streams computes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config, GPT2LMHeadModel

from tinygpt2.compression.cut import KeptParts, cut_model
from tinygpt2.compression.rotation import Rotation, _last_gain, complement, principal_rotation, stream_moments

WIDTH, HEADS, LAYERS, VOCABULARY = 24, 3, 3, 50
IDS = torch.randint(0, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(1))


def lively(*, tied: bool = True) -> GPT2LMHeadModel:
    """A GPT-2 in float64 whose norms have gains and biases, and whose projections have biases."""
    torch.manual_seed(0)
    shape = {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": 12, "vocab_size": VOCABULARY}
    model = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3, tie_word_embeddings=tied)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            assert name
    return model


def rotation_of(model: GPT2LMHeadModel, width: int, *, tied: bool, layers: tuple[int, ...] = (0, 1, 2)) -> Rotation:
    return principal_rotation(model, stream_moments(model, [IDS], tied=tied), layers, width, tied=tied)


def student_of(model: GPT2LMHeadModel, rotation: Rotation, layers: tuple[int, ...] = (0, 1, 2)) -> GPT2LMHeadModel:
    whole = [torch.arange(HEADS)] * len(layers), [torch.arange(4 * WIDTH)] * len(layers)
    return cut_model(model, KeptParts(list(layers), rotation, *whole, (12, "first"), untied=not rotation.tied))


def test_a_complement_is_orthonormal_and_orthogonal_to_ones() -> None:
    for size in (2, 7, 64):
        basis = complement(size)
        torch.testing.assert_close(basis.T @ basis, torch.eye(size - 1, dtype=torch.float64))
        assert float(basis.sum(0).abs().max()) < 1e-12


@pytest.mark.parametrize("teacher_tied", [True, False])
def test_full_width_with_an_output_matrix_of_its_own_is_exact(teacher_tied: bool) -> None:
    model = lively(tied=teacher_tied)
    student = student_of(model, rotation_of(model, WIDTH, tied=False)).double()
    assert student.lm_head.weight is not student.transformer.wte.weight
    assert not torch.allclose(student.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)
    with torch.no_grad():
        # the student was made in float32
        assert float((student(IDS).logits - model(IDS).logits).abs().max()) < 1e-4


def test_full_width_with_a_tied_head_is_close() -> None:
    model = lively()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1.3)  # a gain that is the same everywhere commutes with any rotation
    student = student_of(model, rotation_of(model, WIDTH, tied=True)).double()
    assert student.lm_head.weight is student.transformer.wte.weight
    with torch.no_grad():
        got, expected = (one(IDS).logits.log_softmax(-1) for one in (student, model))
    assert float((got - expected).abs().max()) < 0.05 * float(expected.std())


def naive_logits(model: GPT2LMHeadModel, rotation: Rotation, layers: tuple[int, ...]) -> torch.Tensor:
    """The teacher's logits if its stream is projected and its norms divide by what is left, in its own coordinates."""
    kept = rotation.kept
    project = kept @ kept.T
    moments = rotation.moments.norms
    transformer = model.transformer

    def normed(x: torch.Tensor, norm: torch.nn.LayerNorm, number: int) -> torch.Tensor:
        width = len(rotation.basis)
        deviation = (x.pow(2).sum(-1, keepdim=True) / width + norm.eps).sqrt()
        share = (project @ moments[number]).trace() / moments[number].trace()
        return x / deviation * math.sqrt(share * WIDTH / width) * norm.weight + norm.bias

    x = (transformer.wte(IDS) + transformer.wpe(torch.arange(12))) @ project
    for layer in layers:
        block = transformer.h[layer]
        fused = normed(x, block.ln_1, 2 * layer) @ block.attn.c_attn.weight + block.attn.c_attn.bias
        q, k, v = (part.view(6, 12, HEADS, -1).transpose(1, 2) for part in fused.chunk(3, -1))
        scores = (q @ k.mT / math.sqrt(WIDTH // HEADS)).masked_fill(~torch.ones(12, 12).tril().bool(), -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + (mixed @ block.attn.c_proj.weight + block.attn.c_proj.bias) @ project
        inner = F.gelu(
            normed(x, block.ln_2, 2 * layer + 1) @ block.mlp.c_fc.weight + block.mlp.c_fc.bias, approximate="tanh"
        )
        x = x + (inner @ block.mlp.c_proj.weight + block.mlp.c_proj.bias) @ project
    return normed(x, transformer.ln_f, -1) @ model.lm_head.weight.T


@pytest.mark.parametrize(("width", "layers"), [(12, (0, 1, 2)), (18, (0, 2))])
@torch.no_grad()
def test_a_narrow_student_is_the_teacher_with_a_projected_stream(width: int, layers: tuple[int, ...]) -> None:
    model = lively()
    rotation = rotation_of(model, width, tied=False, layers=layers)
    # heads are not cut here, so the student is run as a model whose heads are wider than its stream
    student = _run_wide(student_weights(model, rotation), layers)
    torch.testing.assert_close(student, naive_logits(model, rotation, layers), rtol=1e-6, atol=1e-6)


def student_weights(model: GPT2LMHeadModel, rotation: Rotation) -> dict[str, torch.Tensor]:
    from tinygpt2.compression.rotation import rotated_weights

    return rotated_weights(model, rotation)


def _run_wide(w: dict[str, torch.Tensor], layers: tuple[int, ...]) -> torch.Tensor:
    """Run weights whose stream is narrower than their heads, with torch's own layer norm."""
    x = w["transformer.wte.weight"][IDS] + w["transformer.wpe.weight"][:12]

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"].double(), w[f"{name}.bias"].double())

    for layer in layers:
        at = f"transformer.h.{layer}"
        fused = normed(x, f"{at}.ln_1") @ w[f"{at}.attn.c_attn.weight"] + w[f"{at}.attn.c_attn.bias"]
        q, k, v = (part.view(6, 12, HEADS, -1).transpose(1, 2) for part in fused.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + mixed @ w[f"{at}.attn.c_proj.weight"] + w[f"{at}.attn.c_proj.bias"]
        inner = normed(x, f"{at}.ln_2") @ w[f"{at}.mlp.c_fc.weight"] + w[f"{at}.mlp.c_fc.bias"]
        x = x + F.gelu(inner, approximate="tanh") @ w[f"{at}.mlp.c_proj.weight"] + w[f"{at}.mlp.c_proj.bias"]
    return normed(x, "transformer.ln_f") @ w["lm_head.weight"].T


@torch.no_grad()
def test_moments_are_those_of_the_norms_outputs() -> None:
    model = lively()
    states: list[torch.Tensor] = []
    norms = [norm for block in model.transformer.h for norm in (block.ln_1, block.ln_2)] + [model.transformer.ln_f]
    for norm in norms:
        norm.register_forward_hook(lambda module, _, y: states.append((y - module.bias) / module.weight))
    probabilities = model(IDS).logits.softmax(-1).mean((0, 1))
    expected = [x.flatten(0, 1).T @ x.flatten(0, 1) / IDS.numel() for x in states]
    found = stream_moments(lively(), [IDS[:4], IDS[4:]], tied=True)
    torch.testing.assert_close(found.norms, expected)
    torch.testing.assert_close(found.tokens, probabilities)


def test_no_other_directions_hold_more_variance() -> None:
    model = lively()
    rotation = rotation_of(model, 12, tied=True)
    total = torch.stack(rotation.moments.norms).sum(0)
    held = float((rotation.kept.T @ total @ rotation.kept).trace())
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        nearby = rotation.kept + 0.05 * torch.randn(rotation.kept.shape, generator=generator, dtype=torch.float64)
        other = torch.linalg.qr(nearby - nearby.mean(0)).Q
        assert float((other.T @ total @ other).trace()) < held


def test_the_last_norms_gain_is_the_best_by_least_squares() -> None:
    model = lively()
    rotation = rotation_of(model, 10, tied=True)
    table = torch.randn(VOCABULARY, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    target = torch.randn(VOCABULARY, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    p = rotation.moments.tokens / rotation.moments.tokens.sum()
    moment = rotation.encode.T @ rotation.moments.norms[-1] @ rotation.encode / rotation.scale(-1) ** 2
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp_min(0).sqrt()
    # one equation for each token and direction: sqrt(p) (g t - y) root = 0, in plain matrices
    t, y = (rows - (p[:, None] * rows).sum(0) for rows in (table, target))
    left = torch.stack([math.sqrt(p[n]) * (torch.diag(t[n]) @ root).T for n in range(VOCABULARY)]).flatten(0, 1)
    right = torch.stack([math.sqrt(p[n]) * (y[n] @ root) for n in range(VOCABULARY)]).flatten()
    expected = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    torch.testing.assert_close(_last_gain(rotation, table, target), expected, rtol=1e-4, atol=1e-5)
