"""Read and write files safely.

Writers use a temporary name and then rename, so that no half-written file is left. Output directories must be empty.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tinygpt2.errors import ConfigError, DataError, UnreadableError

LOCK_INSIDE = ".lock"  # in an output directory, see utils/locks.py; it does not count as content


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`. It becomes `path` if the block succeeds; otherwise it is removed.

    The block may make a file or a directory there. An existing file at `path` is replaced, and so is an existing
    directory, but only by a directory. Of a link, it is what the link leads to.

    Raises:
        IsADirectoryError: a file would replace a directory.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary = scratch / path.name
    try:
        yield temporary
        replaced = scratch / "replaced"
        if path.is_dir():
            if temporary.is_file():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
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
    """Write a UTF-8 file under a temporary name and rename it."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON under a temporary name and rename it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a directory's list of files, is physically on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged_files(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory. If the block succeeds, its files move into `directory`, with one rename each.

    What a killed process left of such a directory is removed: nobody else may write to `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=directory) as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            file.replace(directory / file.name)


def absolute(name: str) -> str:
    """Return the absolute path if a file or directory of that name exists, otherwise the name unchanged.

    A link keeps its own name, unless the path leads up again.
    """
    path = Path(name).absolute()
    if not path.exists():
        return name
    return str(path.resolve() if ".." in path.parts else path)


_FOLDERS = re.compile(r"(?<![\w/.:~<\\-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"`,;|<>()]+[/\\])+(?=[^\s/\\'\"`,;|<>()])")


def shared_name(name: str) -> str:
    """Return a path as other people may see it: only the last name of one that names folders of this machine."""
    path = Path(name).expanduser()
    return path.name or name if path.is_absolute() or ".." in path.parts else name


def shared_text(text: str) -> str:
    """Return a text whose absolute paths are shortened to their last names."""
    return _FOLDERS.sub("", text)


def folders_named(text: str) -> list[str]:
    """Return the folders of this machine that a text names by an absolute path."""
    found = (match[0] for match in _FOLDERS.finditer(text))
    return [name for name in dict.fromkeys(found) if Path(*Path(name).expanduser().parts[:2]).is_dir()]


def require_free(out: Path, hint: str) -> None:
    """Check that writing to `out` would not overwrite anything. Leftovers of a killed process do not count.

    Raises:
        ConfigError: `out` is a file, or a directory that is not empty.
    """
    if out.is_file():
        raise ConfigError(f"--out {out} is a file", "give a directory")
    if not is_free(out):
        raise ConfigError(f"--out {out} is not empty", hint)


def require_replaceable(out: Path) -> None:
    """Check that what is made next to `out` can take its place.

    Raises:
        ConfigError: `out` is a mount point, such as a volume in a container.
    """
    if os.path.ismount(out):
        raise ConfigError(f"--out {out} is a mount point, which cannot be replaced in one step", "give a folder in it")


def is_free(out: Path) -> bool:
    """Return whether an output directory is missing, or holds only a lock and leftovers of a killed process."""
    return not out.is_dir() or all(file.name == LOCK_INSIDE or _is_scratch(file) for file in out.iterdir())


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary directories that a killed process left; nobody else may write there."""
    for path in filter(_is_scratch, directory.glob("*")):
        shutil.rmtree(path, ignore_errors=True)


def _is_scratch(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".tmp" and path.is_dir()


def not_utf8(name: str, error: UnicodeDecodeError, offset: int = 0) -> DataError:
    """Return an error with the file's name and the position of the first invalid byte.

    Args:
        name: the file's name.
        error: the decoding error.
        offset: position in the file of the bytes that were decoded.
    """
    return DataError(
        f"{name}: not UTF-8: {error.reason} at byte {offset + error.start}",
        "convert the file, for example with iconv -t UTF-8; for a corpus, --encoding-errors replace also helps",
    )


def require_valid(text: str, where: str) -> None:
    """Check that a text has no half of a surrogate pair, as JSON's escapes can.

    Raises:
        DataError: it has one. The message begins with `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a surrogate pair, which is not valid text",
            "use --encoding-errors replace or --encoding-errors skip, or a dataset that pregenerate made with it",
        ) from error


def open_file(path: Path) -> IO[bytes]:
    """Open a file for reading.

    Raises:
        UnreadableError: the file cannot be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise UnreadableError(f"cannot read {path}: {error.strerror}") from error


def read_text(path: Path) -> str:
    """Read a whole UTF-8 file without changing its line ends. A byte-order mark is left out.

    Raises:
        DataError: the file cannot be read, or is not UTF-8 (the message gives the byte offset).
    """
    with open_file(path) as stream:
        raw = stream.read()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), error) from error
