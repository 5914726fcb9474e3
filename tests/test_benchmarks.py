"""The naive way that benchmarks compare with computes what this package computes, step after step."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from tinygpt2.config.training import PretrainConfig
from tinygpt2.models.loading import random_model
from tinygpt2.objectives.weights import LossWeights
from tinygpt2.training.optimizers import make_optimizer
from tinygpt2.training.step import Step

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
spec = importlib.util.spec_from_file_location("naive", BENCHMARKS / "naive.py")
assert spec is not None
assert spec.loader is not None
naive = importlib.util.module_from_spec(spec)
spec.loader.exec_module(naive)


def test_fifty_steps_of_the_naive_way_and_of_ours_give_one_loss_curve() -> None:
    shape = {"n_head": 4, "n_positions": 40, "vocab_size": 90, "initializer_range": 0.1}
    shape |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    teacher = random_model(GPT2Config(n_layer=4, n_embd=48, **shape), 1).eval().requires_grad_(False)
    student = random_model(GPT2Config(n_layer=2, n_embd=24, **shape), 2)
    run = PretrainConfig(data="", out="", shape="gpt2", learning_rate=2e-3)
    ours = Step(student, teacher, LossWeights(1.0, 1.0, 1.0, 0.0, loss="soft_ce"), run)
    assert isinstance(ours.objectives.projection, nn.Linear)
    plain = naive.NaiveStep(copy.deepcopy(student), teacher, copy.deepcopy(ours.objectives.projection))
    generator, curves = torch.Generator().manual_seed(3), {}
    batches = [torch.randint(0, 90, (2, 40), generator=generator) for _ in range(50)]
    for name, module in (("ours", ours), ("naive", plain)):
        optimizer = make_optimizer(module, run)
        curve = curves[name] = []
        for batch in batches:
            loss, terms = module(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append([float(term) for _, term in sorted(terms.items())])
    for ours_row, naive_row in zip(curves["ours"], curves["naive"], strict=True):
        assert ours_row == pytest.approx(naive_row, rel=1e-3)
    assert sum(curves["ours"][-1]) < 0.9 * sum(curves["ours"][0])


@pytest.mark.slow
def test_the_benchmark_for_a_gpu_works_on_a_cpu_and_ends_in_time() -> None:
    cases = ["rates", "tinygpt2-4x312-fp32", "naive-fp32", "perplexity-fp32"]
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--json", "--device", "cpu", "--tiny", "--minutes", "3"]
    done = subprocess.run([*command, "--cases", ",".join(cases)], capture_output=True, text=True, check=True)
    *each, whole = map(json.loads, done.stdout.splitlines())
    assert [row["case"] for row in each] == cases == list(whole["results"])
    assert each[0]["operations_per_second_fp32"] > 1e8
    assert whole["seconds"] < 190
    for row in each[1:]:  # on a slow machine, a share may be too short
        assert (
            row["tokens_per_second"] > 0
            if "skipped" not in row
            else "share" in row["skipped"] or "left" in row["skipped"]
        )
    assert any("rate_share" in row for row in each[1:])


def test_the_benchmark_for_a_gpu_says_that_there_was_no_time() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--json", "--device", "cpu", "--tiny", "--minutes", "0.1"]
    done = subprocess.run([*command, "--cases", "rates,generate"], capture_output=True, text=True, check=True)
    rates, generate, _ = map(json.loads, done.stdout.splitlines())
    assert "were left" in rates["skipped"]
    assert "were left" in generate["skipped"]


def test_the_benchmark_of_cuts_goes_on_where_it_stopped(
    teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("width_cuts", BENCHMARKS / "width_cuts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    command = ["width_cuts.py", "--teacher", str(teacher), "--data", str(data), "--results", str(tmp_path / "r.jsonl")]
    command += ["--calibration-sequences", "8", "--sequences", "8", "--json"]
    found = []
    for cases in ("full: turned", "half: rotated", "half: rotated"):
        monkeypatch.setattr(sys, "argv", [*command, "--cases", cases])
        module.main()
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [len(one) for one in found] == [2, 6, 6]
    assert found[1] == found[2]
    own = found[0][1]
    assert own["case"] == "full: turned only, head of its own"
    assert own["cut"] == pytest.approx(own["teacher"], abs=1e-5)
    assert all(line["refit"] is not None for line in found[2][2:])


def run_benchmark(
    name: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict:
    """Run a benchmark in this process, and return the JSON of its last line."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, "--json"])
    module.main()
    found: dict = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_the_benchmark_of_decoding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--models", "quickstart", "--new-tokens", "4", "--turns", "1"]
    (found,) = run_benchmark("decoding", options, monkeypatch, capsys)["results"]
    assert [(row["precision"], row["batch"]) for row in found["rows"]] == [
        (kind, batch) for kind in ("fp32", "bf16", "int8") for batch in (1, 8)
    ]
    first = found["rows"][0]
    assert first["bytes_per_second"] == pytest.approx(first["bytes_per_token"] * first["tokens_per_second"])
    assert found["onnxruntime"] is None or found["onnxruntime"]["f32"] > 0


def test_the_benchmark_of_drafts(
    teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(next(corpus.glob("*.txt")) if corpus.is_dir() else corpus)
    sizes = ["--steps", "2", "--length", "32", "--prompts", "3", "--prompt-tokens", "4", "--new-tokens", "8"]
    options = ["--teacher", str(teacher), "--train-text", text, "--text", text, "--ahead", "3", *sizes]
    found = run_benchmark("drafts", options, monkeypatch, capsys)
    greedy, sampled = found["results"]
    assert greedy["different"] == 0
    assert 0 <= sampled["acceptance"] <= 1
    assert found["student_parameters"] < found["teacher_parameters"]
