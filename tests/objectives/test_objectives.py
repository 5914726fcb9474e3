"""Every objective against a naive float64 reference that shares no code with the implementation."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.references import naive_relation
from tinygpt2.config.distillation import DistillConfig, PredictionLoss
from tinygpt2.config.training import PretrainConfig
from tinygpt2.errors import ConfigError
from tinygpt2.models.activations import by_head, collect_activations
from tinygpt2.objectives.combined import Objectives
from tinygpt2.objectives.layer_maps import layer_pairs
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.training.step import Step

B, T, V = 2, 21, 50
RUN = PretrainConfig(data="", out="", shape="gpt2")


def gpt2(layers: int, width: int, heads: int, seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, n_positions=T, vocab_size=V, initializer_range=0.3,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def naive_states_and_scores(model: GPT2LMHeadModel, ids: torch.Tensor) -> tuple[list, list, torch.Tensor]:
    """GPT-2 written out in float64: hidden states, full score matrices, logits."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, layers = model.config.n_head, model.config.n_layer

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: ids.shape[1]]
    states, scores = [x], []
    for layer in range(layers):
        p = f"transformer.h.{layer}"
        qkv = norm(x, f"{p}.ln_1") @ w[f"{p}.attn.c_attn.weight"] + w[f"{p}.attn.c_attn.bias"]
        q, k, v = (part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores.append(score)
        causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        mixed = score.masked_fill(~causal, -math.inf).softmax(-1) @ v
        x = x + mixed.transpose(1, 2).flatten(2) @ w[f"{p}.attn.c_proj.weight"] + w[f"{p}.attn.c_proj.bias"]
        inner = norm(x, f"{p}.ln_2") @ w[f"{p}.mlp.c_fc.weight"] + w[f"{p}.mlp.c_fc.bias"]
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + inner @ w[f"{p}.mlp.c_proj.weight"] + w[f"{p}.mlp.c_proj.bias"]
        states.append(x)
    states[-1] = norm(x, "transformer.ln_f")
    return states, scores, states[-1] @ w["lm_head.weight"].T


@torch.no_grad()
def naive_terms(step: Step, teacher: GPT2LMHeadModel, ids: torch.Tensor, weights: LossWeights) -> dict[str, float]:
    s_states, s_scores, s_logits = naive_states_and_scores(step.student, ids)
    t_states, t_scores, t_logits = naive_states_and_scores(teacher, ids)
    layers = [round(i * len(t_scores) / len(s_scores)) for i in range(1, len(s_scores) + 1)]
    attention = 0.0
    for i, j in enumerate(layers):
        total, count = 0.0, 0
        for row in range(T):
            for column in range(row + 1):
                gap = s_scores[i][:, :, row, column] - t_scores[j - 1][:, :, row, column]
                total += float((gap**2).sum())
                count += gap.numel()
        attention += total / count
    hidden = 0.0
    for i, j in zip(range(len(layers) + 1), [0, *layers], strict=True):
        mapped = s_states[i]
        if isinstance(step.objectives.projection, nn.Linear):
            mapped = mapped @ step.objectives.projection.weight.double().T + step.objectives.projection.bias.double()
        loss = ((mapped - t_states[j]) ** 2).mean()
        if weights.hidden_scale == "variance":
            loss = loss / ((t_states[j] - t_states[j].mean()) ** 2).mean()
        hidden += float(loss)
    tau = weights.temperature
    p = torch.exp(t_logits / tau) / torch.exp(t_logits / tau).sum(-1, keepdim=True)
    q = torch.exp(s_logits / tau) / torch.exp(s_logits / tau).sum(-1, keepdim=True)
    m = (p + q) / 2
    per_token = {
        "soft_ce": -(p * q.log()).sum(-1),
        "forward_kl": (p * (p.log() - q.log())).sum(-1),
        "reverse_kl": (q * (q.log() - p.log())).sum(-1),
        "jsd": (p * (p.log() - m.log())).sum(-1) / 2 + (q * (q.log() - m.log())).sum(-1) / 2,
        "skewed_forward_kl": (p * (p.log() - (0.1 * p + 0.9 * q).log())).sum(-1),
        "skewed_reverse_kl": (q * (q.log() - (0.9 * p + 0.1 * q).log())).sum(-1),
        "total_variation": (p - q).abs().sum(-1) / 2,
    }[weights.loss]
    picked = [-float(torch.log_softmax(s_logits[b, t], -1)[ids[b, t + 1]]) for b in range(B) for t in range(T - 1)]
    terms = {
        "attention": attention,
        "hidden": hidden,
        "prediction": float(per_token.mean()) * tau**2,
        "ce": sum(picked) / len(picked),
    }
    if s_states[-1].shape == t_states[-1].shape:
        a, b = s_states[-1], t_states[-1]
        terms["cosine"] = float((1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())
    return terms


@pytest.mark.parametrize("loss", get_args(PredictionLoss))
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("scale", ["none", "variance"])
def test_one_step_equals_the_naive_reference(loss: str, temperature: float, scale: str) -> None:
    weights = LossWeights(1.0, 0.7, 1.3, 0.5, hidden_scale=scale, loss=loss, temperature=temperature)
    teacher = gpt2(4, 24, 4, seed=1)
    step = Step(gpt2(2, 16, 4, seed=2), teacher, weights, RUN)
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    total, terms = step(ids)
    expected = naive_terms(step, teacher, ids, weights)
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-5), name
    weighted = (
        1.0 * expected["attention"] + 0.7 * expected["hidden"] + 1.3 * expected["prediction"] + 0.5 * expected["ce"]
    )
    assert total.item() == pytest.approx(weighted, rel=1e-5)


def test_cosine_and_equal_widths_equal_the_naive_reference() -> None:
    weights = LossWeights(attention=1.0, hidden=1.0, prediction=1.0, ce=1.0, cosine=1.0)
    teacher = gpt2(3, 24, 4, seed=1)
    step = Step(gpt2(2, 24, 4, seed=2), teacher, weights, RUN)
    assert isinstance(step.objectives.projection, nn.Identity)
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    _, terms = step(ids)
    expected = naive_terms(step, teacher, ids, weights)
    assert set(terms) == {"attention", "hidden", "prediction", "ce", "cosine"}
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-5), name


def plain_autograd_total(step: Step, teacher: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """The weighted sum by plain autograd on full matrices, for gradients."""
    weights, student = step.objectives.weights, step.student
    q_and_k = {}
    hooks = []
    for name, model in (("s", student), ("t", teacher)):
        for index, block in enumerate(model.transformer.h):

            def keep(_m, _i, out, key=(name, index)):
                q_and_k[key] = out

            hooks.append(block.attn.c_attn.register_forward_hook(keep))
    s = student(ids, output_hidden_states=True)
    with torch.no_grad():
        t = teacher(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    layers = [j for _, j in layer_pairs("uniform", student.config.n_layer, teacher.config.n_layer)]
    mask = torch.ones(T, T).tril().bool()
    total = torch.zeros((), dtype=torch.float64)

    def scores(key: tuple[str, int]) -> torch.Tensor:
        q, k, _ = (x.view(B, T, 4, -1).transpose(1, 2) for x in q_and_k[key].chunk(3, -1))
        return (q @ k.mT / math.sqrt(q.shape[-1]))[:, :, mask]

    for i, j in enumerate(layers):
        total = total + weights.attention * ((scores(("s", i)) - scores(("t", j - 1))) ** 2).mean()
    for i, j in zip(range(len(layers) + 1), [0, *layers], strict=True):
        gap = step.objectives.projection(s.hidden_states[i]) - t.hidden_states[j]
        total = total + weights.hidden * (gap**2).mean()
    tau = weights.temperature
    log_q, p = (s.logits / tau).log_softmax(-1), (t.logits / tau).softmax(-1)
    total = total + weights.prediction * tau**2 * (p * (p.log() - log_q)).sum(-1).mean()
    ce = nn.functional.cross_entropy(s.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return total + weights.ce * ce


def test_gradients_equal_plain_autograd_in_float64() -> None:
    teacher = gpt2(4, 24, 4, seed=1).double()
    step = Step(gpt2(2, 16, 4, seed=2).double(), teacher, LossWeights(0.9, 0.7, 1.3, 0.5, temperature=2.0), RUN)
    step.double()
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    ours, _ = step(ids)
    mine = torch.autograd.grad(ours, list(step.parameters()))
    theirs = torch.autograd.grad(plain_autograd_total(step, teacher, ids), list(step.parameters()))
    for (name, _), a, b in zip(step.named_parameters(), mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)


def test_every_objective_is_zero_or_entropy_when_student_is_teacher() -> None:
    teacher = gpt2(3, 16, 4, seed=1)
    step = Step(copy.deepcopy(teacher), teacher, LossWeights(1.0, 1.0, 1.0, 0.0, 1.0, 1.0), RUN)
    total, terms = step(torch.arange(B * T).view(B, T) % V)
    assert float(total.detach()) == pytest.approx(0, abs=1e-5)
    assert {name: pytest.approx(0, abs=1e-5) for name in terms} == {name: float(x) for name, x in terms.items()}


def test_shapes_that_do_not_compare_are_refused() -> None:
    narrow, wide = gpt2(2, 16, 2, 0).config, gpt2(2, 24, 4, 0).config
    with pytest.raises(ConfigError, match="2 heads"):
        Objectives(LossWeights(attention=1.0), narrow, wide)
    with pytest.raises(ConfigError, match="equal hidden sizes"):
        Objectives(LossWeights(cosine=1.0), narrow, wide)
    with pytest.raises(ConfigError, match="groups of equal size"):
        Objectives(LossWeights(attention=1.0, head_map="average"), wide, gpt2(2, 18, 6, 0).config)
    with pytest.raises(ConfigError, match="do not divide the teacher's 18"):
        Objectives(LossWeights(relation=1.0), wide, gpt2(2, 18, 6, 0).config)


def test_averaged_heads_equal_the_mean_of_full_score_matrices() -> None:
    teacher = gpt2(4, 24, 6, seed=1)
    step = Step(gpt2(2, 16, 2, seed=2), teacher, LossWeights(attention=1.0, ce=0.0, head_map="average"), RUN)
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    _, s_scores, _ = naive_states_and_scores(step.student, ids)
    _, t_scores, _ = naive_states_and_scores(teacher, ids)
    mask = torch.ones(T, T).tril().bool()
    expected = 0.0
    for i, j in ((0, 1), (1, 3)):
        grouped = torch.stack([t_scores[j][:, :3].mean(1), t_scores[j][:, 3:].mean(1)], dim=1)
        expected += float(((s_scores[i] - grouped)[:, :, mask] ** 2).mean())
    _, terms = step(ids)
    assert terms["attention"].item() == pytest.approx(expected, rel=1e-5)


def test_the_relation_term_compares_the_last_layers_queries_keys_and_values() -> None:
    teacher = gpt2(4, 24, 6, seed=1)
    step = Step(gpt2(2, 16, 4, seed=2), teacher, LossWeights(relation=1.0, ce=0.0, layer_map="1,3"), RUN)
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    total, terms = step(ids)
    expected = 0.0
    for mine, theirs in zip(
        collect_activations(step.student, ids, attention=[2]).attention[2].double().chunk(3, -1),
        collect_activations(teacher, ids, attention=[3]).attention[3].double().chunk(3, -1),
        strict=True,
    ):
        expected += float(naive_relation(by_head(mine, 4), by_head(theirs, 4)).detach())
    assert terms["relation"].item() == pytest.approx(expected, rel=1e-5)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert step.objectives.teacher_attention == [3]
    assert step.objectives.teacher_states == []


@pytest.mark.parametrize(
    ("rule", "pairs"), [("all", [(0, 0), (1, 2), (2, 4)]), ("inner", [(0, 0), (1, 2)]), ("0,1=3", [(0, 0), (1, 3)])]
)
def test_the_hidden_map_chooses_the_states(rule: str, pairs: list[tuple[int, int]]) -> None:
    teacher = gpt2(4, 16, 4, seed=1)
    step = Step(gpt2(2, 16, 4, seed=2), teacher, LossWeights(hidden=1.0, ce=0.0, hidden_map=rule), RUN)
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    mine, _, _ = naive_states_and_scores(step.student, ids)
    theirs, _, _ = naive_states_and_scores(teacher, ids)
    _, terms = step(ids)
    expected = sum(float(((mine[i] - theirs[j]) ** 2).mean()) for i, j in pairs)
    assert terms["hidden"].item() == pytest.approx(expected, rel=1e-5)


def test_the_teacher_is_not_part_of_the_module() -> None:
    teacher = gpt2(2, 16, 2, 0)
    step = Step(gpt2(1, 16, 2, 1), teacher, LossWeights(prediction=1.0), RUN)
    assert not set(map(id, teacher.parameters())) & set(map(id, step.parameters()))
    step(torch.zeros(B, T, dtype=torch.long))[0].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_weights_come_from_the_recipe(tmp_path: Path) -> None:
    config = DistillConfig(recipe="tinygpt2", teacher="t", student="s", data="d", out=str(tmp_path))
    weights = LossWeights.of(config)
    assert (weights.attention, weights.hidden, weights.prediction, weights.ce, weights.loss) == (1, 1, 1, 0, "soft_ce")


@pytest.mark.parametrize("batch", [1, 2])
def test_inner_objectives_have_exact_gradients_and_reach_only_what_they_compare(batch: int) -> None:
    teacher, student = gpt2(4, 24, 6, seed=1).double(), gpt2(2, 16, 2, seed=2).double()
    weights = LossWeights(attention=1.0, relation=0.5, ce=0.0, head_map="average")
    step = Step(student, teacher, weights, RUN)
    ids = torch.randint(0, V, (batch, T), generator=torch.Generator().manual_seed(3))
    names, parameters = zip(*step.named_parameters(), strict=True)
    mine = torch.autograd.grad(step(ids)[0], parameters, allow_unused=True)
    total, fused = torch.zeros((), dtype=torch.float64), {}
    for key, model in (("s", student), ("t", teacher)):
        for layer, block in enumerate(model.transformer.h, 1):
            block.attn.c_attn.register_forward_hook(lambda _m, _i, out, at=(key, layer): fused.update({at: out}))
    student(ids), teacher(ids)
    for i, j in ((1, 2), (2, 4)):
        q, k, v = (x.view(batch, T, 2, 8).transpose(1, 2) for x in fused["s", i].chunk(3, -1))
        tq, tk, tv = (x.detach().view(batch, T, 6, 4).transpose(1, 2) for x in fused["t", j].chunk(3, -1))
        grouped = (tq @ tk.mT / 2).unflatten(1, (2, 3)).mean(2)  # heads in two groups of three
        gap = (q @ k.mT / math.sqrt(8) - grouped)[:, :, torch.ones(T, T).tril().bool()]
        total = total + (gap**2).mean()
        if i == 2:
            wide = (x.transpose(1, 2).flatten(2).view(batch, T, 2, 12).transpose(1, 2) for x in (tq, tk, tv))
            total = total + 0.5 * sum(naive_relation(a, b) for a, b in zip((q, k, v), wide, strict=True))
    theirs = torch.autograd.grad(total, parameters, allow_unused=True)
    for name, a, b in zip(names, mine, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)
    assert mine[names.index("student.transformer.h.1.mlp.c_fc.weight")] is None


def test_a_frozen_output_matrix_changes_no_other_gradient() -> None:
    teacher, gradients = gpt2(3, 24, 4, seed=1), []
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    for frozen in (False, True):
        step = Step(gpt2(2, 16, 4, seed=2), teacher, LossWeights(prediction=1.0, ce=0.5), RUN)
        step.student.transformer.wte.weight.requires_grad_(not frozen)
        step(ids)[0].backward()
        gradients.append({name: p.grad for name, p in step.named_parameters()})
    assert gradients[1].pop("student.transformer.wte.weight") is None
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name])


def test_a_bfloat16_teacher_of_a_float32_student_changes_little() -> None:
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        weights = LossWeights(1.0, 1.0, 1.0, 0.0, relation=1.0)
        step = Step(gpt2(2, 16, 4, seed=2), gpt2(4, 24, 4, seed=1).to(dtype), weights, RUN)
        loss, terms = step(ids)
        loss.backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in step.parameters())
        found.append({name: float(term) for name, term in terms.items()})
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert found[1] != found[0]


def test_nothing_left_to_train_is_said() -> None:
    step = Step(gpt2(2, 16, 4, seed=2), gpt2(2, 16, 4, seed=1), LossWeights(hidden=1.0, ce=0.0, hidden_map="0"), RUN)
    step.student.transformer.wte.requires_grad_(False)
    step.student.transformer.wpe.requires_grad_(False)
    with pytest.raises(ConfigError, match="no objective depends on a trainable parameter"):
        step(torch.zeros(B, T, dtype=torch.long))
