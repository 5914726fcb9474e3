"""What needs no torch: help, options, early errors, and texts to datasets. It also runs where torch is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tinygpt2.cli.app import COMMANDS

NAMES = [command.name for command in COMMANDS]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help(name: str, cli: Callable) -> None:
    outcome = cli(name, "--help")
    assert outcome.code == 0
    assert "--config" in outcome.out


def test_presets_are_listed(cli: Callable) -> None:
    assert len(cli("presets", "--json").json["presets"]) > 3


def test_wrong_options_are_told(cli: Callable) -> None:
    outcome = cli("distill", "--teacher", "t", "--student", "s", "--data", "d", "--out", "o", "--temperature", "warm")
    assert outcome.code == 2
    assert "--temperature" in outcome.err
    assert cli("pretrain", "--data", "d", "--out", "o").code == 2


@pytest.mark.parametrize("kind", ["arrow", "jsonl"])
def test_texts_become_a_dataset(kind: str, corpus: Path, tokenizer_dir: Path, tmp_path: Path, cli: Callable) -> None:
    arguments = (corpus, "--tokenizer", tokenizer_dir, "--sequence-length", 32, "--format", kind)
    made = cli("pregenerate", *arguments, "--out", tmp_path / "d", "--json")
    assert made.code == 0, made.err
    assert made.json["sequences"]["train"] > 100
    checked = cli("verify", tmp_path / "d", "--json")
    assert checked.code == 0
    assert checked.json["ok"]


def test_hdf5_without_h5py_says_how_to_get_it(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable
) -> None:
    monkeypatch.setattr("tinygpt2.config.data.find_spec", lambda name: None)
    arguments = (corpus, "--tokenizer", tokenizer_dir, "--sequence-length", 32, "--out", tmp_path / "d")
    outcome = cli("pregenerate", *arguments, "--format", "hdf5")
    assert outcome.code == 2
    assert "pip install 'tinygpt2[hdf5]'" in outcome.err


def test_an_hdf5_dataset_without_h5py_says_how_to_get_it(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable
) -> None:
    pytest.importorskip("h5py")
    arguments = (corpus, "--tokenizer", tokenizer_dir, "--sequence-length", 32, "--out", tmp_path / "d")
    assert cli("pregenerate", *arguments, "--format", "hdf5").code == 0
    monkeypatch.setitem(sys.modules, "h5py", None)
    outcome = cli("verify", tmp_path / "d")
    assert outcome.code == 2, outcome.out + outcome.err
    assert "pip install 'tinygpt2[hdf5]'" in outcome.err
