from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.conftest import make_model
from tinygpt2 import GenerateConfig, generate
from tinygpt2.errors import ConfigError, DataError, ModelError


def texts(**options: object) -> list[str]:
    return [result.text for result in generate(GenerateConfig(**options)).results]


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
    assert ours.text == tokenizer.decode(expected)
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
    expected = [tokenizer.decode([t for t in row[ids.shape[1] :].tolist() if t]) for row in out]
    assert texts(model=str(teacher), prompt="the cat", max_new_tokens=6, num_beams=4, num_samples=3) == expected


def test_greedy_stays_greedy_whatever_the_models_directory_says(teacher: Path, tmp_path: Path) -> None:
    import json
    import shutil

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
