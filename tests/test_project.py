"""The project about itself: imports point one way, the library loads lazily, docs and examples are true."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import tinygpt2
from tinygpt2.cli.app import COMMANDS
from tinygpt2.cli.options import resolve

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "tinygpt2"

ORDER = [
    "errors", "utils.files", "utils.progress", "runtime.cpu", "runtime.launch", "runtime.signals", "config.base", "config", "utils.hub", "models.reference", "data.corpus.python_docs", "data.corpus.readers", "data.corpus.sources", "data.encoding", "data.tokenizer", "data.external_sort", "data.block_writers", "data.staging", "data.pregenerate", "data.block_readers", "data.dataset", "models.configuration", "models.loading", "models.activations", "objectives", "training.teacher_cache", "training.optimizers", "training.metrics", "training.state", "training.checkpoint", "evaluation.detokenize", "evaluation.stopwords", "evaluation.tasks", "evaluation.scoring", "evaluation.conventions", "evaluation.results", "evaluation.perplexity", "compression.importance", "compression.least_squares", "compression.truncate", "training.step", "planning.memory_estimate", "training.throughput", "training.failures", "training.loop", "planning.dry_run", "workflows.budget", "training.preparation", "workflows.train", "decoding.generation", "workflows.verification", "workflows.quickstart", "cli", "__main__",
]  # fmt: skip


def modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in SOURCE.rglob("*.py"):
        name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        if file.name == "__init__.py" and file.parent != SOURCE:
            continue  # nothing but a docstring
        whole = name.split(".")[0]
        found.setdefault(whole if whole in ("config", "objectives", "cli") and name not in ORDER else name, []).append(
            file
        )
    return found


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tinygpt2":
            module = node.module.removeprefix("tinygpt2").removeprefix(".")
            names |= {
                module,
                module.split(".")[0],
                *(f"{module}.{alias.name}".removeprefix(".") for alias in node.names),
            }
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tinygpt2.")}
    return names


def test_a_module_imports_only_from_modules_above_it() -> None:
    found = modules()
    assert set(found) - {"__init__"} == set(ORDER), "give a new module its place in ORDER"
    for name in ORDER:
        for file in found[name]:
            inside = {other for other in imported(file) if other in ORDER and other != name}
            below = {other for other in inside if ORDER.index(other) > ORDER.index(name)}
            assert not below, f"{file.relative_to(SOURCE)} imports {below} from below"


def test_public_names_load_lazily_and_are_all_there() -> None:
    code = "import sys, tinygpt2; assert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(tinygpt2.__all__) == set(tinygpt2._MODULE)
    for name in tinygpt2.__all__:
        assert getattr(tinygpt2, name).__doc__
    with pytest.raises(AttributeError):
        _ = tinygpt2.nothing


def test_every_command_is_a_public_function() -> None:
    for name, config, _, _ in COMMANDS:
        assert callable(getattr(tinygpt2, name.replace("-", "_")))
        assert getattr(tinygpt2, config.__name__) is config


def test_the_version_is_one() -> None:
    assert f'version = "{tinygpt2.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {tinygpt2.__version__}" in (ROOT / "CHANGELOG.md").read_text()


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("file", [file for file in EXAMPLES if "accelerate" in file.name], ids=lambda path: path.name)
def test_every_example_of_a_launch_is_one_of_accelerates(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(file)).num_processes == 8


@pytest.mark.parametrize(
    "file", [file for file in EXAMPLES if "accelerate" not in file.name], ids=lambda path: path.name
)
def test_every_example_resolves(file: Path) -> None:
    command = re.search(r"tinygpt2 ([a-z-]+) --config", file.read_text(encoding="utf-8"))[1]
    config = next(config for name, config, _, _ in COMMANDS if name == command)
    assert yaml.safe_load(resolve(config, str(file), {}).to_yaml())


def command_lines(file: Path) -> list[str]:
    """Every `tinygpt2 ...` line of a page's code blocks."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?tinygpt2 ", line)]


def test_no_page_has_a_blank_to_fill_in() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"@[A-Z]+@", page.read_text(encoding="utf-8")), page.name


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_documented_commands_are_accepted(page: Path, cli: Callable) -> None:
    """Each command line in README and docs resolves; nothing is run."""
    for line in command_lines(page):
        arguments = shlex.split(line, comments=True)[1:]
        if arguments[0] in {name for name, *_ in COMMANDS} and "--help" not in arguments:
            outcome = cli(*arguments, "--print-config")
            assert outcome.code == 0, f"{page.name}: {line}\n{outcome.err}"


def test_the_readmes_short_commands_run(
    teacher: Path, data: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable
) -> None:
    """The README's own-text recipe, step by step, on a text of a few kilobytes."""
    import shutil

    from tests.conftest import sentences

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-texts").mkdir()
    for index in range(30):
        (tmp_path / "my-texts" / f"{index}.txt").write_text(sentences(40, index), encoding="utf-8")
    (tmp_path / "mine.txt").write_text(sentences(80, 99), encoding="utf-8")
    shutil.copytree(teacher, tmp_path / "my-teacher")
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own text")[1].split("\n## ")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1]
    small = {"train-tokenizer": ["--vocab-size", "300"], "pregenerate": ["--sequence-length", "32"]}
    steps = ["--max-steps", "2"]
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump({"n_layer": 4, "n_embd": 16, "n_head": 2, "n_positions": 32}))
    ran = []
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        arguments = shlex.split(line, comments=True)[1:]
        if not arguments:
            continue
        command = arguments[0]
        arguments += small.get(command, []) + (steps if command in ("pretrain", "distill", "finetune") else [])
        arguments = [str(shape) if word == "gpt2-mini.yaml" else word for word in arguments]
        if command == "generate":
            arguments += ["--max-new-tokens", "5"]
        outcome = cli(*arguments)
        assert outcome.code == 0, f"{line}\n{outcome.err}"
        ran.append(command)
    assert ran == [
        "train-tokenizer",
        "pregenerate",
        "pretrain",
        "truncate-student",
        "distill",
        "ppl",
        "generate",
        "verify",
    ]
