"""Speculative decoding gives the teacher's own text, and samples from the teacher's distribution."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.conftest import make_model
from tests.decoding.test_loop import chi_square, made, pairs_of, prompts
from tinygpt2 import GenerateConfig, TrainTokenizerConfig, generate, train_tokenizer
from tinygpt2.decoding.drafts import decode_with_draft
from tinygpt2.decoding.gpt2 import GPT2Decoder
from tinygpt2.decoding.library import LibraryDecoder
from tinygpt2.decoding.loop import decode
from tinygpt2.decoding.sampling import Sampling
from tinygpt2.errors import ConfigError


@pytest.mark.parametrize("ahead", [1, 4, 50])
@pytest.mark.parametrize("positions", [40, 20, 4])
def test_greedy_text_is_the_teachers_own(ahead: int, positions: int) -> None:
    teacher, student = made(), made(seed=5, n_layer=1, n_positions=positions)
    with torch.no_grad():  # a student that is often right: the teacher's embeddings, and its layers as noise
        for mine, theirs in zip(
            student.transformer.h[0].parameters(), teacher.transformer.h[2].parameters(), strict=True
        ):
            mine.copy_(theirs * 0.7)
        student.transformer.wte.weight.copy_(teacher.transformer.wte.weight)
    decoder, accepted = GPT2Decoder(teacher), 0
    for seed in range(12):
        given = prompts(1, 1 + seed, seed)
        plain = decode(decoder, given, max_new_tokens=25, ends=[3, 4])
        for draft in (GPT2Decoder(student), LibraryDecoder(student)):
            shown: list[int] = []
            out, took = decode_with_draft(
                decoder, draft, given[0].tolist(), max_new_tokens=25, ahead=ahead, ends=[3, 4],
                on_tokens=shown.extend,
            )  # fmt: skip
            assert out.tokens.tolist() == plain.tokens.tolist() == [shown]
            assert out.lengths.tolist() == plain.lengths.tolist()
            assert out.ended.tolist() == plain.ended.tolist()
            assert 0 <= took.accepted <= min(took.proposed, int(out.lengths))
            accepted += took.accepted
    assert accepted > 0 or positions == 4


def test_a_draft_that_is_the_teacher_is_always_accepted() -> None:
    decoder = GPT2Decoder(made())
    out, took = decode_with_draft(decoder, decoder, [1, 2], max_new_tokens=21, ahead=4)
    assert took.accepted == took.proposed == 16  # five tokens in each pass, of which the last is the teacher's own
    assert out.lengths.tolist() == [21]
    assert took.seconds > 0 < took.alone_seconds
    end = out.tokens[0].tolist()[1]  # whatever was accepted after it is not part of the text
    out, took = decode_with_draft(decoder, decoder, [1, 2], max_new_tokens=21, ahead=4, ends=[end])
    assert took.accepted == int(out.lengths) <= 2


def test_drafts_for_a_teacher_whose_attention_reaches_some_tokens_back() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    teacher = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=8, initializer_range=0.3)).eval()
    decoder, given = LibraryDecoder(teacher), torch.tensor([[1, 2, 3]])
    own = teacher.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=30, do_sample=False, eos_token_id=None
    )
    assert decode(decoder, given, max_new_tokens=30).tokens.tolist() == own[:, 3:].tolist()
    out, _ = decode_with_draft(decoder, GPT2Decoder(made(vocab_size=50)), [1, 2, 3], max_new_tokens=30, ahead=4)
    assert out.tokens.tolist() == own[:, 3:].tolist()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 4), Sampling(1.5, 0, 0.8)])
def test_samples_have_the_teachers_distribution_and_not_the_drafts(sampling: Sampling) -> None:
    shape = {"vocab_size": 6, "n_embd": 16, "n_head": 2}
    teacher, student = made(**shape), made(seed=4, **shape)
    given = prompts(1, 3) % 6
    decoders = GPT2Decoder(teacher), GPT2Decoder(student)
    generator, counts = torch.Generator().manual_seed(2), torch.zeros(36, dtype=torch.float64)
    proposed = accepted = 0
    for _ in range(2500):
        out, took = decode_with_draft(
            *decoders,
            given[0].tolist(),
            max_new_tokens=3,
            ahead=2,
            sampling=sampling,
            generator=generator,
            timed_steps=0,
        )
        first, second, _ = out.tokens[0].tolist()
        counts[first * 6 + second] += 1
        proposed, accepted = proposed + took.proposed, accepted + took.accepted
    assert 0 < accepted < proposed
    assert chi_square(counts, pairs_of(teacher, given, sampling).flatten()) < 3
    if sampling == Sampling():
        assert chi_square(counts, pairs_of(student, given, sampling).flatten()) > 10


def test_generate_with_a_draft(teacher: Path, tokenizer_dir: Path, tmp_path: Path, cli: Callable) -> None:
    student = make_model(tmp_path / "s", tokenizer_dir, seed=3, n_layer=1)
    options = {"model": str(teacher), "prompt": ["the cat", "a dog"], "max_new_tokens": 12}
    plain, drafted = generate(GenerateConfig(**options)), generate(GenerateConfig(**options, draft=str(student)))
    assert [text.text for text in drafted.results] == [text.text for text in plain.results]
    assert plain.draft is None
    assert drafted.draft is not None
    assert drafted.draft.speedup > 0
    asked = ["generate", "--model", teacher, "--draft", student, "--prompt", "the cat", "--max-new-tokens", 12]
    assert set(cli(*asked, "--json").json["draft"]) == {"acceptance", "speedup"}
    assert "of its tokens accepted" in cli(*asked).out
    sampled = {**options, "draft": str(student), "num_samples": 3, "temperature": 1.0}
    texts = [text.text for text in generate(GenerateConfig(**sampled)).results]
    assert texts == [text.text for text in generate(GenerateConfig(**sampled)).results]
    assert len(set(texts)) > 2


def test_a_draft_with_other_tokens_is_refused(teacher: Path, corpus: Path, tmp_path: Path, cli: Callable) -> None:
    train_tokenizer(TrainTokenizerConfig(source=[str(corpus)], vocab_size=300, out=str(tmp_path / "t")))
    other = make_model(tmp_path / "other", tmp_path / "t", vocab_size=320)
    outcome = cli("generate", "--model", teacher, "--draft", other, "--prompt", "a", "--json")
    assert outcome.code == 4
    assert "has another tokenizer than" in outcome.json["error"]["message"]
    shutil.copytree(teacher, tmp_path / "same")
    assert cli("generate", "--model", teacher, "--draft", tmp_path / "same", "--prompt", "a").code == 0
    assert cli("generate", "--model", teacher, "--draft", tmp_path / "none", "--prompt", "a").code == 4


def test_what_cannot_be_combined_with_beams() -> None:
    with pytest.raises(ConfigError, match="--num-beams cannot be combined with --draft"):
        GenerateConfig(model="m", draft="s", num_beams=2)
    with pytest.raises(ConfigError, match="--num-beams cannot be combined with --weights"):
        GenerateConfig(model="m", weights="int8", num_beams=2)
