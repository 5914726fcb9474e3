"""Where text comes from: sources in, documents out, one at a time.

A source is a text file, a directory of files, a `.jsonl` file, `-` (standard input) or `python-docs` (the
documentation that every CPython brings along). To add one, give `documents` another branch.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from tinygpt2.errors import DataError
from tinygpt2.progress import track

PYTHON_DOCS = "python-docs"


def documents(sources: Iterable[str], document: str | None = None, text_column: str = "text") -> Iterator[str]:
    """Yield the documents of all sources, in order; blank ones are passed over.

    Args:
        sources: file or directory paths, `-`, or `python-docs`.
        document: what a document is in a text file: `file` (default), `line`, `blank-line` or
            `separator:REGEX`.
        text_column: the field of a JSON line that holds the text.

    Raises:
        DataError: a source is missing, is not UTF-8 (file and byte offset are named), or a JSON line is
            broken or lacks the field (file and line are named).
    """
    for source in sources:
        if source == PYTHON_DOCS:
            found: Iterable[str] = python_docs()
        elif source == "-":
            found = _split(_decode(sys.stdin.buffer.read(), "standard input"), document or "file")
        else:
            found = _from_path(Path(source), document or "file", text_column)
        yield from (text for text in found if text.strip())


def size_hint(sources: Iterable[str]) -> int | None:
    """Return about how many bytes of text the sources hold, for a progress bar; None if nobody can know."""
    total = 0
    for source in sources:
        if source == "-":
            return None
        if source == PYTHON_DOCS:
            total += sum(len(text.encode()) for text in python_docs())
        elif Path(source).exists():
            total += sum(file.stat().st_size for file in _files(Path(source)))
    return total


def _from_path(path: Path, document: str, text_column: str) -> Iterator[str]:
    for file in _files(path):
        if file.suffix == ".jsonl":
            yield from _json_lines(file, text_column)
        elif document == "line":
            yield from _lines(file)
        else:
            yield from _split(read_text(file), document)


def _files(path: Path) -> Iterator[Path]:
    """Yield the file itself, or a directory's files in sorted order, hidden ones left out."""
    if path.is_dir():
        inside = (file for file in sorted(path.rglob("*")) if file.is_file())
        yield from (file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts))
    elif path.exists():
        yield path
    else:
        raise DataError(f"no such file or directory: {path}", "a SOURCE is a file, a directory, - or python-docs")


def read_text(file: Path) -> str:
    """Read a whole UTF-8 file, line ends as they are.

    Raises:
        DataError: it cannot be read, or is not UTF-8 (the byte offset is named).
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    return _decode(raw, str(file))


def _decode(raw: bytes, name: str, offset: int = 0) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: not UTF-8: {error.reason} at byte {offset + error.start}",
            "convert it, for example with iconv -t UTF-8",
        ) from error


def _raw_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end), reading as it goes."""
    offset = 0
    try:
        with file.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                yield number, _decode(raw, str(file), offset).rstrip("\r\n")
                offset += len(raw)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def _lines(file: Path) -> Iterator[str]:
    return (text for _, text in _raw_lines(file))


def _json_lines(file: Path, text_column: str) -> Iterator[str]:
    for number, line in _raw_lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{number}: not valid JSON: {error.msg} at column {error.colno}") from error
        except UnicodeEncodeError as error:
            raise DataError(f"{file}:{number}: half of a surrogate pair, which is no text") from error
        if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{file}:{number}: no text in field {text_column!r} (found: {keys})",
                "name it with --text-column",
            )
        yield row[text_column]


def _split(text: str, document: str) -> Iterator[str]:
    if document == "file":
        yield text
    elif document == "line":
        yield from (line.removesuffix("\r") for line in text.split("\n"))
    else:
        pattern = r"\r?\n[ \t\r]*\n\s*" if document == "blank-line" else document.removeprefix("separator:")
        start = 0
        for match in re.finditer(pattern, text):
            yield text[start : match.start()]
            start = match.end()
        yield text[start:]


@cache
def python_docs() -> tuple[str, ...]:
    """Return the `help()` topics and the standard library's docstrings, about 2 MB on CPython 3.11.

    A topic is a document, and so are the docstrings of one module together. Files are parsed, never
    imported. Installed packages and tests are left out, so that the text depends on the Python version alone.
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
    with track("read python-docs", len(files)) as task:
        for file in files:
            texts.append("\n\n".join(_docstrings(file)))
            task.advance()
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
        warnings.simplefilter("ignore")  # escapes in other people's docstrings
        try:
            return ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            return ast.Module(body=[], type_ignores=[])
