"""The study of teachers: a stopped training goes on as if it had not stopped, and the table says what the lines say."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tinygpt2.data.dataset import load_packed_dataset

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the study imports the other scripts by name
    spec.loader.exec_module(module)
    return module


load("result_lines")
llama, recipes = load("llama_teacher"), load("recipes")
study = load("teacher_study")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setattr(llama, "SHAPE", llama.SHAPE | shape | {"intermediate_size": 48, "max_position_embeddings": 32})


def started(data: Path, checkpoint: Path, tokens: int = 12 * 4 * 32) -> object:
    packed = load_packed_dataset(str(data))
    plan = llama.Plan(tokens, batch=4, micro_batch=2, eval_every=3, eval_blocks=4)
    return llama.Run(llama.new_model(packed, 1), packed, plan, checkpoint)


def test_the_teacher_has_as_many_weights_as_the_gpt2(shared_data: Path) -> None:
    with torch.device("meta"):
        config = llama.LlamaConfig(vocab_size=8192, **llama.SHAPE)
        own = LlamaForCausalLM(config).num_parameters()
    gpt2 = AutoModelForCausalLM.from_pretrained(str(shared_data / llama.GPT2)).num_parameters()
    assert own == pytest.approx(gpt2, rel=0.02)


@pytest.mark.usefixtures("small")
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(data: Path, tmp_path: Path) -> None:
    whole = started(data, tmp_path / "whole.pt")
    before = llama.mean_loss(whole.model, llama.spaced(whole.data.test))
    assert whole.go_on(0.0, math.inf)
    assert whole.step == whole.steps == 12
    assert llama.mean_loss(whole.model, llama.spaced(whole.data.test)) < before - 0.1
    parts = started(data, tmp_path / "parts.pt")
    for _ in range(5):
        parts.take_step()
    assert not parts.go_on(0.0, -math.inf)
    again = started(data, tmp_path / "parts.pt")
    assert again.step == 5
    assert again.go_on(0.0, math.inf)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert again.curve == whole.curve[1:]  # the five steps by hand measured nothing
    assert started(data, tmp_path / "parts.pt").go_on(0.0, -math.inf)  # there is nothing left to do


@pytest.mark.usefixtures("small")
def test_training_ends_at_the_target_and_the_teacher_is_saved_whole(data: Path, tmp_path: Path, teacher: Path) -> None:
    run = started(data, tmp_path / "run.pt")
    assert run.go_on(100.0, math.inf)
    assert run.step == 3
    result = llama.finish(run, AutoModelForCausalLM.from_pretrained(str(teacher)), tmp_path / "out")
    saved = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert isinstance(saved, LlamaForCausalLM)
    assert len(AutoTokenizer.from_pretrained(str(tmp_path / "out"))) == saved.config.vocab_size == 320
    ids = run.data.test.batch(list(range(len(run.data.test)))).input_ids.long()
    for key, model in (("loss", saved), ("gpt2_loss", AutoModelForCausalLM.from_pretrained(str(teacher)))):
        with torch.no_grad():
            expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert result[key] == pytest.approx(float(expected), rel=1e-5)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["tokens"] == 3 * 4 * 32


def test_rates_rise_stay_and_fall_to_zero(data: Path, tmp_path: Path) -> None:
    run = started(data, tmp_path / "run.pt")
    run.steps = 100
    rates = [run.rate(step) for step in range(100)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[50] == 1.0
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)


def line(teacher: str, seed: int, groups: list[float], start: str = "cut") -> dict:
    loss = sum(groups) / len(groups)
    known = {"teacher": teacher, "start": start, "rate": None, "seed": seed, "teacher_loss": 4.38}
    return {**known, "loss": loss, "groups": groups}


def test_the_table_compares_what_both_teachers_have() -> None:
    assert study.report([]) == "no run is finished"
    lines = [line("gpt2", 1, [4.0, 5.0]), line("llama", 1, [4.1, 5.3]), line("gpt2", 2, [9.0, 9.0])]
    table = study.report(lines).splitlines()
    assert "gpt2 4.3800, llama 4.3800" in table[0]
    # differences of 0.1 and 0.3 in the two groups: 0.2, and a standard error of 0.1
    assert table[4] == "| cut | default | 4.5000, 9.0000 | 4.7000 | +0.2000 +- 0.1000 |"
    assert table[5] == "| random | default | - | - | - |"


def test_finished_runs_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = list(study.runs(1000))
    assert len(every) == len(set(every)) == 12
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(study.asdict(every[0])) + "\n")
    monkeypatch.setattr(study, "distill", lambda _: pytest.fail("it ran again"))
    holder = type("Holder", (), {"results": results})()
    study.train(holder, every[0], "teacher")
