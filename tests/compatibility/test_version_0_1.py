"""Files that version 0.1 wrote are read, continued, or refused with a sentence.

version-0.1.tar.xz holds them: a tokenizer, one dataset in each format, a model, a cache of its states, and one run
twice, `finished` and `interrupted` after step 3 of 6.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

from tinygpt2.config.yaml_files import read_yaml
from tinygpt2.training import optimizers

FILES = Path(__file__).parent / "version-0.1.tar.xz"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of version 0.1 in the working directory. Its Muon iterated in bfloat16 on every machine."""
    monkeypatch.setattr(optimizers, "has_fast_bf16", lambda device: True)
    with tarfile.open(FILES) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "0.1")
    return tmp_path / "0.1"


@pytest.mark.parametrize("name", ["data-arrow", "data-hdf5", "data-jsonl"])
def test_datasets_are_read(name: str, old: Path, cli: Callable) -> None:
    outcome = cli("verify", name, "--json")
    assert outcome.code == 0
    assert outcome.json["ok"]
    plan = cli("pretrain", "--data", name, "--model", "model", "--out", "new", "--validate-only", "--json")
    assert plan.code == 0, plan.err


def test_a_tokenizer_makes_the_same_dataset(old: Path, cli: Callable) -> None:
    (old / "text.txt").write_text("the cat sat on the mat. " * 40)
    made = cli("pregenerate", "text.txt", "--tokenizer", "tokenizer", "--sequence-length", 16, "--out", "new", "--json")
    assert made.code == 0, made.err
    assert cli("ppl", "--model", "model", "--task", "new", "--json").code == 0


def test_a_model_is_read(old: Path, cli: Callable) -> None:
    assert cli("verify", "model", "--json").json["ok"]
    text = cli("generate", "--model", "model", "--prompt", "the cat", "--max-new-tokens", 4, "--json")
    assert text.json["results"][0]["tokens"] > 0


def test_an_interrupted_run_is_continued_to_the_same_weights(old: Path, cli: Callable) -> None:
    outcome = cli("distill", "--config", "interrupted/config.yaml", "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["steps"] == 6
    assert outcome.json["eval"]["loss"] == pytest.approx(5.6166126, abs=1e-4)
    now, then = (load_file(old / name / "model.safetensors") for name in ("interrupted", "finished"))
    assert now.keys() == then.keys()
    for key, weight in then.items():
        torch.testing.assert_close(now[key], weight, atol=1e-5, rtol=1e-4)


def test_a_configuration_runs_again_and_uses_the_cache(old: Path, cli: Callable) -> None:
    cached = {file: file.read_bytes() for file in (old / "cache").rglob("*") if file.is_file()}
    outcome = cli("distill", "--config", "finished/config.yaml", "--out", "again", "--json")
    assert outcome.code == 0, outcome.err
    assert "32%" in outcome.err  # of the states are in the cache: 24 of 74 blocks
    assert {file: file.read_bytes() for file in (old / "cache").rglob("*") if file.is_file()} == cached
    if Version(transformers.__version__) < Version("5.20"):
        return  # the student begins with random weights, and older versions draw other ones
    now, then = (load_file(old / name / "model.safetensors") for name in ("again", "finished"))
    for key, weight in then.items():
        torch.testing.assert_close(now[key], weight, atol=1e-5, rtol=1e-4)


def test_another_command_on_an_old_run_is_refused(old: Path, cli: Callable) -> None:
    outcome = cli("finetune", "--model", "model", "--data", "data-arrow", "--out", "interrupted", "--resume")
    assert outcome.code == 2
    assert "a different command, distill" in outcome.err


def test_another_teacher_on_an_old_run_is_refused(old: Path, cli: Callable) -> None:
    shutil.copytree(old / "model", old / "other")
    outcome = cli("distill", "--config", "interrupted/config.yaml", "--teacher", "other", "--resume")
    assert outcome.code == 2
    assert "--teacher differ from the run" in outcome.err


def test_every_option_of_an_old_configuration_is_known(old: Path, cli: Callable) -> None:
    for name, command in (("model", "pretrain"), ("finished", "distill")):
        values = read_yaml(old / name / "config.yaml")
        outcome = cli(command, "--config", f"{name}/config.yaml", "--print-config")
        assert outcome.code == 0, outcome.err
        assert all(f"\n{key}:" in f"\n{outcome.out}" for key in values)
