"""Teachers of other architectures, with random weights: what `distill` learns from them, in a naive float64 writing.

The reference takes the model's own full logits and `transformers`' own hidden states.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tinygpt2.config.training import PretrainConfig
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.models.teachers.causal import CausalTeacher
from tinygpt2.models.teachers.loading import as_teacher
from tinygpt2.models.teachers.vocabularies import Reading
from tinygpt2.objectives.combined import Objectives
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.training.step import Step, TeacherEvaluation

B, T, V = 2, 24, 997
RUN = PretrainConfig(data="", out="", shape="gpt2", logit_chunk=7)
IDS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))

NARROW = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": V, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NEO = {
    "hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48, "vocab_size": V, "window_size": 5,
    "attention_types": [[["global", "local", "global"], 1]], "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": V,
    "max_position_embeddings": 64, "init_std": 0.3, "word_embed_proj_dim": 32,
}  # fmt: skip

MODELS = {
    "GPT-Neo": lambda: GPTNeoForCausalLM(GPTNeoConfig(**NEO)),
    "OPT": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "OPT of another last width": lambda: OPTForCausalLM(
        OPTConfig(**OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False})
    ),
    "GPT-NeoX": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NARROW)),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**NARROW)),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**NARROW)),
    "Gemma2": lambda: Gemma2ForCausalLM._from_config(
        Gemma2Config(**NARROW, head_dim=8, sliding_window=5, final_logit_softcapping=2.0, attn_logit_softcapping=3.0),
        attn_implementation="eager",
    ),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**NARROW, sliding_window=5)),
    "Phi": lambda: PhiForCausalLM(PhiConfig(**NARROW)),
    "Cohere": lambda: CohereForCausalLM(CohereConfig(**NARROW, logit_scale=0.5)),
    "Granite": lambda: GraniteForCausalLM(GraniteConfig(**NARROW, logits_scaling=4.0)),
}


def teacher_of(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # biases and norms that are not 0 and 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def student_of(width: int = 24, vocabulary: int = V) -> GPT2LMHeadModel:
    torch.manual_seed(2)
    config = GPT2Config(
        n_layer=2, n_embd=width, n_head=4, n_positions=64, vocab_size=vocabulary, initializer_range=0.3,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def naive_kl(student: Tensor, teacher: Tensor) -> float:
    """The mean over positions of KL(teacher || student), written out in float64 over whole logits."""
    total = 0.0
    for s, t in zip(student.double().flatten(0, 1), teacher.double().flatten(0, 1), strict=True):
        p, q = (x - math.log(float(x.exp().sum())) for x in (t, s))
        total += float((p.exp() * (p - q)).sum())
    return total / student.shape[:2].numel()


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of values that an operation returned in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self.values = max(self.values, one.numel())
        return out


@pytest.fixture(params=MODELS)
def teacher(request: pytest.FixtureRequest) -> PreTrainedModel:
    return teacher_of(request.param)


def test_predictions_are_learned_from_the_models_own_logits(teacher: PreTrainedModel) -> None:
    student = student_of()
    step = Step(student, teacher, LossWeights(prediction=1.0, ce=0.0), RUN)
    loss, terms = step(IDS)
    with torch.no_grad():
        expected = naive_kl(student(IDS).logits, teacher(input_ids=IDS).logits)
    assert float(terms["prediction"]) == pytest.approx(expected, rel=1e-5)
    assert terms.keys() == {"prediction"}
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_hidden_states_are_those_of_transformers(teacher: PreTrainedModel) -> None:
    ours = as_teacher(teacher)
    with torch.no_grad():
        own = teacher(input_ids=IDS, output_hidden_states=True).hidden_states
        found = ours.collect(IDS, range(len(own))).states
    assert len(own) == ours.shape.layers + 1
    for number, state in enumerate(own):
        torch.testing.assert_close(found[number], state, rtol=0, atol=0)
    widths = {state.shape[-1] for state in own[:-1]}
    assert widths == {ours.shape.width}
    assert own[-1].shape[-1] == ours.shape.last_width
    assert ours.collect(IDS, [1]).states.keys() == {1}  # only what is asked for is kept


def test_every_hidden_state_is_learned_through_a_map(teacher: PreTrainedModel) -> None:
    student = student_of()
    step = Step(student, teacher, LossWeights(hidden=1.0, ce=0.0, layer_map="1,3"), RUN)
    _, terms = step(IDS)
    with torch.no_grad():
        theirs = teacher(input_ids=IDS, output_hidden_states=True).hidden_states
        mine = student(IDS, output_hidden_states=True).hidden_states
        expected, objectives = 0.0, step.objectives
        for i, j in ((0, 0), (1, 1), (2, 3)):
            last = j == 3 and theirs[3].shape[-1] != theirs[0].shape[-1]
            mapped = (objectives.last_projection if last else objectives.projection)(mine[i])
            expected += float(((mapped - theirs[j]).double() ** 2).mean())
    assert float(terms["hidden"]) == pytest.approx(expected, rel=1e-5)


def test_no_tensor_holds_the_logits_of_all_tokens(teacher: PreTrainedModel) -> None:
    ids = torch.randint(0, V, (4, 64))
    step = Step(student_of(8), as_teacher(teacher), LossWeights(prediction=1.0, ce=1.0), RUN)
    with LargestTensor() as largest:
        step(ids)[0].backward()
    with LargestTensor() as whole, torch.no_grad():
        teacher(input_ids=ids)
    assert whole.values >= 4 * 64 * V
    assert largest.values < whole.values / 3


def test_a_teachers_loss_is_that_of_its_own_logits(teacher: PreTrainedModel) -> None:
    with torch.no_grad():
        logits = teacher(input_ids=IDS).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="none")
    losses, _ = TeacherEvaluation(as_teacher(teacher))(IDS)
    torch.testing.assert_close(losses.flatten().double(), expected, rtol=1e-5, atol=1e-5)


def test_attention_is_compared_with_a_gpt2_only() -> None:
    shape = as_teacher(teacher_of("Llama")).shape
    for weights, option in (
        (LossWeights(attention=1.0), "--attention-weight"),
        (LossWeights(relation=1.0), "--relation"),
    ):
        with pytest.raises(ConfigError, match=f"{option}.* is a LlamaForCausalLM"):
            Objectives(weights, student_of().config, shape)
    with pytest.raises(ConfigError, match="the teacher 16"):
        Objectives(
            LossWeights(cosine=1.0), student_of(32).config, as_teacher(teacher_of("OPT of another last width")).shape
        )
    with pytest.raises(ConfigError, match="layers 1 to 3"):
        Objectives(LossWeights(hidden=1.0, layer_map="1,4"), student_of().config, shape)


def test_cosine_needs_the_width_of_the_last_state() -> None:
    teacher = teacher_of("OPT of another last width")
    student = student_of(16)
    _, terms = Step(student, teacher, LossWeights(cosine=1.0, ce=0.0), RUN)(IDS)
    with torch.no_grad():
        mine, theirs = (
            model(input_ids=IDS, output_hidden_states=True).hidden_states[-1].double() for model in (student, teacher)
        )
    expected = (1 - torch.nn.functional.cosine_similarity(mine, theirs, dim=-1)).mean()
    assert float(terms["cosine"]) == pytest.approx(float(expected), rel=1e-5)


class Secret(LlamaForCausalLM):
    """A model that does something else to its logits."""

    def forward(self, **kwargs):
        out = super().forward(**kwargs)
        out.logits = out.logits * 1.01
        return out


def test_a_model_whose_logits_are_made_in_another_way_is_refused() -> None:
    with pytest.raises(ModelError, match="a Secret cannot be a teacher: its logits are not its output matrix"):
        CausalTeacher(Secret(LlamaConfig(**NARROW)).eval())


def test_a_model_that_sees_the_tokens_to_come_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**NARROW)).eval()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
        layer.self_attn.forward = _looks_ahead(layer.self_attn.forward)
    with pytest.raises(ModelError, match="it is not causal"):
        CausalTeacher(model)


def _looks_ahead(forward):
    def run(hidden_states, *args, **kwargs):
        out, weights = forward(hidden_states, *args, **kwargs)
        return out + hidden_states.mean(1, keepdim=True), weights

    return run


def test_a_model_with_another_head_is_refused() -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=V, is_decoder=True
    )
    with pytest.raises(ModelError, match="a BertLMHeadModel cannot be a teacher"):
        CausalTeacher(BertLMHeadModel(config).eval())


@pytest.mark.parametrize("name", ["OPT", "Phi", "Gemma2", "Cohere"])
def test_tokens_with_other_numbers_are_mapped_and_others_left_out(name: str) -> None:
    """The student has 900 tokens in another order, of which the teacher lacks two, and the teacher has a start token."""
    teacher = teacher_of(name)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(5))[:900].tolist()
    order[17] = order[899] = -1
    others = sorted(set(range(V)) - set(order))
    reading = Reading(tuple(order), tuple(others), start=4)
    ids = torch.randint(18, 899, (B, T), generator=torch.Generator().manual_seed(7))
    ours, student = as_teacher(teacher), student_of(24, 900)
    ours.read_as(reading)
    step = Step(student, ours, LossWeights(prediction=1.0, ce=0.0), RUN)
    _, terms = step(ids)
    read = torch.cat([torch.full((B, 1), 4), torch.tensor(order)[ids]], 1)
    with torch.no_grad():
        whole, mine = teacher(input_ids=read).logits[:, 1:].double(), student(ids).logits.double()
    probabilities = whole.softmax(-1)
    known = [number for number, row in enumerate(order) if row >= 0]
    kept = probabilities[..., [order[number] for number in known]]
    kept = kept / kept.sum(-1, keepdim=True)
    expected = (kept * (kept.log() - mine.log_softmax(-1)[..., known])).sum(-1).mean()
    assert float(terms["prediction"]) == pytest.approx(float(expected), rel=1e-5)
    left = probabilities[..., others].sum(-1).mean()
    assert float(terms["teacher/left_out"]) == pytest.approx(float(left), rel=1e-5)


@pytest.mark.parametrize("lengths", [None, [T, 9]])
def test_without_a_position_for_the_start_the_last_token_has_no_teacher(lengths: list[int] | None) -> None:
    config = LlamaConfig(**NARROW | {"max_position_embeddings": T})
    torch.manual_seed(1)
    teacher = LlamaForCausalLM(config).eval()
    ours, student = as_teacher(teacher), student_of(32)
    ours.read_as(Reading(start=1))
    weights = LossWeights(prediction=1.0, hidden=1.0, cosine=1.0, ce=1.0, layer_map="1,3")
    _, terms = Step(student, ours, weights, RUN)(IDS, lengths)
    read = torch.cat([torch.full((B, 1), 1), IDS[:, :-1]], 1)
    with torch.no_grad():
        theirs = teacher(input_ids=read, output_hidden_states=True)
        mine = student(IDS, output_hidden_states=True)
    counted = torch.arange(T - 1) < torch.tensor(lengths or [T, T])[:, None]
    states = [
        (a[:, :-1][counted].double(), b[:, 1:][counted].double())
        for a, b in (
            (mine.hidden_states[0], theirs.hidden_states[0]),
            (mine.hidden_states[1], theirs.hidden_states[1]),
            (mine.hidden_states[2], theirs.hidden_states[3]),
        )
    ]
    student_logits, logits = mine.logits[:, :-1][counted], theirs.logits[:, 1:][counted]
    targets = [(row[:-1], ids[1:]) for row, ids in zip(mine.logits, IDS, strict=True)]
    if lengths is not None:
        targets = [(row[: n - 1], ids[: n - 1]) for (row, ids), n in zip(targets, lengths, strict=True)]
    expected = {
        "prediction": naive_kl(student_logits[None], logits[None]),
        "hidden": sum(float(((a - b) ** 2).mean()) for a, b in states),
        "cosine": float((1 - torch.nn.functional.cosine_similarity(*states[-1], dim=-1)).mean()),
        "ce": float(
            torch.nn.functional.cross_entropy(
                torch.cat([row for row, _ in targets]).double(), torch.cat([ids for _, ids in targets])
            )
        ),
    }
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_in_bfloat16_the_layers_are_cast_once_with_the_same_results(teacher: PreTrainedModel) -> None:
    found = []
    for cast in (False, True):
        ours = as_teacher(teacher)
        if cast:
            ours.cast(torch.bfloat16)
        step = Step(student_of(), ours, LossWeights(prediction=1.0, ce=0.0), RUN)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(IDS)[0].item())
    assert found[0] == found[1]
