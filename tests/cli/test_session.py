"""--quiet, --verbose and what is set up before a command runs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from tinygpt2.cli import session
from tinygpt2.runtime import launch
from tinygpt2.utils import progress


def test_quiet_hides_notes_and_progress_and_verbose_adds_decisions(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, cli: Callable
) -> None:
    def run(name: str, *flags: str) -> str:
        packing = ["pregenerate", corpus, "--tokenizer", tokenizer_dir, "--sequence-length", 32]
        outcome = cli(*packing, "--out", tmp_path / name, *flags)
        assert outcome.code == 0, outcome.err
        assert "blocks" in outcome.out
        return outcome.err

    plain, verbose = run("a").splitlines(), run("b", "-v").splitlines()
    assert run("c", "-q") == run("d", "--quiet") == ""
    assert [line.split(":")[0] for line in plain] == ["tokenize", "pack"]
    assert {*plain} < {*verbose}
    assert "texts are encoded by tiktoken, which gives the same tokens" in verbose
    assert f"tokenizer {tokenizer_dir}: a local directory" in verbose


def test_a_warning_is_said_quietly_too(corpus: Path, tokenizer_dir: Path, tmp_path: Path, cli: Callable) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the cat")
    outcome = cli(
        "pregenerate", corpus, "--test-source", short, "--tokenizer", tokenizer_dir, "--sequence-length", 32,
        "--out", tmp_path / "d", "-q",
    )  # fmt: skip
    assert outcome.err.startswith("warning: the held-out text is shorter than one block")
    assert outcome.err.count("\n") == 1


def test_both_flags_are_a_wrong_usage(cli: Callable) -> None:
    outcome = cli("presets", "-q", "-v")
    assert outcome.code == 2
    assert "--quiet and --verbose cannot be combined" in outcome.err


def test_the_flags_are_in_no_configuration(cli: Callable) -> None:
    printed = cli("ppl", "--task", "x", "-v", "--print-config").out
    assert "verbose" not in printed
    assert "quiet" not in printed


def test_started_processes_get_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    session.choose_level(quiet=False, verbose=True)
    session.start_session()
    again = pickle.loads(pickle.dumps(launch._set_up))
    session.choose_level(quiet=False, verbose=False)
    session.start_session()
    assert progress._level == "normal"
    again()
    assert progress._level == "verbose"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    session.start_session("normal")


@pytest.mark.skipif(sys.platform != "linux", reason="torch has such segments only on Linux")
def test_memory_of_a_gpu_grows_unless_the_user_has_set_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)
        if given:
            monkeypatch.setenv(given, "max_split_size_mb:64")
        session._let_gpu_memory_grow()
        grows = os.environ.get("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
        assert grows == (given is None)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20), reason="its tokenizers import torch"
)
def test_commands_import_what_they_need(data: Path, corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """A dataset is made and checked, and a tokenizer trained, without torch."""
    code = f"""
import sys
from tinygpt2.cli.app import main
def run(*arguments):
    try:
        main([*arguments, "-q"])
    except SystemExit as end:
        assert not end.code, arguments
run("train-tokenizer", {str(corpus)!r}, "--vocab-size", "300", "--out", {str(tmp_path / "t")!r})
assert "datasets" not in sys.modules
run("pregenerate", {str(corpus)!r}, "--tokenizer", {str(tokenizer_dir)!r}, "--sequence-length", "32", "--out",
    {str(tmp_path / "d")!r})
run("verify", {str(data)!r})
loaded = {{"torch", "accelerate", "matplotlib", "sklearn"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
