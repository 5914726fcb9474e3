"""`distill`, `ppl` and their plans with teachers of other architectures, from the command line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from tests.conftest import LENGTH, make_model
from tests.models.teachers.test_vocabularies import llama_order, opt_order
from tinygpt2.data.tokenizer import load_tokenizer
from tinygpt2.models.loading import load_causal_lm
from tinygpt2.training.metrics import read_metrics


def llama(path: Path, size: int = 320, positions: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(4)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=size, max_position_embeddings=positions, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def straight(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with the data's own tokenizer."""
    out = tmp_path_factory.mktemp("straight") / "m"
    llama(out)
    load_tokenizer(str(tokenizer_dir)).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def student(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("student") / "m", tokenizer_dir, seed=8, n_layer=2, n_embd=24)


def first_row(out: Path) -> dict[str, float]:
    return next(iter(read_metrics(out)))


def arguments(teacher: Path, student: Path, data: Path, out: Path) -> list[object]:
    return ["distill", "--teacher", teacher, "--student", student, "--data", data, "--out", out, "--max-steps", 2,
            "--micro-batch-size", 2, "--json"]  # fmt: skip


def test_distill_learns_from_a_llama_and_the_card_says_so(
    cli: Callable, straight: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = cli(*arguments(straight, student, data, out), "--hidden-weight", 0.1, "--ce-weight", 0.5)
    assert result.code == 0, result.err
    row = first_row(out)
    assert {"loss", "loss/prediction", "loss/hidden", "loss/ce", "teacher/loss"} <= row.keys()
    assert "teacher/left_out" not in row
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "LlamaForCausalLM" in card
    assert "`tinygpt2 generate --model m --draft out`" in card
    assert cli("generate", "--model", straight, "--draft", out, "--prompt", "the", "--max-new-tokens", 4).code == 0
    assert not any("teacher" in name for name in torch_names(out))


def torch_names(out: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_other_numbers_change_nothing(
    cli: Callable, straight: Path, student: Path, data: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The same weights with their rows in another order, and one row more, which is left out."""
    other = tmp_path / "other"
    theirs = load_tokenizer(str(llama_order(tokenizer_dir, other, template=False)))
    ours, model = load_tokenizer(str(tokenizer_dir)), load_causal_lm(str(straight))[0]
    turned = llama(other, size=321)
    turned.load_state_dict({**turned.state_dict(), **{k: v for k, v in model.state_dict().items() if "layers" in k}})
    turned.model.norm.weight.data = model.model.norm.weight.data
    names = {"<|endoftext|>": "</s>"}
    with torch.no_grad():
        for piece, token in ours.get_vocab().items():
            row = theirs.convert_tokens_to_ids(names.get(piece, piece))
            turned.model.embed_tokens.weight[row] = model.model.embed_tokens.weight[token]
            turned.lm_head.weight[row] = model.lm_head.weight[token]
    turned.save_pretrained(other)
    rows = []
    for name, teacher in (("a", straight), ("b", other)):
        result = cli(*arguments(teacher, student, data, tmp_path / name))
        assert result.code == 0, result.err
        rows.append(first_row(tmp_path / name))
    assert rows[1]["loss/prediction"] == pytest.approx(rows[0]["loss/prediction"], rel=1e-5)
    assert rows[1]["teacher/loss"] == pytest.approx(rows[0]["teacher/loss"], rel=1e-5)
    assert 0 < rows[1]["teacher/left_out"] < 1


def test_an_opt_reads_its_end_of_text_and_its_start(
    cli: Callable, student: Path, data: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    out, folder = tmp_path / "out", opt_order(tokenizer_dir, tmp_path / "opt")
    torch.manual_seed(3)
    config = OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=325, init_std=0.3,
        max_position_embeddings=LENGTH, word_embed_proj_dim=32,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    cached = [*arguments(folder, student, data, out), "--teacher-cache", tmp_path / "cache"]
    result = cli(*cached)
    assert result.code == 0, result.err
    assert "no position left for the last token of a block" in result.err
    again = cli(*[tmp_path / "again" if part == out else part for part in cached])
    assert again.code == 0, again.err
    assert first_row(tmp_path / "again")["loss"] == first_row(out)["loss"]
    (about,) = (tmp_path / "cache").glob("*/about.json")
    assert json.loads(about.read_text())["length"] == LENGTH - 1
    planned = cli(*[tmp_path / "new" if part == out else part for part in cached], "--validate-only")
    assert planned.code == 0, planned.err


def test_plans_and_batch_sizes_count_the_teacher(
    cli: Callable, straight: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    command = arguments(straight, student, data, tmp_path / "out")
    plan = cli(*command, "--validate-only").json
    weights = sum(parameter.numel() for parameter in load_causal_lm(str(straight))[0].parameters())
    assert plan["teacher_parameters"] == weights
    fitted = cli(*command, "--auto-batch-size")
    assert fitted.code == 0, fitted.err
    assert "--auto-batch-size:" in fitted.err
    places = ["--teacher", straight, "--student", student, "--data", data, "--out", tmp_path / "timed"]
    timed = cli("distill", "--plan", *places, "--micro-batch-size", 1, "--json")
    assert timed.code == 0, timed.err
    assert timed.json["candidates"][0]["tokens_per_second"] > 0


def test_plans_count_a_gpt2_with_padded_rows(
    cli: Callable, student: Path, data: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    padded = make_model(tmp_path / "padded", tokenizer_dir, vocab_size=336)
    command = arguments(padded, student, data, tmp_path / "out")
    for more in (["--validate-only"], ["--validate-only", "--auto-batch-size"]):
        found = cli(*command, *more)
        assert found.code == 0, found.err
    assert cli(*command).code == 0


def test_held_out_blocks_have_to_fit_the_teacher_too(
    cli: Callable, teacher: Path, tokenizer_dir: Path, corpus: Path, data: Path, tmp_path: Path
) -> None:
    long, student = tmp_path / "long", make_model(tmp_path / "s", tokenizer_dir, n_positions=64)
    made = cli("pregenerate", corpus, "--tokenizer", tokenizer_dir, "--sequence-length", 64, "--out", long)
    assert made.code == 0, made.err
    found = cli(*arguments(teacher, student, data, tmp_path / "out"), "--eval-data", long)
    assert found.code == 2
    assert "have 64 tokens, but the teacher of" in found.json["error"]["message"]
    assert not (tmp_path / "out" / "run.json").exists()


def test_ppl_measures_a_llama_as_its_own_logits_say(
    cli: Callable, student: Path, corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """With its start token before each window, beside a GPT-2 in one table."""
    folder = tmp_path / "llama"
    llama_order(tokenizer_dir, folder)
    model = llama(folder, size=321, positions=40)
    text = corpus / "00.txt"
    result = cli("ppl", "--model", folder, "--model", student, "--task", text, "--json")
    assert result.code == 0, result.err
    rows = result.json["results"]
    tokens = load_tokenizer(str(folder))(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    total = 0.0
    for start in range(0, len(tokens), 40):
        window = tokens[start : start + 40]
        if len(window) > 1:
            ids = torch.tensor([[0, *window[:-1]]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, 1:].double()
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum"))
    assert rows[0]["loss"] == pytest.approx(total / rows[0]["tokens"], rel=1e-5)
    assert rows[0]["perplexity"] == pytest.approx(math.exp(rows[0]["loss"]))
    other = cli("ppl", "--model", folder, "--task", text, "--convention", "gpt2-paper", "--precision", "bf16", "--json")
    assert other.code == 0, other.err


def test_what_cannot_be_done_is_said(
    cli: Callable, straight: Path, student: Path, teacher: Path, data: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    hint = "only the teacher of distill and the models of ppl and generate may be of another architecture"
    cases: list[tuple[int, str, list[object]]] = [
        (4, "a student of a preset", ["truncate-student", "--teacher", straight, "--num-layers", 1, "--out", out]),
        (4, hint, ["finetune", "--model", straight, "--data", corpus / "00.txt", "--out", out]),
        (4, hint, ["pretrain", "--model", straight, "--data", data, "--out", out]),
        (4, hint, arguments(teacher, straight, data, out)),
        (2, "needs a GPT-2 as the teacher, and this one is a LlamaForCausalLM",
         [*arguments(straight, student, data, out), "--attention-weight", 1]),
        (2, "give a student with --student", ["distill", "--plan", "--teacher", straight, "--data", data, "--out", out]),
    ]  # fmt: skip
    short = tmp_path / "short"
    llama(short, positions=16)
    cases.append((2, "has 16 positions", arguments(short, student, data, out)))
    fewer = tmp_path / "fewer"
    llama(fewer, size=100)
    cases.append((4, "vocabulary of 100", arguments(fewer, student, data, out)))
    strange = tmp_path / "strange"
    shutil.copytree(straight, strange)
    settings = json.loads((strange / "config.json").read_text())
    own = {**settings, "model_type": "strange", "auto_map": {"AutoModelForCausalLM": "modeling_strange.Strange"}}
    (strange / "config.json").write_text(json.dumps(own))
    (strange / "modeling_strange.py").write_text("raise SystemExit('code of a model ran')\n")
    cases.append((4, "never run", arguments(strange, student, data, out)))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(straight / "config.json", bare)
    cases.append((4, "no weights", arguments(bare, student, data, out)))
    pickled = tmp_path / "pickled"
    load_causal_lm(str(straight))[0].save_pretrained(pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(load_causal_lm(str(straight))[0].state_dict(), pickled / "pytorch_model.bin")
    cases.append((4, "--allow-pickle", arguments(pickled, student, data, out)))
    for code, part, command in cases:
        result = cli(*command)
        assert (result.code, part in result.err + result.out) == (code, True), (command, result.out, result.err)
        assert "Traceback" not in result.err
    allowed = cli(*arguments(pickled, student, data, out), "--allow-pickle")
    assert allowed.code == 0, allowed.err


def test_generate_continues_with_a_llama_as_the_library_does(cli: Callable, straight: Path) -> None:
    result = cli("generate", "--model", straight, "--prompt", "the", "--max-new-tokens", 6, "--json")
    assert result.code == 0, result.err
    model, tokenizer = load_causal_lm(str(straight))[0], load_tokenizer(str(straight))
    ids = torch.tensor([tokenizer("the")["input_ids"]])
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    (found,) = result.json["results"]
    assert found["tokens"] == 6
    assert "the" + found["text"] == tokenizer.decode(ids[0])
    beyond = cli("generate", "--model", straight, "--prompt", "the", "--max-new-tokens", 64)
    assert beyond.code == 2
    assert "has 64 positions" in beyond.err
