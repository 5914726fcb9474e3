"""The captured forward pass: transformers' own numbers, as deep as needed, compiled and checkpointed."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import make_model
from tinygpt2.config.distillation import DistillConfig
from tinygpt2.config.training import PretrainConfig
from tinygpt2.models import activations
from tinygpt2.models.activations import collect_activations
from tinygpt2.models.loading import load_model, random_model
from tinygpt2.models.parameters import cast_linear_layers, set_dropout
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.training.metrics import read_metrics
from tinygpt2.training.step import Step

T, V = 150, 60  # more than one block of query rows, and no multiple of it


def ids(length: int = T) -> torch.Tensor:
    return torch.randint(0, V, (2, length), generator=torch.Generator().manual_seed(3))


def small(layers: int, seed: int, **options: object) -> GPT2LMHeadModel:
    config = GPT2Config(n_layer=layers, n_embd=16, n_head=2, n_positions=T, vocab_size=V, **options)
    return random_model(config, seed).eval()


def run(**options: object) -> PretrainConfig:
    return PretrainConfig(data="", out="", shape="gpt2", **options)


@pytest.mark.parametrize("by_depth", [False, True])
def test_states_and_attention_are_transformers_own(by_depth: bool) -> None:
    model = small(4, 1, scale_attn_by_inverse_layer_idx=by_depth)
    with torch.no_grad():
        got = collect_activations(model, ids(), states=range(5), attention=[2, 4])
        plain = model.transformer(ids(), output_hidden_states=True)
    assert sorted(got.states) == [0, 1, 2, 3, 4]
    for number, state in enumerate(plain.hidden_states):
        torch.testing.assert_close(got.states[number], state)
    assert sorted(got.attention) == [2, 4]
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attentions = eager(ids(), output_attentions=True).attentions
    query, key, _ = (part.view(2, T, 2, 8).transpose(1, 2) for part in got.attention[4].chunk(3, -1))
    scores = query @ key.mT * got.scale[4]
    masked = scores.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
    torch.testing.assert_close(masked.softmax(-1), attentions[3], rtol=1e-4, atol=1e-6)


def test_an_untied_head_and_published_activations(shared_data: Path) -> None:
    folder = shared_data / "models" / "gpt-nano-sort"
    model, _ = load_model(str(folder))
    reference = json.loads((folder / "reference.json").read_text())
    with torch.no_grad():
        found = collect_activations(model, torch.tensor(reference["idx"]).view(3, -1), states=[0, 1, 2, 3])
        logits = found.states[3] @ model.lm_head.weight.T
    stages = {"x": found.states[0], "block0": found.states[1], "block1": found.states[2], "ln_f": found.states[3]}
    for name, ours in {**stages, "lm_head": logits}.items():
        torch.testing.assert_close(ours.flatten(), torch.tensor(reference[name]).flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("weights", "states", "attention", "layers_run"),
    [
        (LossWeights(attention=1.0, layer_map="2,4"), [], [2, 4], 4),
        (LossWeights(hidden=1.0, hidden_map="0"), [0], [], 0),
        (LossWeights(hidden=1.0, hidden_map="inner"), [0, 3], [], 3),
        (LossWeights(prediction=1.0), [6], [], 6),
    ],
)
def test_the_teacher_runs_only_the_layers_that_are_needed(
    weights: LossWeights, states: list[int], attention: list[int], layers_run: int
) -> None:
    teacher, seen = small(6, 1), []
    for number, block in enumerate(teacher.transformer.h, 1):
        block.mlp.register_forward_hook(lambda *_, number=number: seen.append(number))
    step = Step(small(2, 2), teacher, weights, run())
    assert (step.objectives.teacher_states, step.objectives.teacher_attention) == (states, attention)
    step(ids())
    assert seen == list(range(1, layers_run + 1))


def test_bfloat16_teacher_attends_like_torch() -> None:
    teacher = small(3, 1, initializer_range=0.2)
    exact = collect_activations(teacher, ids(), states=[3]).states[3].detach()
    teacher.bfloat16()
    with torch.no_grad():
        ours = collect_activations(teacher, ids(), states=[3]).states[3].float()
    torchs = (
        collect_activations(teacher, ids(), states=[3]).states[3].detach().float()
    )  # with gradients: torch's own kernel
    assert float((ours - exact).norm() / exact.norm()) < 0.02
    assert float((ours - exact).norm()) < 1.2 * float((torchs - exact).norm())


def test_heads_that_are_padded_for_a_kernel_attend_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 26, as in the preset tinygpt2-4l-312: values and gradients in float64, and with checkpoints."""
    config = GPT2Config(
        n_layer=2, n_embd=52, n_head=2, n_positions=T, vocab_size=V, scale_attn_by_inverse_layer_idx=True
    )
    model, widths = random_model(config, 1).eval().double(), []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(activations.F, "scaled_dot_product_attention", lambda query, *rest, **more: (
        widths.append(query.shape[-1]), attention(query, *rest, **more))[1])  # fmt: skip
    assert [activations.kernel_width(width, "cuda") for width in (26, 64, 80)] == [32, 64, 80]
    found = []
    for padded in (False, True):
        if padded:
            monkeypatch.setattr(activations, "kernel_width", lambda width, device: 32)
        for checkpointing in (False, True):
            one = collect_activations(model, ids(), states=[2], attention=[2], checkpointing=checkpointing)
            gradients = torch.autograd.grad(one.states[2].square().sum(), list(model.transformer.parameters()))
            found.append([one.states[2], one.attention[2], *gradients])
    assert set(widths) == {26, 32}
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


def test_linear_layers_cast_once_give_the_same_bits_as_autocast() -> None:
    teacher = small(3, 1, initializer_range=0.2)
    wanted = {"states": range(4), "attention": [1, 2, 3]}
    found = []
    for cast in (False, True):
        if cast:
            cast_linear_layers(teacher.transformer.h, torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            one = collect_activations(teacher, ids(), **wanted)
        found.append([*one.states.values(), *one.attention.values()])
    for ours, reference in zip(found[1], found[0], strict=True):
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, rtol=0, atol=0)
    types = {name.split(".")[-2]: parameter.dtype for name, parameter in teacher.named_parameters()}
    half = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    assert half == {"c_attn", "c_proj", "c_fc"}


ALL = LossWeights(attention=1.0, hidden=1.0, prediction=1.0, ce=1.0, cosine=1.0, relation=1.0)


def gradients(step: Step) -> list[torch.Tensor]:
    torch.manual_seed(5)  # for dropout
    loss, _ = step(ids())
    return [loss.detach(), *torch.autograd.grad(loss, list(step.parameters()))]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(dropout: float) -> None:
    student, teacher = small(2, 2).train(), small(4, 1)
    set_dropout(student, dropout)
    plain = gradients(Step(student, teacher, ALL, run()))
    again = gradients(Step(student, teacher, ALL, run(gradient_checkpointing=True)))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_gradient_checkpointing_keeps_less() -> None:
    def kept(checkpointing: bool) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            collect_activations(small(6, 1), ids(), states=[6], checkpointing=checkpointing)
        return sum(sizes)

    assert kept(True) < kept(False) / 3


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses(tmp_path: Path, data: Path, tokenizer_dir: Path) -> None:
    curves = []
    teacher, student = (make_model(tmp_path / f"{n}", tokenizer_dir, n_layer=n) for n in (2, 1))
    for name, flags in (("plain", []), ("compiled", ["--compile", "--gradient-checkpointing"])):
        config = DistillConfig(
            teacher=str(teacher), student=str(student), data=str(data), out=str(tmp_path / name), recipe="tinygpt2",
            ce_weight=1.0, temperature=2.0, max_steps=4, micro_batch_size=2, log_every=1,
        )  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(config.to_yaml())
        # in its own process: the tests' shape checks cannot be compiled
        command = [sys.executable, "-m", "tinygpt2", "distill", "--config", str(tmp_path / f"{name}.yaml"), *flags]
        subprocess.run(command, check=True, capture_output=True)
        curves.append([row["loss"] for row in read_metrics(tmp_path / name)])
    assert len(curves[0]) == 4
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
