"""Checks, each a session: `nox` runs them all, `nox -s lint` one.

Sessions that need torch share one environment, because torch is large; `minimums` has its own, with the
oldest dependencies that pyproject.toml promises, and `build` another, with nothing but the wheel.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "docs", "tests", "build", "minimums"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

CONSTRAINTS = ("-c", "constraints.txt")
# One thread for each of a few processes: small models gain nothing by more threads.
PYTEST = ("-m", "pytest", "-n", "logical", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TESTED_EXTRAS = ("plots", "tensorboard", "hdf5", "gguf", "onnx", "llamacpp")
# tests that need neither torch nor a model, for Python versions for which torch is too large to fetch
WITHOUT_TORCH = ("tests/config", "tests/data/test_corpus.py", "tests/test_without_torch.py")
# what the oldest versions of other libraries are tried with: a few tests that go through each of them
OTHER_LIBRARIES = (
    "tests/config",
    *(f"tests/cli/test_{name}.py" for name in ("completion", "help", "live_text", "usage_errors")),
    *(f"tests/data/test_{name}.py" for name in ("dataset", "encoding", "formats", "pairs", "tokenizer")),
    *(f"tests/evaluation/test_{name}.py" for name in ("perplexity", "plots")),
    *(f"tests/exporting/test_{name}.py" for name in ("engines", "export")),
    *(f"tests/models/test_{name}.py" for name in ("compatibility", "loading", "reference")),
    "tests/training/test_any_teacher.py",
    *(f"tests/utils/test_{name}.py" for name in ("hub", "progress")),
    *(f"tests/workflows/test_{name}.py" for name in ("push", "quickstart", "runs")),
)  # fmt: skip
PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))


def group(name: str) -> list[str]:
    """Return a dependency group's requirements."""
    return [item for item in PROJECT["dependency-groups"][name] if isinstance(item, str)]


def shared(session: nox.Session) -> str:
    """Make or reuse the one environment with torch, the package and every tool; return its Python."""
    folder = Path(".nox") / "shared"
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        session.run(sys.executable, "-m", "venv", str(folder), external=True)
    tools = [*group("test"), *group("types")]
    package = f".[{','.join(TESTED_EXTRAS)}]"
    session.run(str(python), "-m", "pip", "install", "-q", *CONSTRAINTS, "-e", package, *tools, external=True)
    return str(python)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install("-q", *CONSTRAINTS, *group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Strict types of the package and of the README's library examples."""
    session.run(shared(session), "-m", "mypy", external=True)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """The references of commands and API say what the program says."""
    python = shared(session)
    session.run(python, "docs/make_cli.py", "--check", external=True)
    session.run(python, "docs/make_api.py", "--check", external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The whole test suite."""
    session.run(shared(session), *PYTEST, *session.posargs, external=True, env=ONE_THREAD)


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """The wheel, installed where nothing else is."""
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "pip", "wheel", "-q", "--no-deps", *CONSTRAINTS, "-w", folder, ".")
        (wheel,) = Path(folder).glob("*.whl")
        session.install("-q", *CONSTRAINTS, str(wheel))
        session.chdir(folder)
        session.run("tinygpt2", "--help", silent=True)
        session.run("tinygpt2", "--version")
        session.run("python", "-c", "import tinygpt2; tinygpt2.distill, tinygpt2.quickstart")


@nox.session
def harness(session: nox.Session) -> None:
    """Perplexity and choice tasks beside lm-evaluation-harness, which is large: by hand, with TINYGPT2_TEST_DATA."""
    session.install("-q", *CONSTRAINTS, "-e", ".", "lm-eval==0.4.13")
    session.run("python", "benchmarks/harness.py", *session.posargs)
    session.run("python", "benchmarks/choice_tasks.py", "--agreement")


@nox.session
def trl(session: nox.Session) -> None:
    """GKD's loss beside TRL's function, by hand."""
    session.install("-q", *CONSTRAINTS, "-e", ".", "trl")
    session.run("python", "benchmarks/gkd_trl.py")


@nox.session(venv_backend="none")
def browser(session: nox.Session) -> None:
    """The browser example with a tiny student, in node and in headless Chromium: by hand only, with node and npm."""
    python = shared(session)
    found = shutil.which("chromium") or shutil.which("google-chrome") or ""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "student"
        session.run(python, "examples/browser/make_student.py", str(out), external=True)
        with session.chdir("examples/browser"):
            session.run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", external=True)
            session.run("node", "build.mjs", str(out / "int8"), external=True)
            env = {"CHROMIUM": os.environ.get("CHROMIUM", found)}
            session.run("node", "check.mjs", str(out / "expected.json"), external=True, env=env)


@nox.session
def deepspeed(session: nox.Session) -> None:
    """DeepSpeed's ways of sharding, which need a C++ compiler: by hand only."""
    session.install("-q", *CONSTRAINTS, "-e", ".[plots]", "ninja", *group("test"))
    session.install("-q", *CONSTRAINTS, "--no-build-isolation", "setuptools", "wheel", "deepspeed")
    session.run("python", "-m", "pytest", "tests/runtime/test_launch.py", "-k", "sharded")


@nox.session(python=["3.11", "3.12", "3.13"])
def pythons(session: nox.Session) -> None:
    """What needs no torch, on every Python that is declared: by hand only."""
    needs_torch = ("torch", "accelerate")
    without = [item for item in PROJECT["project"]["dependencies"] if not item.startswith(needs_torch)]
    session.install("-q", *CONSTRAINTS, *without, *group("test"))
    session.install("-q", "--no-deps", "-e", ".")
    session.run("python", "-m", "pytest", "-m", "not needs_torch", *WITHOUT_TORCH, *session.posargs)


@nox.session
def minimums(session: nox.Session) -> None:
    """What other libraries take part in, with the oldest versions that are promised; torch stays at its constraint."""
    extras = [item for name in TESTED_EXTRAS for item in PROJECT["project"]["optional-dependencies"][name]]
    promised = [item for item in PROJECT["project"]["dependencies"] if not item.startswith("torch>")]
    oldest = [item.replace(">=", "==") for item in [*promised, *extras]]
    torch = next(line for line in Path("constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    session.install("-q", torch, *oldest, *group("test"))
    session.install("-q", "--no-deps", "-e", ".")
    # An old dependency may warn of what newer ones have mended: here only failures count.
    ignore = ["-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"]
    session.run("python", *PYTEST, "-m", "not slow", *ignore, *OTHER_LIBRARIES, env=ONE_THREAD)
