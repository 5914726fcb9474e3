"""The directory of unfinished work, which an interrupted `pregenerate` leaves next to --out for `--resume`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinygpt2.errors import ConfigError, DataError, UnreadableError, explained
from tinygpt2.utils.files import read_json, write_json
from tinygpt2.utils.progress import say

_SETTINGS = "settings.json"


def staging_path(out: Path) -> Path:
    """Return the directory in which a dataset is made before it is moved to `out`."""
    return out.parent / f".{out.name}.unfinished"


@contextmanager
def staging_directory(
    out: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool, again: bool = True
) -> Iterator[Path]:
    """Yield the directory of unfinished work: that of an earlier run to continue, otherwise an empty one.

    The directory is removed when the block ends normally, or after an error in the data or the options. It is kept
    after an interruption, a full disk or a source that could not be read this time, so that the run can continue.

    Args:
        out: the directory of the result.
        settings: everything that the result depends on. A run continues only with equal settings.
        resume: continue an earlier run, if there is one, instead of starting over.
        overwrite: start over, and delete the unfinished work of an earlier run, if there is any.
        again: whether the sources can be read again. Otherwise an interruption leaves nothing behind.

    Raises:
        ConfigError: there is unfinished work, and the options say neither to continue nor to start over; or the run to
            continue has other settings; or the directory cannot be written.
        MachineError: the disk is full or cannot be written for another reason.
    """
    work = staging_path(out)
    with explained(f"cannot write to {work}", "then add --resume to continue", DataError):
        _begin(work, settings, resume=resume, overwrite=overwrite)
        try:
            yield work
        except UnreadableError:
            raise
        except (DataError, ConfigError):
            discard(work)
            raise
        except KeyboardInterrupt:
            if not again:
                discard(work)
            raise
    discard(work)


def _begin(work: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Make the directory of unfinished work, or check that the one of an earlier run can be continued."""
    if (work / _SETTINGS).is_file():  # perhaps of a run that was to replace a complete dataset
        if resume:
            require_same(settings, read_json(work / _SETTINGS), work)
            say(f"continuing the interrupted run in {work}")
            return
        if not overwrite:
            raise ConfigError(
                f"{work} holds the unfinished work of an interrupted run",
                "add --resume to continue it, or --overwrite to start over",
            )
        say(f"starting over: the unfinished work in {work} is deleted")
    discard(work)  # without its settings, a directory is left of a run that had just begun or was being deleted
    work.mkdir(parents=True)
    write_json(work / _SETTINGS, settings)


def discard(work: Path) -> None:
    """Remove unfinished work."""
    (work / _SETTINGS).unlink(missing_ok=True)  # first, so that no run continues from a partly removed directory
    shutil.rmtree(work, ignore_errors=True)


def is_unfinished(out: Path) -> bool:
    """Return whether an interrupted run has left work that can be continued."""
    return (staging_path(out) / _SETTINGS).is_file()


def put_in_place(result: Path, out: Path) -> None:
    """Move a complete dataset to `out`, and what is there out of its way; no unfinished work is left then."""
    replaced = staging_path(out) / "replaced"
    try:
        if out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            out.replace(replaced)
        result.replace(out)
    except BaseException:
        put_back(out)
        raise
    (staging_path(out) / _SETTINGS).unlink(missing_ok=True)


def put_back(out: Path) -> None:
    """Put the earlier dataset back, if a run was killed between the two renames of `put_in_place`."""
    replaced = staging_path(out) / "replaced"
    if replaced.exists() and not out.exists():
        replaced.replace(out)


def require_same(settings: dict[str, Any], before: dict[str, Any], where: Path) -> None:
    """Check that the run to continue has the same settings.

    Raises:
        ConfigError: some settings differ (the message names them).
    """
    changed = sorted(key for key in settings if settings[key] != before.get(key))
    if changed:
        words = ", ".join("the sources' files" if key == "read" else key for key in changed)
        raise ConfigError(
            f"--resume: {words} differ from the run in {where}",
            "leave --resume out and add --overwrite to start over, or give another --out",
        )
