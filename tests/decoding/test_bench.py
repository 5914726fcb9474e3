from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import make_model
from tinygpt2 import BenchConfig, bench


def test_rows_of_every_model(teacher: Path, tmp_path: Path, cli: Callable) -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    llama.save_pretrained(tmp_path / "llama")
    asked = ["--new-tokens", 8, "--turns", 1]
    found = cli("bench", teacher, tmp_path / "llama", *asked, "--json").json
    keys = {
        "model", "precision", "batch", "first_token_seconds", "tokens_per_second", "bandwidth_share",
        "transformers_tokens_per_second",
    }  # fmt: skip
    rows = found["results"]
    assert all(keys <= set(row) for row in rows)
    of = {
        name: [(row["precision"], row["batch"]) for row in rows if row["model"] == str(name)]
        for name in (teacher, tmp_path / "llama")
    }
    assert of[teacher] == [(kind, batch) for kind in ("fp32", "bf16", "int8") for batch in (1, 8)]
    assert of[tmp_path / "llama"] == [("fp32", 1), ("fp32", 8)]
    first = rows[0]
    assert first["bytes_per_token"] == 4 * (4 * (12 * 32 * 32 + 9 * 32) + 320 * 32)
    assert first["bandwidth_share"] == pytest.approx(
        first["bytes_per_token"] * first["tokens_per_second"] / found["bandwidth"]
    )
    assert 1e8 < found["bandwidth"] < 1e13
    shown = cli("bench", teacher, *asked).out
    assert "memory bandwidth" in shown
    assert "int8" in shown


def test_few_positions_are_enough(tmp_path: Path) -> None:
    small = make_model(tmp_path / "m", None, n_positions=2)
    assert {row.batch for row in bench(BenchConfig(model=[str(small)], turns=1)).results} == {1, 8}
