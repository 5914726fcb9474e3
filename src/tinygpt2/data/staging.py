"""Unfinished work beside its result: what an interrupted `pregenerate` leaves for `--resume`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinygpt2.errors import ConfigError, DataError, UnreadableError
from tinygpt2.utils.files import read_json, write_json
from tinygpt2.utils.progress import say

_SETTINGS = "settings.json"


def staging_path(out: Path) -> Path:
    """Return where a dataset is made before it is put in place."""
    return out.parent / f".{out.name}.unfinished"


@contextmanager
def staging_directory(out: Path, settings: dict[str, Any], *, resume: bool) -> Iterator[Path]:
    """Yield the directory of unfinished work: an earlier run's to continue, else an empty one.

    It goes when the result is in place, or when the data are at fault; what is finished is kept otherwise.

    Args:
        out: where the result will be put.
        settings: all that decides the result; a run is continued only under the same.
        resume: continue, rather than start over.
    """
    work = staging_path(out)
    if resume and (work / _SETTINGS).is_file():
        require_same(settings, read_json(work / _SETTINGS), work)
        say(f"continuing the interrupted run in {work}")
    else:
        if work.exists():
            say(f"starting over: {work} held an interrupted run")
            discard(work)
        work.mkdir(parents=True)
        write_json(work / _SETTINGS, settings)
    try:
        yield work
    except UnreadableError:
        raise
    except (DataError, ConfigError):
        discard(work)
        raise
    except OSError as error:
        raise DataError(
            f"cannot write to {work}: {error.strerror or error}", "make room, then add --resume to go on"
        ) from error
    discard(work)


def discard(work: Path) -> None:
    """Remove unfinished work."""
    (work / _SETTINGS).unlink(missing_ok=True)  # first: what is left of a half removed one is continued by nobody
    shutil.rmtree(work, ignore_errors=True)


def require_same(settings: dict[str, Any], before: dict[str, Any], where: Path) -> None:
    """Check that a run to continue is the same.

    Raises:
        ConfigError: something that decides the result differs (it is named).
    """
    changed = sorted(key for key in settings if settings[key] != before.get(key))
    if changed:
        words = ", ".join("the sources' files" if key == "read" else key for key in changed)
        raise ConfigError(
            f"--resume: {words} differ from the run in {where}",
            "leave --resume out to start over, or name another --out",
        )
