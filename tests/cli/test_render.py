"""Results and errors as people see them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

import tinygpt2
from tinygpt2 import PplConfig, ppl
from tinygpt2.cli.output import render
from tinygpt2.cli.output.facts import plan_group, print_facts
from tinygpt2.cli.output.render import RENDER
from tinygpt2.compression.importance import DepthImportance, RemovalRound
from tinygpt2.compression.truncate import CutPerplexity, TruncateStudentResult
from tinygpt2.errors import ConfigError, InterruptedRunError, TinyGPT2Error
from tinygpt2.training.step import Evaluation
from tinygpt2.utils import hub, progress
from tinygpt2.workflows.train import TrainResult
from tinygpt2.workflows.verification import VerifyResult


def lines_of(result: object, width: int = 80) -> list[str]:
    file = io.StringIO()
    show = RENDER.get(type(result).__name__, print_facts)
    show(result, Console(file=file, width=width, force_terminal=True, color_system=None, highlight=False))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_every_result_that_has_a_table_of_its_own_exists() -> None:
    source = Path(tinygpt2.__file__).parent
    classes = {name for file in source.rglob("*.py") for name in re.findall(r"^class (\w+)", file.read_text(), re.M)}
    assert set(RENDER) <= classes


def test_nested_results_are_lines_below_a_heading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evaluation = Evaluation(4.9023, 134.6)
    result = TrainResult(
        model=str(tmp_path / "student"), steps=500, tokens=1_024_000, seconds=192.4, loss=0.0479, eval=evaluation,
        parameters=6_900_000, tokens_per_second=5333.3, peak_memory_bytes=1_234_000_000,
        eval_by_data={"a": evaluation}, tasks={"wikitext": 98.444},
    )  # fmt: skip
    assert lines_of(result) == [
        "model               student",
        "steps               500",
        "tokens              1,024,000",
        "time                3 min 12 s",
        "last training loss  0.0479",
        "on held-out blocks",
        "  loss              4.902",
        "  perplexity        134.6",
        "parameters          6,900,000",
        "tokens/s            5,333",
        "peak memory         1.2 GB",
        "on held-out blocks, by dataset",
        "  a",
        "    loss            4.902",
        "    perplexity      134.6",
        "perplexity on tasks",
        "  wikitext          98.44",
    ]


def test_a_cut_with_measurements_fits_80_columns() -> None:
    importance = DepthImportance(
        4.4, [0.5 / (1 + block) for block in range(24)],
        [RemovalRound({block: 0.01 * block + 0.1 for block in range(24)}, 0),
         RemovalRound({block: 0.02 * block for block in range(1, 24)}, 1)], list(range(2, 24)),
    )  # fmt: skip
    cut = TruncateStudentResult("/r/cut", [0, 3, 5], 1000, 2000, importance, CutPerplexity(140.4, 127.9, 64))
    lines = lines_of(cut)
    assert "blocks kept                0, 3, 5" in lines
    at = lines.index("held-out perplexity")
    assert [line.split() for line in lines[at + 1 : at + 4]] == [
        ["student", "before", "training", "140.4"], ["teacher", "127.9"], ["blocks", "measured", "64"],
    ]  # fmt: skip
    assert max(map(len, lines)) <= 80
    assert lines[-24].split() == ["0", "0.1", "-", "0.5", "removed", "in", "round", "1"]
    assert lines[-1].split()[-1] == "kept"


@dataclass(frozen=True)
class Plan:
    command: str
    teacher_parameters: int
    steps: int
    seconds: float
    memory_bytes: int
    disk_bytes: int
    disk_free_bytes: int


def test_a_plan_stands_in_groups() -> None:
    file = io.StringIO()
    print_facts(Plan("pretrain", 0, 100, 7500.0, 12_400_000, 1200, 3_200_000_000), Console(file=file), group=plan_group)
    assert [line.split(maxsplit=1) for line in file.getvalue().splitlines()] == [
        ["what", "runs"], ["command", "pretrain"], ["length"], ["steps", "100"], ["time", "2 h 5 min"], ["memory"],
        ["needed", "12.4 MB"], ["disk"], ["needed", "1.2 kB"], ["free", "3.2 GB"],
    ]  # fmt: skip


def test_problems_and_copies_of_verify_break_between_words() -> None:
    copies = {f"transformer.h.{block}.ln_1.weight": f"transformer.h.{2 * block}.ln_1.weight" for block in range(3)}
    lines = lines_of(
        VerifyResult("/r/m", "model", False, ["a fault that is told at length " * 5], ["a note"], None, copies)
    )
    assert lines[0] == "/r/m: model, faulty"
    assert lines[1].startswith("- a fault")
    assert lines[2].startswith("  ")
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "block 2 is a copy of the teacher's block 4 (1 tensors)"


def printed(error: TinyGPT2Error, monkeypatch: pytest.MonkeyPatch, **how: object) -> str:
    file = io.StringIO()
    monkeypatch.setattr(render, "open_console", lambda **_: Console(file=file, highlight=False, **how))
    render.print_error(error, as_json=False)
    return file.getvalue()


def test_errors_break_between_words_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ConfigError("a message of many words " * 8, "run this " * 12)
    shown = printed(error, monkeypatch, width=60, force_terminal=True, color_system="standard")
    assert "\x1b[1;31merror:" in shown
    lines = printed(error, monkeypatch, width=60, force_terminal=True, color_system=None).splitlines()
    assert max(map(len, lines)) <= 60
    assert {word for line in lines for word in line.split()} == {
        "error:", "a", "message", "of", "many", "words", "hint:", "run", "this",
    }  # fmt: skip


def test_a_run_that_was_stopped_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    message = "stopped after step 11 of 500; a checkpoint was saved"
    render.print_error(InterruptedRunError(message, "again"), as_json=False)
    assert capsys.readouterr().err == f"{message}\nhint: again\n"
    render.print_error(InterruptedRunError(message), as_json=True)
    assert f'"message": "{message}"' in capsys.readouterr().out


def test_no_piped_line_is_longer_than_200_characters(cli: Callable, teacher: Path, data: Path, tmp_path: Path) -> None:
    for arguments in (
        ["presets"], ["ppl", "--list-tasks"], ["verify", teacher, "--teacher", teacher], ["verify", data],
        ["truncate-student", "--teacher", teacher, "--num-layers", 2, "--out", tmp_path / "cut"],
        ["ppl", "--model", teacher, "--model", tmp_path / "cut", "--task", data],
        ["pretrain", "--model", teacher, "--data", data, "--out", tmp_path / "m", "--validate-only"],
    ):  # fmt: skip
        outcome = cli(*arguments)
        assert outcome.code == 0, outcome.err
        assert max(map(len, outcome.out.splitlines())) <= 200
    assert "teacher parameters" not in outcome.out


def test_ppl_says_which_model_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: Path, data: Path
) -> None:
    from tinygpt2.errors import ModelError
    from tinygpt2.evaluation import perplexity

    monkeypatch.chdir(tmp_path)
    progress.show()
    monkeypatch.setattr(perplexity, "download_size", lambda name, otherwise: otherwise)
    with pytest.raises(ModelError):
        ppl(PplConfig(task=[str(data)]))
    told = capsys.readouterr().err
    assert "measuring gpt2 (OpenAI's smallest, 124M parameters)\n" in told
    assert "about 548 MB to download\n" in told
    ppl(PplConfig(model=[str(teacher)], task=[str(data)]))
    assert "no --model" not in capsys.readouterr().err
    (tmp_path / "gpt2").symlink_to(teacher)
    row = ppl(PplConfig(task=[str(data)])).results[0]
    assert "no --model was given: measuring the directory gpt2\n" in capsys.readouterr().err
    assert row.model == str(tmp_path / "gpt2")


def test_the_size_of_a_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    import huggingface_hub

    assert hub.download_size("gpt2", 5) == 0  # HF_HUB_OFFLINE: nothing will be downloaded
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in (("model.safetensors", 7), ("x.bin", 9))]
    asked: list[dict] = []

    def info(_: object, name: str, **how: object) -> SimpleNamespace:
        asked.append(how)
        if name == "nowhere":
            raise OSError("no network")
        return SimpleNamespace(siblings=files)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    assert hub.download_size("some/model@main", 5) == 7
    assert hub.download_size("nowhere", 5) == 5
    assert asked[0] == {"revision": "main", "files_metadata": True, "timeout": 5}
