"""Our own loop gives the tokens of `transformers`, in batches and alone, and samples from its distribution."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tinygpt2.decoding import gpt2
from tinygpt2.decoding.gpt2 import GPT2Decoder
from tinygpt2.decoding.library import LibraryDecoder, make_decoder
from tinygpt2.decoding.loop import decode
from tinygpt2.decoding.products import rounded_to_int8
from tinygpt2.decoding.sampling import Sampling
from tinygpt2.errors import ConfigError, ModelError
from tinygpt2.models.loading import random_model

VOCABULARY = 90
SHAPES: dict[str, dict] = {
    "plain": {},
    "odd inner width": {"n_inner": 50},
    "untied": {"tie_word_embeddings": False},
    "one layer, one head": {"n_layer": 1, "n_head": 1},
    "scores divided by the layer": {"scale_attn_by_inverse_layer_idx": True},
    "scores not scaled": {"scale_attn_weights": False},
    "relu": {"activation_function": "relu"},
    "erf GELU": {"activation_function": "gelu"},
    "width not a multiple of 16": {"n_embd": 36},
}


def made(seed: int = 0, **shape: object) -> GPT2LMHeadModel:
    base = {"n_layer": 3, "n_embd": 48, "n_head": 4, "n_positions": 40, "vocab_size": VOCABULARY}
    config = GPT2Config(**{**base, **shape}, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    model = random_model(config, seed).eval()
    torch.manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def prompts(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(seed))


def librarys(model: PreTrainedModel, given: torch.Tensor, count: int, **how: object) -> torch.Tensor:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count, **options)
    return out[:, given.shape[1] :]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_tokens_are_those_of_transformers(shape: str, rows: int) -> None:
    model, given = made(**SHAPES[shape]), prompts(rows, 7)
    expected = librarys(model, given, 33)  # all positions
    for decoder in (GPT2Decoder(model), GPT2Decoder(model, copies=True), LibraryDecoder(model)):
        out = decode(decoder, given, max_new_tokens=33)
        assert torch.equal(out.tokens, expected)
        assert out.lengths.tolist() == [33] * rows
        assert not out.ended.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_for_several_threads_changes_no_token(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt2, "_layout", lambda model: "packed")
    model = made(**SHAPES[shape])
    for rows in (1, 3, 40):
        given = prompts(rows, 7)
        with torch.no_grad():
            ours = (decoder := GPT2Decoder(model, copies=True)).read(decoder.cache(rows, 40), given, every=True)
        torch.testing.assert_close(ours, model(given).logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(decode(decoder, given, max_new_tokens=33).tokens, librarys(model, given, 33))


def test_matrices_are_copied_as_the_number_of_threads_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    monkeypatch.setattr(gpt2, "on_several_threads", lambda operations: False)
    assert gpt2._layout(model) == "transposed head"
    monkeypatch.setattr(gpt2, "on_several_threads", lambda operations: True)
    assert gpt2._layout(model) == "packed"
    assert gpt2._layout(model.half()) == "in place"


@pytest.mark.parametrize("sampling", [None, Sampling(0.8, 20, 0.9)])
def test_prompts_of_other_lengths_change_no_row(sampling: Sampling | None) -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    given, lengths = prompts(4, 9), torch.tensor([9, 1, 5, 8])
    for decoder in (GPT2Decoder(made()), make_decoder(llama)):
        caches = [decoder.cache(4, 20, 9 - lengths), *(decoder.cache(1, 20) for _ in range(4))]
        moved = torch.stack([row.roll(9 - int(length)) for row, length in zip(given, lengths, strict=True)])
        with torch.no_grad():
            together = decoder.read(caches[0], moved)
            alone = [decoder.read(cache, given[i : i + 1, : lengths[i]]) for i, cache in enumerate(caches[1:])]
            torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
            more = prompts(4, 3, seed=5)
            together = decoder.read(caches[0], more, every=True)
            alone = [decoder.read(cache, more[i : i + 1], every=True) for i, cache in enumerate(caches[1:])]
            torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
        seeded = torch.Generator().manual_seed(3)
        out = decode(decoder, given, lengths, max_new_tokens=12, sampling=sampling, generator=seeded).tokens
        if sampling is None:
            for i, length in enumerate(lengths.tolist()):
                assert torch.equal(out[i], decode(decoder, given[i : i + 1, :length], max_new_tokens=12).tokens[0])


def test_texts_stop_at_their_end_and_the_others_go_on() -> None:
    model, given = made(), prompts(4, 5)
    decoder = GPT2Decoder(model)
    free = decode(decoder, given, max_new_tokens=30).tokens.tolist()
    ends = [free[0][4], free[1][9]]
    shown: list[list[int]] = []
    out = decode(decoder, given, max_new_tokens=30, ends=ends, on_tokens=shown.append)
    for row, tokens, length, ended in zip(
        free, out.tokens.tolist(), out.lengths.tolist(), out.ended.tolist(), strict=True
    ):
        first = next((at for at, token in enumerate(row) if token in ends), None)
        assert length == (30 if first is None else first + 1)
        assert ended == (first is not None)
        assert tokens[:length] == row[:length]
        assert set(tokens[length:]) <= {0}
    assert out.tokens.shape[1] == len(shown) == int(out.lengths.max())
    assert out.lengths[0] < 30  # the first end was reached


def test_the_end_of_the_positions_is_said_before_anything_is_computed() -> None:
    decoder = GPT2Decoder(made())
    assert decode(decoder, prompts(1, 30), max_new_tokens=10).tokens.shape == (1, 10)
    with pytest.raises(ConfigError, match="a has 40 positions: 30 prompt tokens leave no room for 11 more"):
        decode(decoder, prompts(1, 30), max_new_tokens=11, name="a")


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = made()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(ModelError, match="NaN or infinite"):
        decode(GPT2Decoder(model), prompts(2, 5), max_new_tokens=3)


def test_weights_are_used_in_place_and_tokens_may_be_trained_on() -> None:
    model, given = made().train(), prompts(2, 5)
    decoder = GPT2Decoder(model)
    stored = {tensor.data_ptr() for tensor in model.parameters()}
    before = decode(decoder, given, max_new_tokens=8).tokens
    other = made(seed=9)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    after = decode(decoder, given, max_new_tokens=8).tokens
    assert torch.equal(after, librarys(other, given, 8))
    assert not torch.equal(after, before)
    assert {tensor.data_ptr() for tensor in model.parameters()} == stored
    model(after).logits.logsumexp(-1).mean().backward()
    assert model.transformer.wte.weight.grad is not None


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7), Sampling(1.3, 5), Sampling(1.0, 0, 0.6), Sampling(1.2, 7, 0.8)]
)
def test_a_seed_gives_the_samples_of_transformers(sampling: Sampling) -> None:
    model, given = made(), prompts(3, 6)
    torch.manual_seed(11)
    how = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    expected = librarys(model, given, 20, **how)
    out = decode(
        GPT2Decoder(model), given, max_new_tokens=20, sampling=sampling, generator=torch.Generator().manual_seed(11)
    )
    assert torch.equal(out.tokens, expected)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Return how far counts are from what probabilities expect, in standard deviations of chi-square's cube root.

    Source: Wilson and Hilferty 1931, doi:10.1073/pnas.17.12.684.
    """
    assert counts[probabilities == 0].sum() == 0
    counts, expected = counts[probabilities > 0], probabilities[probabilities > 0] * counts.sum()
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def pairs_of(model: GPT2LMHeadModel, given: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probability of every pair of next tokens, in float64 and step by step: (V, V)."""

    def distribution(text: list[int]) -> torch.Tensor:
        scores = model.double()(torch.tensor([text])).logits[0, -1] / sampling.temperature
        kept = scores.argsort(descending=True)[: sampling.top_k or None]
        chances = torch.zeros_like(scores)
        chances[kept] = scores[kept].softmax(0)
        total, nucleus = 0.0, []
        for token in kept.tolist():
            if total < sampling.top_p:
                nucleus.append(token)
            total += float(chances[token])
        found = torch.zeros_like(scores)
        found[nucleus] = chances[nucleus] / chances[nucleus].sum()
        return found

    with torch.no_grad():
        text = given[0].tolist()
        first = distribution(text)
        return torch.stack([chance * distribution([*text, token]) for token, chance in enumerate(first)])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 4), Sampling(1.5, 0, 0.8)])
def test_samples_have_the_models_distribution(sampling: Sampling) -> None:
    model, given = made(vocab_size=6, n_embd=16, n_head=2), prompts(1, 3) % 6
    out = decode(
        GPT2Decoder(model), given.repeat(20000, 1), max_new_tokens=2, sampling=sampling,
        generator=torch.Generator().manual_seed(1),
    ).tokens  # fmt: skip
    counts = torch.bincount(out[:, 0] * 6 + out[:, 1], minlength=36).double()
    expected = pairs_of(model, given, sampling).flatten()
    assert chi_square(counts, expected) < 3
    assert (
        chi_square(counts, torch.where(expected > 0, expected + 0.01, 0.0) / (expected + 0.01)[expected > 0].sum()) > 3
    )


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("shape", ["plain", "odd inner width", "untied", "width not a multiple of 16"])
def test_smaller_weights_give_nearly_the_same_distribution(weights: str, shape: str) -> None:
    model, given = made(**SHAPES[shape], vocab_size=91), prompts(2, 30)
    small, exact = make_decoder(model, weights), GPT2Decoder(model)
    found = []
    with torch.no_grad():
        for decoder in (small, exact):
            cache = decoder.cache(2, 31)
            many = decoder.read(cache, given, every=True)  # many rows, then few
            found.append(torch.cat([many, decoder.read(cache, given[:, :1], every=True)], 1).float().log_softmax(-1))
    divergence = (found[1].exp() * (found[1] - found[0])).sum(-1)
    assert 0 < divergence.mean() < 0.02
    assert small.bytes_per_token < (0.35 if weights == "int8" else 0.55) * exact.bytes_per_token


def test_int8_rounds_each_row_by_its_own_scale() -> None:
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1], [30], [0], [2]])
    quantised, scales = rounded_to_int8(rows)
    error = (rows - quantised * scales[:, None]).abs()
    assert (error <= rows.abs().amax(1, keepdim=True) / 127 / 2 + 1e-9).all()
    assert quantised.abs().amax(1).tolist() == [127, 127, 127, 0, 127]


def test_other_formats_need_a_gpt2() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ConfigError, match="--weights int8 is for GPT-2, and x is a LlamaForCausalLM"):
        make_decoder(llama, "int8", name="x")


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_settings_of_sampling_have_bounds(wrong: dict) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        Sampling(**wrong)


def test_a_temperature_near_0_takes_the_likeliest_token() -> None:
    logits = torch.tensor([[-100.0, -99.0, -103.0], [4.0, 2.0, 1.0]])
    for temperature in (1e-5, 1e-38):
        assert Sampling(temperature).probabilities(logits).tolist() == [[0, 1, 0], [1, 0, 0]]
