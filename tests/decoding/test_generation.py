from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.conftest import make_model
from tinygpt2 import GenerateConfig, generate
from tinygpt2.cli import interactive
from tinygpt2.cli.output import live_text
from tinygpt2.decoding.generation import continue_prompt, load_models
from tinygpt2.decoding.prompts import prompt_tokens
from tinygpt2.decoding.speed import library_job
from tinygpt2.errors import ConfigError, DataError, ModelError


def texts(**options: object) -> list[str]:
    return [result.text for result in generate(GenerateConfig(**options)).results]


BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


def whole_characters(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of byte-level tokens, without an incomplete last character."""
    raw = bytes(BYTES[letter] for token in tokenizer.convert_ids_to_tokens(ids) for letter in token)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)


def test_greedy_is_transformers_greedy(teacher: Path) -> None:
    (ours,) = generate(GenerateConfig(model=str(teacher), prompt="the cat", max_new_tokens=12)).results
    plain, tokenizer = GPT2LMHeadModel.from_pretrained(str(teacher)).eval(), AutoTokenizer.from_pretrained(str(teacher))
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    for _ in range(12):
        logits = plain(ids).logits[0, -1]
        if int(logits.argmax()) == 0:
            break
        ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
    expected = ids[0, len(tokenizer("the cat")["input_ids"]) :].tolist()
    assert ours.text == whole_characters(tokenizer, expected)
    assert ours.tokens == len(expected)


def test_sampling_follows_the_seed(teacher: Path) -> None:
    options = {"model": str(teacher), "prompt": "the cat", "max_new_tokens": 15, "temperature": 1.0}
    assert texts(**options, seed=1) == texts(**options, seed=1) != texts(**options, seed=2)
    assert len(set(texts(**options, num_samples=4))) > 1
    assert texts(**options, top_k=1) == texts(model=str(teacher), prompt="the cat", max_new_tokens=15)
    assert texts(**options, top_p=1e-6) == texts(model=str(teacher), prompt="the cat", max_new_tokens=15)


def test_beams_are_transformers_beams(teacher: Path) -> None:
    plain, tokenizer = GPT2LMHeadModel.from_pretrained(str(teacher)).eval(), AutoTokenizer.from_pretrained(str(teacher))
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    out = plain.generate(ids, num_beams=4, num_return_sequences=3, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = [whole_characters(tokenizer, [t for t in row[ids.shape[1] :].tolist() if t]) for row in out]
    assert texts(model=str(teacher), prompt="the cat", max_new_tokens=6, num_beams=4, num_samples=3) == expected


def test_greedy_stays_greedy_whatever_the_models_directory_says(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"do_sample": True, "repetition_penalty": 5.0}))
    options = {"prompt": "the cat", "max_new_tokens": 12}
    assert texts(model=str(tmp_path / "m"), **options) == texts(model=str(teacher), **options)


def test_several_models_and_prompts(teacher: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", tokenizer_dir, seed=3)
    results = generate(GenerateConfig(model=[str(teacher), str(other)], prompt=["a", "b"], max_new_tokens=3)).results
    assert [(r.prompt, r.model) for r in results] == [(p, str(m)) for p in "ab" for m in (teacher, other)]


def test_prompt_file_and_empty_prompt(teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("the cat\n", encoding="utf-8")
    assert texts(model=str(teacher), prompt_file=str(file), max_new_tokens=5) == texts(
        model=str(teacher), prompt="the cat\n", max_new_tokens=5
    )
    (unconditional,) = generate(GenerateConfig(model=str(teacher))).results
    assert unconditional.prompt == ""
    assert unconditional.tokens <= 31


def test_what_does_not_fit_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="32 positions"):
        texts(model=str(teacher), prompt="the cat", max_new_tokens=32)
    with pytest.raises(ConfigError, match="shorten the prompt"):
        texts(model=str(teacher), prompt="the cat " * 40)
    with pytest.raises(DataError, match="cannot read"):
        texts(model=str(teacher), prompt_file=str(tmp_path / "x"))
    with pytest.raises(ModelError, match="no tokenizer"):
        texts(model=str(make_model(tmp_path / "bare", None)), prompt="a")


TEXT = "the quick brown fox jumps over the lazy dog, and it doesn't sleep. " * 5


def save_pair(path: Path, tokenizer: PreTrainedTokenizerFast, rows: int | None = None, **ids: object) -> Path:
    """Save a tokenizer with a random model of its size."""
    tokenizer.save_pretrained(path)
    torch.manual_seed(2)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "initializer_range": 0.4}
    ends = {"bos_token_id": None, "eos_token_id": None, **ids}
    GPT2LMHeadModel(GPT2Config(vocab_size=rows or len(tokenizer), **shape, **ends)).save_pretrained(path)
    return path


def word_pieces() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(
        [TEXT], trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def sentence_pieces() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "th", "▁th"]
    backend = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)}, [("t", "h"), ("▁", "th")],
            unk_token="<unk>", byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def bytes_alone() -> PreTrainedTokenizerFast:
    letters = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


KINDS = [word_pieces, sentence_pieces, byte_fallback, bytes_alone]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["the quick", "the quick ", "it doesn't", "é"])
def test_prompt_and_text_join_and_a_terminal_shows_the_same(kind: Callable, prompt: str, tmp_path: Path) -> None:
    (loaded,) = load_models(GenerateConfig(model=str(save_pair(tmp_path / "m", kind()))))
    tokenizer, model = loaded.tokenizer, loaded.model
    known = prompt_tokens(tokenizer, prompt)
    for seed in range(6):
        pieces: list[str] = []
        config = GenerateConfig(model="m", prompt=prompt, max_new_tokens=4 + seed, temperature=1.0, seed=seed)
        (added,) = continue_prompt(loaded, prompt, config, pieces.append)
        assert "".join(pieces) == added.text + "\n"
        torch.manual_seed(seed)
        out = model.generate(
            torch.tensor([known]), attention_mask=torch.ones(1, len(known)), do_sample=True, top_k=0,
            max_new_tokens=4 + seed, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
        )[0].tolist()  # fmt: skip
        whole = tokenizer.decode(out, skip_special_tokens=True)
        before = tokenizer.decode(known, skip_special_tokens=True)
        if whole.startswith(before) and "\ufffd" not in whole:
            assert before + added.text == whole
        assert added.tokens == len(out) - len(known) - (out[-1] == tokenizer.eos_token_id)


def test_an_incomplete_last_character_is_left_out(tmp_path: Path) -> None:
    from tinygpt2.decoding.prompts import Continuation

    for tokenizer in (bytes_alone(), byte_fallback()):
        prompt = prompt_tokens(tokenizer, "the")
        continuation = Continuation(tokenizer, prompt, [])
        ids = tokenizer("é🙂", add_special_tokens=False)["input_ids"]
        ids = [index for index in ids if tokenizer.convert_ids_to_tokens(index) != "▁"]
        assert [continuation.text(ids[:count]) for count in range(7)] == ["", "", "é", "é", "é", "é", "é🙂"]
    tokenizer = bytes_alone()
    invalid = [*tokenizer.convert_tokens_to_ids(["Ģ"]), *tokenizer("a")["input_ids"]]
    assert Continuation(tokenizer, [], []).text(invalid) == "\ufffda"
    assert Continuation(tokenizer, [], []).text(invalid[:1]) == "\ufffd"  # wrong, not incomplete


def test_special_tokens_and_templates_of_a_prompt_are_read_as_transformers_does(tmp_path: Path) -> None:
    tokenizer = bytes_alone()
    tokenizer.add_special_tokens({"bos_token": "<s>", "extra_special_tokens": ["<|user|>", "<|bot|>"]})
    chat = "<|user|>hi<|bot|>"
    assert prompt_tokens(tokenizer, chat) == tokenizer(chat)["input_ids"]
    assert len(prompt_tokens(tokenizer, chat)) == 4
    assert prompt_tokens(tokenizer, "") == []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert prompt_tokens(tokenizer, chat) == tokenizer(chat)["input_ids"]
    assert prompt_tokens(tokenizer, "") == [tokenizer.bos_token_id]
    pieces = word_pieces()
    assert prompt_tokens(pieces, "the fox") == pieces("the fox")["input_ids"]
    path = save_pair(tmp_path / "m", tokenizer)
    (first,), (second,) = (
        generate(GenerateConfig(model=str(path), prompt=text, max_new_tokens=4)).results for text in (chat, "hi")
    )
    assert first.text != second.text


def test_special_tokens_are_never_shown(tmp_path: Path, cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bytes_alone()
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<|{number}|>" for number in range(200)]})
    path = save_pair(tmp_path / "m", tokenizer)
    asked = ["generate", "--model", path, "--prompt", "hi", "--max-new-tokens", "20", "--temperature", "1"]
    (found,) = generate(GenerateConfig(model=str(path), prompt="hi", max_new_tokens=20, temperature=1)).results
    assert "<|" not in found.text
    assert cli(*asked, "--json").json["results"][0]["text"] == found.text
    assert found.text in cli(*asked).out
    monkeypatch.setattr(interactive.sys.stdout, "isatty", lambda: True, raising=False)
    shown: list[str] = []
    monkeypatch.setattr(live_text.OneByOne, "begin", lambda view, model, prompt: shown.append)
    assert interactive.generate_on_terminal(
        GenerateConfig(model=str(path), prompt="hi", max_new_tokens=20, temperature=1), as_json=False
    ) is None  # fmt: skip
    assert "".join(shown) == found.text + "\n"


def test_ends_and_starts_beyond_the_model_do_not_count(tmp_path: Path) -> None:
    without = bytes_alone()
    without.eos_token = None
    for name, ids in (("beyond", {"bos_token_id": 50256, "eos_token_id": 50256}), ("none", {})):
        path = str(save_pair(tmp_path / name, without, **ids))
        assert generate(GenerateConfig(model=path, prompt="hi", max_new_tokens=9)).results[0].tokens == 9
        with pytest.raises(ConfigError, match="an empty prompt needs"):
            generate(GenerateConfig(model=path))
    free = generate(GenerateConfig(model=str(tmp_path / "none"), prompt="hi", max_new_tokens=9)).results[0]
    ids = prompt_tokens(without, "hi")
    out = (
        GPT2LMHeadModel.from_pretrained(tmp_path / "none")
        .generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=9, do_sample=False)[
            0, len(ids) :
        ]
        .tolist()
    )
    path = str(save_pair(tmp_path / "config", without, eos_token_id=[out[5], 3]))  # only config.json names an end
    cut = generate(GenerateConfig(model=path, prompt="hi", max_new_tokens=9)).results[0]
    assert cut.tokens == out.index(out[5])
    assert free.text.startswith(cut.text)
    assert generate(GenerateConfig(model=path, max_new_tokens=2)).results[0].prompt == ""


def test_a_token_of_the_prompt_that_the_model_does_not_know(tmp_path: Path) -> None:
    tokenizer = bytes_alone()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    path = str(save_pair(tmp_path / "m", tokenizer, rows=257))
    assert texts(model=path, prompt="hi", max_new_tokens=3)
    with pytest.raises(ConfigError, match=r"does not know the prompt's token '\[PAD\]' \(id 257\)"):
        texts(model=path, prompt="hi [PAD]")


def test_temperature_0_is_greedy_and_top_k_0_is_every_token(teacher: Path, cli: Callable) -> None:
    options = {"model": str(teacher), "prompt": "the cat", "max_new_tokens": 10}
    assert texts(**options, temperature=0) == texts(**options)
    assert texts(**options, temperature=0, num_beams=3) == texts(**options, num_beams=3)
    assert texts(**options, top_k=0, seed=5) == texts(**options, temperature=1.0, seed=5) != texts(**options)
    with pytest.raises(ConfigError, match="--num-samples 2 would give the same text"):
        GenerateConfig(**options, temperature=0, num_samples=2)
    asked = ["generate", "--model", teacher, "--prompt", "the cat", "--max-new-tokens", 10, "--temperature", 0]
    outcome = cli(*asked, "--top-k", 5, "--top-p", 0.5)
    assert "--top-k and --top-p without effect: --temperature 0 is greedy" in outcome.err
    assert texts(**options, temperature=0)[0] in outcome.out
    assert "without effect" not in cli(*asked).err


def test_a_prompt_that_is_not_utf8(teacher: Path) -> None:
    with pytest.raises(ConfigError, match="not valid UTF-8 at character 1: "):
        texts(model=str(teacher), prompt="a\udcff")


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"num_beams": 3}])
def test_weights_and_logits_that_are_not_finite_are_errors(teacher: Path, tmp_path: Path, options: dict) -> None:
    for name, value, message in (
        ("transformer.ln_f.weight", float("nan"), "transformer.ln_f.weight"),
        ("transformer.ln_f.bias", 3e38, "its logits are NaN or infinite"),
    ):
        path = tmp_path / name
        shutil.copytree(teacher, path)
        tensors = load_file(path / "model.safetensors")
        tensors[name][:] = value
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=message):
            texts(model=str(path), prompt="the cat", max_new_tokens=3, **options)


def test_the_librarys_speed_is_that_of_all_tokens(teacher: Path) -> None:
    """A model's own end of text does not stop it."""
    model = GPT2LMHeadModel.from_pretrained(str(teacher))
    model.generation_config.eos_token_id = list(range(320))
    lengths: list[int] = []
    generate = model.generate
    model.generate = lambda *given, **how: lengths.append((found := generate(*given, **how)).shape[1]) or found
    library_job(model, torch.zeros(2, 3, dtype=torch.int64), 9)()
    assert lengths == [12]
