"""Writing without surprises: temporary names, renames, and output directories that are really free."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tinygpt2.errors import ConfigError, DataError, UnreadableError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that becomes `path` if the block succeeds, else vanishes.

    Works for a file and for a directory alike; the block decides which it makes. An existing directory
    at `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary = scratch / path.name
    try:
        yield temporary
        replaced = scratch / "replaced"
        if path.is_dir():
            path.replace(replaced)
        try:
            temporary.replace(path)
        except OSError:
            if replaced.exists():
                replaced.replace(path)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file in one rename."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON in one rename."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until a file or a directory's list of names is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_contents(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory whose files move into `directory`, one rename each, on success."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=directory) as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            file.replace(directory / file.name)


def absolute(name: str) -> str:
    """Return a name that is a path here as an absolute path, and any other name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def require_free(out: Path, hint: str) -> None:
    """Check that nothing would be overwritten in `out`.

    Raises:
        ConfigError: `out` is a file, or a directory that is not empty.
    """
    if out.is_file():
        raise ConfigError(f"--out {out} is a file", "name a directory")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty", hint)


def not_utf8(name: str, error: UnicodeDecodeError, offset: int = 0) -> DataError:
    """Return the error that names file and byte."""
    return DataError(
        f"{name}: not UTF-8: {error.reason} at byte {offset + error.start}",
        "convert it, for example with iconv -t UTF-8; a corpus may be read with --encoding-errors replace",
    )


def open_file(path: Path) -> IO[bytes]:
    """Open a file for reading.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise UnreadableError(f"cannot read {path}: {error.strerror}") from error


def read_text(path: Path) -> str:
    """Read a whole UTF-8 file, line ends as they are.

    Raises:
        DataError: it cannot be read, or is not UTF-8 (the byte offset is named).
    """
    with open_file(path) as stream:
        try:
            return stream.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(str(path), error) from error
