"""The project about itself: imports point one way, the library loads lazily, docs and examples are true."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import tinygpt2
from tinygpt2.cli.commands import COMMANDS
from tinygpt2.cli.options import resolve
from tinygpt2.data.dataset import load_packed_dataset

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "tinygpt2"

LEVELS = [
    "errors", "utils", "config", "runtime", "data", "models", "alignment", "objectives", "decoding", "evaluation",
    "compression", "training", "planning", "exporting", "workflows", "cli", "__main__",
]  # fmt: skip
MAP = ROOT / "docs" / "architecture.md"


def modules(source: Path) -> list[str]:
    """Every module below a package's folder, as `data.corpus.readers`; packages themselves hold nothing."""
    files = [file for file in source.rglob("*.py") if file.name != "__init__.py"]
    return [".".join(file.relative_to(source).with_suffix("").parts) for file in files]


def mapped() -> list[str]:
    """The modules in the order of the map: under a heading that names the package, a row for each module."""
    found, package = [], ""
    for line in MAP.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"#+ .*?`([\w/]+)/`", line):
            package = heading[1].replace("/", ".") + "."
        elif heading := re.match(r"#+ ", line):
            package = ""
        elif row := re.match(r"\| `(\w+)\.py`", line):
            found.append(package + row[1])
    return found


def imported(file: Path) -> set[str]:
    """What a file imports of this package: modules, or names in them."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tinygpt2":
            module = node.module.removeprefix("tinygpt2").removeprefix(".")
            names |= {module, *(f"{module}.{alias.name}".removeprefix(".") for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("tinygpt2.") for alias in node.names if alias.name.startswith("tinygpt2.")
            }
    return names


def wrong_imports(source: Path, order: list[str]) -> list[str]:
    """Say for each module which modules it imports that come after it."""
    place = {name: number for number, name in enumerate(order)}
    return [
        f"{name} imports {other}"
        for name in modules(source)
        for other in imported(source / Path(*name.split(".")).with_suffix(".py"))
        if place.get(other, -1) > place[name]
    ]


def test_the_map_lists_every_module_once_and_keeps_the_order_of_the_levels() -> None:
    order = mapped()
    assert sorted(order) == sorted(modules(SOURCE))
    levels = [LEVELS.index(name.split(".")[0]) for name in order]
    assert levels == sorted(levels)


def test_a_module_imports_only_from_modules_above_it() -> None:
    assert wrong_imports(SOURCE, mapped()) == []


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("utils/files", "from tinygpt2.data.dataset import Blocks", "utils.files imports data.dataset"),
        ("data/encoding", "from tinygpt2.data import pregenerate", "data.encoding imports data.pregenerate"),
        ("models/card", "import tinygpt2.training.loop", "models.card imports training.loop"),
    ],
)
def test_a_planted_wrong_import_is_found(tmp_path: Path, module: str, line: str, found: str) -> None:
    shutil.copytree(SOURCE, tmp_path / "tinygpt2")
    file = tmp_path / "tinygpt2" / f"{module}.py"
    file.write_text(file.read_text(encoding="utf-8") + f"\n\ndef late() -> None:\n    {line}\n", encoding="utf-8")
    assert wrong_imports(tmp_path / "tinygpt2", mapped()) == [found]


def test_files_and_functions_are_read_in_one_sitting() -> None:
    for file in SOURCE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 350, f"{file.relative_to(SOURCE)} is long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file.relative_to(SOURCE)}: {node.name} is long"
    for folder in {file.parent for file in SOURCE.rglob("*.py")}:
        assert len([file for file in folder.glob("*.py") if file.name != "__init__.py"]) <= 13, folder


def test_public_names_load_lazily_and_are_all_there() -> None:
    code = "import sys, tinygpt2; assert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(tinygpt2.__all__) == set(tinygpt2._MODULE)
    for name in tinygpt2.__all__:
        assert getattr(tinygpt2, name).__doc__, name
    with pytest.raises(AttributeError):
        _ = tinygpt2.nothing


def test_every_command_is_a_public_function() -> None:
    for command in COMMANDS:
        assert callable(getattr(tinygpt2, command.name.replace("-", "_")))
        assert getattr(tinygpt2, command.config.__name__) is command.config


def test_a_configurations_signature_lists_its_options() -> None:
    for command in COMMANDS:
        parameters = inspect.signature(command.config).parameters
        assert set(parameters) == set(command.config.arguments())
    found = inspect.signature(tinygpt2.DistillConfig).parameters
    assert found["data"].default is inspect.Parameter.empty
    assert found["temperature"].default == 1.0
    assert "int | None" in str(found["max_steps"])
    with pytest.raises(tinygpt2.ConfigError, match="unknown option 'temprature', did you mean 'temperature'"):
        tinygpt2.DistillConfig(teacher="t", student="s", data="d", out="o", temprature=2)


def test_public_functions_return_public_types() -> None:
    for name in tinygpt2.__all__:
        value = getattr(tinygpt2, name)
        if inspect.isfunction(value):
            result = inspect.signature(value).return_annotation
            assert all(part in tinygpt2.__all__ for part in re.findall(r"\w+", str(result))), name


@pytest.mark.parametrize(
    ("flag", "function"), [("validate_only", "plan_run"), ("compile_only", "compile_step"), ("plan", "plan_budget")]
)
def test_training_functions_only_train(flag: str, function: str) -> None:
    config = tinygpt2.DistillConfig(teacher="t", student="s", data="d", out="o", **{flag: True})
    with pytest.raises(tinygpt2.ConfigError, match=f"tinygpt2.{function}"):
        tinygpt2.distill(config)


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
    config = next(one.config for one in COMMANDS if one.name == command)
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
        if arguments[0] in {command.name for command in COMMANDS} and "--help" not in arguments:
            outcome = cli(*arguments, "--print-config")
            assert outcome.code == 0, f"{page.name}: {line}\n{outcome.err}"


def test_the_readmes_short_commands_run(
    teacher: Path, data: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable
) -> None:
    """The README's own-text recipe, step by step, on a text of a few kilobytes."""
    from tests.conftest import sentences

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-texts").mkdir()
    for index in range(30):
        (tmp_path / "my-texts" / f"{index}.txt").write_text(sentences(40, index), encoding="utf-8")
    (tmp_path / "mine.txt").write_text(sentences(80, 99), encoding="utf-8")
    shutil.copytree(teacher, tmp_path / "my-teacher")
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## I have only text")[1].split("\n## ")[0]
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


def example() -> ModuleType:
    """examples/library.py as a module."""
    spec = importlib.util.spec_from_file_location("library", ROOT / "examples" / "library.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_library_examples_are_those_of_the_program() -> None:
    program = (ROOT / "examples" / "library.py").read_text(encoding="utf-8")
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## As a library")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert block[block.index("def ") :] in program


def test_the_library_examples_run(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = example()
    data = library.make_data(str(corpus), str(tmp_path), vocab_size=300, sequence_length=32)
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump({"n_layer": 3, "n_embd": 16, "n_head": 2, "n_positions": 32}))
    dataset = load_packed_dataset(data)
    rows = [{"input_ids": dataset.train.row(index)} for index in range(16)]
    teacher = library.train_on_rows(rows, rows[:2], dataset.tokenizer(), str(shape), str(tmp_path / "teacher"))
    student = library.make_student(teacher.model, data, str(tmp_path), steps=2)
    assert student.steps == 2
    library.compare([teacher.model, student.model], data)
    assert re.findall(r"perplexity ([\d.]+) per token", capsys.readouterr().out)


def test_a_type_checker_finds_a_misspelled_option(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    file = tmp_path / "wrong.py"
    file.write_text(
        "import tinygpt2\n"
        "right = tinygpt2.DistillConfig(teacher='t', student='s', data='d', out='o', temperature=2)\n"
        "tinygpt2.DistillConfig(teacher='t', student='s', data='d', out='o', temprature=2)\n"
        "tinygpt2.DistillConfig(teacher='t', student='s', out='o')\n"
        "tinygpt2.PretrainConfig(model_config='gpt2', data='d', out='o', max_steps='many')\n"
    )
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", str(file)], capture_output=True, text=True)
    problems = [
        line.split("error: ")[1] for line in done.stdout.splitlines() if "wrong.py" in line and "error: " in line
    ]
    assert len(problems) == 3, done.stdout
    assert 'Unexpected keyword argument "temprature"' in problems[0]
    assert 'Missing named argument "data"' in problems[1]
    assert 'Argument "max_steps"' in problems[2]
