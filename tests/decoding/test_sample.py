"""`sample` writes a dataset: the same for every batch size, after an interruption, and as good as any other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from tests.conftest import LENGTH, make_model
from tinygpt2 import DistillConfig, SampleConfig, distill, sample
from tinygpt2.data.batches.order import Shuffle
from tinygpt2.data.dataset import PackedDataset, load_packed_dataset
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.data.validation import check_dataset
from tinygpt2.decoding import sampled_dataset
from tinygpt2.decoding.own_text import Lengths, random_numbers
from tinygpt2.decoding.sampling import Sampling, drawn
from tinygpt2.errors import ConfigError


def stream(data: PackedDataset, split: str) -> list[int]:
    blocks = getattr(data, split)
    return [int(token) for index in range(len(blocks)) for token in blocks.row(index)]


def test_numbers_draw_from_the_distribution() -> None:
    torch.manual_seed(0)
    probabilities = Sampling(top_k=5).probabilities(torch.randn(1, 40)).expand(40_000, -1)
    numbers = random_numbers(3, range(40_000), 1)[:, 0]
    tokens = drawn(probabilities, numbers)
    found = torch.bincount(tokens, minlength=40) / len(tokens)
    assert float((found - probabilities[0]).abs().max()) < 4 * math.sqrt(0.25 / 40_000)
    assert set(tokens.tolist()) == set(probabilities[0].nonzero()[:, 0].tolist())
    ends = torch.tensor([0.0, np.nextafter(np.float32(1), np.float32(0))])
    assert drawn(torch.tensor([[0.0, 0.3, 0.7, 0.0]] * 2), ends).tolist() == [1, 2]


def test_the_same_dataset_in_any_batches_and_after_a_kill(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"model": str(teacher), "prompts": str(data), "tokens": 1500, "prompt_tokens": "2:9", "seed": 5}
    whole = sample(SampleConfig(**common, out=str(tmp_path / "a"), batch_size=7))
    sample(SampleConfig(**common, out=str(tmp_path / "b"), batch_size=4))
    original = sampled_dataset.continued
    calls = []

    def killed(*arguments: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(sampled_dataset, "continued", killed)
        with pytest.raises(KeyboardInterrupt):
            sample(SampleConfig(**common, out=str(tmp_path / "c"), batch_size=7))
    log = tmp_path / ".c.unfinished" / "log"
    with (log / "tokens.bin").open("ab") as file:
        file.write(b"half a batch")
    with pytest.raises(ConfigError, match="--resume"):
        sample(SampleConfig(**common, out=str(tmp_path / "c")))
    with pytest.raises(ConfigError, match="temperature differ"):
        sample(SampleConfig(**common, out=str(tmp_path / "c"), resume=True, temperature=0.5))
    resumed = sample(SampleConfig(**common, out=str(tmp_path / "c"), resume=True))
    manifests = [json.loads((tmp_path / name / "pregenerate.json").read_text()) for name in "abc"]
    assert manifests[0] == manifests[1] == manifests[2]
    assert not list(check_dataset(tmp_path / "c"))
    assert (resumed.sampled_tokens, resumed.samples) == (whole.sampled_tokens, whole.samples)
    assert manifests[0]["seed"] == 5
    splits = manifests[0]["splits"].values()
    counts = {key: sum(split[key] for split in splits) for key in ("documents", "bytes", "tokens")}
    assert counts == {"documents": whole.documents, "bytes": whole.bytes, "tokens": whole.tokens}
    assert whole.tokens > whole.sampled_tokens >= 1500
    assert whole.samples == whole.documents
    assert manifests[0]["temperature"] == 1.0
    assert sample(SampleConfig(**common, out=str(tmp_path / "c"), resume=True)).tokens_per_second is None
    other = sample(SampleConfig(**{**common, "seed": 6}, out=str(tmp_path / "d")))
    assert other.sequences["train"]
    assert stream(load_packed_dataset(str(tmp_path / "d")), "train") != stream(
        load_packed_dataset(str(tmp_path / "a")), "train"
    )


def test_texts_begin_as_blocks_do_and_only_sampled_tokens_count(teacher: Path, data: Path, tmp_path: Path) -> None:
    packed = load_packed_dataset(str(data))
    config = SampleConfig(
        model=str(teacher), prompts=str(data), out=str(tmp_path / "a"), prompt_tokens="4", max_new_tokens=6,
        sequence_length=8, test_fraction=0,
    )  # fmt: skip
    result = sample(config)
    assert result.samples == len(packed.train)
    assert result.sampled_tokens <= 6 * result.samples
    order = Shuffle(len(packed.train), config.seed)[0 : result.samples]
    found = stream(load_packed_dataset(str(tmp_path / "a")), "train")
    at = 0
    for block in order[:-3]:  # the last ones may not fill a block
        prompt = [int(token) for token in packed.train.row(block)[:4]]
        assert found[at : at + 4] == prompt
        end = found.index(0, at + 4)
        assert end - at <= 10
        at = end + 1
    assert result.ended < 1
    student = make_model(tmp_path / "s", teacher, seed=3, n_layer=1, n_embd=16)
    distill(
        DistillConfig(
            teacher=str(teacher), student=str(student), data=str(tmp_path / "a"), out=str(tmp_path / "o"), max_steps=1
        )
    )


def test_without_prompts_and_with_any_architecture(
    cli: Callable, tokenizer_dir: Path, teacher: Path, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=340, max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    load_tokenizer(str(tokenizer_dir)).save_pretrained(tmp_path / "llama")
    made = cli("sample", "--model", tmp_path / "llama", "--tokens", 700, "--out", tmp_path / "a", "--json")
    assert made.code == 0, made.err
    assert made.json["sampled_tokens"] >= 700
    data = load_packed_dataset(str(tmp_path / "a"))
    assert data.sequence_length == 64
    assert max(stream(data, "train")) < 320  # the model's other rows have no token
    assert cli("verify", tmp_path / "a").code == 0
    made = cli("sample", "--model", teacher, "--tokens", 300, "--out", tmp_path / "b", "--json")
    assert load_packed_dataset(str(tmp_path / "b")).sequence_length == LENGTH


def test_what_does_not_fit_is_refused(cli: Callable, teacher: Path, data: Path, tmp_path: Path) -> None:
    base = ["sample", "--model", teacher, "--out", tmp_path / "o"]
    cases: list[tuple[int, str, list[object]]] = [
        (2, "expected MIN:MAX", [*base, "--prompts", data, "--prompt-tokens", "9:2"]),
        (2, "no effect without --prompts", [*base, "--prompt-tokens", "2:9"]),
        (2, "less than one block", [*base, "--tokens", 5]),
        (3, "no such dataset", [*base, "--prompts", tmp_path / "none"]),
        (2, "is not empty", ["sample", "--model", teacher, "--out", data]),
        (4, "has no tokenizer", ["sample", "--model", make_model(tmp_path / "m", None), "--out", tmp_path / "o"]),
    ]
    for code, message, command in cases:
        result = cli(*command)
        assert (result.code, message in result.err) == (code, True), (command, result.err)
    assert not (tmp_path / "o").exists()


def test_models_read_their_start_token_first(teacher: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    shape = OPTConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    OPTForCausalLM(shape).save_pretrained(tmp_path / "opt")
    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="the $A", special_tokens=[("the", tokenizer.convert_tokens_to_ids("the"))]
    )
    tokenizer.save_pretrained(tmp_path / "opt")
    the = tokenizer.convert_tokens_to_ids("the")
    for model, first, after_nothing in ((tmp_path / "opt", [the], [the]), (teacher, [], [0])):
        writer = sampled_dataset._load(SampleConfig(model=str(model), out="o"))
        assert writer.before([7, 8]) == [*first, 7, 8]
        assert writer.before([]) == after_nothing
        assert writer.lengths.new == 31 - len(first)


@pytest.mark.parametrize(
    ("prompt", "new", "room", "found"),
    [
        (None, None, 1024, (16, 64, 960)),
        (None, None, 128, (4, 16, 112)),
        (None, None, 4, (1, 1, 3)),
        ((16, 64), None, 1024, (16, 64, 960)),
        ((16, 64), 100, 1024, (16, 64, 100)),
        ((16, 64), None, 32, (16, 16, 16)),
        ((128, 256), 512, 128, (64, 64, 64)),
        ((16, 64), 32, 80, (16, 48, 32)),
        ((1, 1), None, 2, (1, 1, 1)),
    ],
)
def test_lengths_that_do_not_fit_are_shortened(
    prompt: tuple[int, int] | None, new: int | None, room: int, found: tuple[int, int, int]
) -> None:
    assert Lengths.fitting(prompt, new, room, pairs=False) == found


def test_prompts_of_pairs_may_take_half_of_a_block() -> None:
    assert Lengths.fitting(None, None, 128, pairs=True) == (16, 64, 64)
    assert Lengths.fitting((4, 8), None, 128, pairs=True) == (4, 8, 120)
