"""Shell completion: commands, options, and the values that have names."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from tinygpt2.cli.app import app

RUNNER = CliRunner()


def completed(shell: str, line: str) -> str:
    """What the program answers to a shell that completes the last word of a line."""
    words = line.split(" ")
    environment = {
        "_TINYGPT2_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    return RUNNER.invoke(app, [], prog_name="tinygpt2", env=environment).output


@pytest.mark.parametrize(
    ("line", "there"),
    [
        ("tinygpt2 pre", {"pregenerate", "pretrain", "presets"}),
        ("tinygpt2 distill --max-", {"--max-steps", "--max-tokens"}),
        ("tinygpt2 pretrain --model-config gpt2-", {"gpt2-large", "gpt2-medium", "gpt2-xl"}),
        ("tinygpt2 distill --student tiny", {"tinygpt2-4l-312"}),
        ("tinygpt2 distill --recipe t", {"tinygpt2", "truncation"}),
        ("tinygpt2 ppl --task a", {"all", "arc-challenge", "arc-easy"}),
        ("tinygpt2 ppl --task cbt", {"cbt-cn", "cbt-ne"}),
        ("tinygpt2 truncate-student --strategy ", {"uniform", "alternate", "distilgpt2", "first", "middle", "last",
                                                   "importance"}),
        ("tinygpt2 distill --layer-map ", {"uniform", "last", "first"}),
        ("tinygpt2 pretrain --report-to ", {"tensorboard", "wandb"}),
        ("tinygpt2 pretrain --data ", set()),
    ],
)  # fmt: skip
def test_bash_completes_names_and_leaves_files_to_the_shell(line: str, there: set[str]) -> None:
    assert set(completed("bash", line).split()) >= there
    if line.split(" ")[-2].startswith("--"):
        assert set(completed("bash", line).split()) == there


def test_fish_and_zsh_get_one_line_for_each_name() -> None:
    lines = completed("fish", "tinygpt2 pre").splitlines()
    assert [line.split("\t")[0] for line in lines] == ["pregenerate", "pretrain", "presets"]
    assert all(line.split("\t")[1] for line in lines)
    assert '"uniform"' in completed("zsh", "tinygpt2 truncate-student --strategy u")
    assert '"--max-steps":"Number of optimizer steps."' in completed("zsh", "tinygpt2 pretrain --max-s")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_shown(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    from typer.completion import get_completion_script

    script = get_completion_script(prog_name="tinygpt2", complete_var="_TINYGPT2_COMPLETE", shell=shell)
    shown = RUNNER.invoke(app, ["--show-completion", shell], prog_name="tinygpt2").output
    assert "_TINYGPT2_COMPLETE" in shown
    assert shown.strip() == script.strip()
