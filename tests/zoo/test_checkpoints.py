"""Every checkpoint form goes through every command, with the numbers of plain `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.zoo.checkpoints import FORMS, POSITIONS, TEXT

PROMPT = "The quick brown fox"


@pytest.fixture(params=sorted(FORMS))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "vocabulary_with_a_hole" and tokenizers.__version__ < "0.23":
        pytest.skip("this version of tokenizers prints a warning of holes on standard output")
    path = tmp_path / "model"
    path.mkdir()
    FORMS[request.param](path)
    return path


def ids_of(path: Path, text: str, *, special: bool) -> list[int]:
    """The ids that tokenizer.json itself gives; a layout without one is read by `transformers`."""
    if (path / "tokenizer.json").is_file():
        backend = Tokenizer.from_file(str(path / "tokenizer.json"))
        backend.encode_special_tokens = not special
        return backend.encode(text, add_special_tokens=special).ids
    return AutoTokenizer.from_pretrained(path)(text, add_special_tokens=special)["input_ids"]


def loss_by_transformers(path: Path, text: str) -> float:
    """Mean loss by the convention `hf`: windows of all positions, one after another."""
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor(ids_of(path, text, special=False))
    total, count = 0.0, 0
    for start in range(0, len(ids), POSITIONS):
        window = ids[start : start + POSITIONS]
        if len(window) > 1:
            with torch.no_grad():
                total += float(model(window[None], labels=window[None]).loss) * (len(window) - 1)
            count += len(window) - 1
    return total / count


def decoded(path: Path, ids: list[int]) -> str:
    """The text that tokenizer.json itself gives for ids."""
    if (path / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(path / "tokenizer.json")).decode(ids, skip_special_tokens=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def greedy_by_transformers(path: Path, count: int) -> tuple[int, str]:
    """How many tokens greedy decoding adds to the prompt, and the text that they add."""
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
    prompt = ids_of(path, PROMPT, special=True)
    ids = torch.tensor([prompt])
    end = AutoTokenizer.from_pretrained(path).eos_token_id
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        if end is not None and ids[0, -1] == end:
            break
    added = ids[0, len(prompt) :].tolist()
    added = added[: added.index(end)] if end in added else added
    text = decoded(path, prompt + added).removeprefix(decoded(path, prompt))
    return len(added), text.rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_checkpoint_goes_through_every_command(checkpoint: Path, tmp_path: Path, cli: Callable) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    outcome = cli("verify", checkpoint, "--json")
    assert (outcome.code, outcome.json["ok"]) == (0, True), outcome.out + outcome.err

    outcome = cli("ppl", "--model", checkpoint, "--task", text, "--json")
    assert outcome.code == 0, outcome.err
    expected = loss_by_transformers(checkpoint, TEXT)
    assert outcome.json["results"][0]["loss"] == pytest.approx(expected, rel=1e-6)

    outcome = cli("generate", "--model", checkpoint, "--prompt", PROMPT, "--max-new-tokens", "8", "--json")
    assert outcome.code == 0, outcome.err
    (result,) = outcome.json["results"]
    assert (result["tokens"], result["text"].rstrip("\N{REPLACEMENT CHARACTER}")) == greedy_by_transformers(
        checkpoint, 8
    )

    data, cut = tmp_path / "data", tmp_path / "cut"
    ends = [] if AutoTokenizer.from_pretrained(checkpoint).eos_token_id is not None else ["--no-append-eos"]
    outcome = cli(
        "pregenerate", text, "--tokenizer", checkpoint, "--out", data, "--sequence-length", 16, "--test-fraction", 0.2,
        *ends,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert cli("verify", data).code == 0
    outcome = cli(
        "truncate-student", "--teacher", checkpoint, "--num-layers", 1, "--out", cut, "--data", data, "--refit"
    )
    assert outcome.code == 0, outcome.err
    assert cli("verify", cut).code == 0
    run = ("--data", data, "--max-steps", 1, "--micro-batch-size", 2)
    outcome = cli("distill", "--teacher", checkpoint, "--student", cut, "--out", tmp_path / "student", *run)
    assert outcome.code == 0, outcome.err
    outcome = cli("finetune", "--model", checkpoint, "--out", tmp_path / "tuned", "--validate-only", *run)
    assert outcome.code == 0, outcome.err
