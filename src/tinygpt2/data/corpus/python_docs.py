"""Read the text that comes with every CPython: `help()` topics and the standard library's docstrings."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tinygpt2.utils.progress import follow


@cache
def python_docs() -> tuple[str, ...]:
    """Return the `help()` topics and the standard library's docstrings, about 2 MB on CPython 3.11.

    Each topic is one document. All docstrings of a module together are one document. Files are parsed, never imported.
    Installed packages and tests are left out, so that the text depends only on the Python version.
    """
    library = Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    texts = list(_topics(topics)) if topics.is_file() else []
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "pydoc_data",
    }
    files = [file for file in sorted(library.rglob("*.py")) if skipped.isdisjoint(file.relative_to(library).parts)]
    texts += ["\n\n".join(_docstrings(file)) for file in follow(files, "read python-docs", "files")]
    return tuple(text for text in texts if text)


def _topics(file: Path) -> Iterator[str]:
    for statement in _parse(file).body:
        if isinstance(statement, ast.Assign):
            yield from ast.literal_eval(statement.value).values()


def _docstrings(file: Path) -> Iterator[str]:
    for node in ast.walk(_parse(file)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _parse(file: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the parsed files cause warnings
        try:
            return ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            return ast.Module(body=[], type_ignores=[])
