"""Where the texts of tasks are: names of tasks and paths are checked, and the files of named tasks found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinygpt2.data.corpus.formats import plain_name
from tinygpt2.data.layout import is_packed_dataset
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.evaluation.named_tasks import ALL, OWN, SPECS, TaskSpec
from tinygpt2.utils.suggestions import did_you_mean


def check_tasks(asked: Sequence[str], data: str | None) -> None:
    """Check the names of tasks, and that the texts which are not on the Hub exist. No text is read.

    Raises:
        ConfigError: a name is unknown, or `data` is given but `asked` does not contain a task that it can belong to.
        DataError: a file or a dataset is missing.
    """
    named = [name for name in asked if name in SPECS or name == ALL]
    if data is not None and not named:
        raise ConfigError(f"--task-data is only for named tasks ({', '.join(SPECS)}): {asked[0]} is a path")
    if data is not None and (len(named) > 1 or ALL in named) and Path(data).is_file():
        raise ConfigError(f"--task-data {data} is one file, but there are several tasks", "give a folder of files")
    for name in asked:
        if name not in named:
            _check_path(name)
        elif name != ALL and data is not None:
            for part in SPECS[name].parts:
                find_task(part, Path(data), alone=is_alone(asked) and part is SPECS[name])
        elif name != ALL and SPECS[name].source is None:
            raise no_copy(SPECS[name])


def is_alone(asked: Sequence[str]) -> bool:
    """Return whether only one named task is asked for, so that any test split below --task-data is its text."""
    return len([name for name in asked if name in SPECS or name == ALL]) == 1


def no_copy(spec: TaskSpec) -> DataError:
    """Return the error for a task that is not on the Hub, without a file of its own."""
    what = "a pregenerated dataset" if spec.kind == "blocks" else f"the file {spec.files[0]}"
    return DataError(f"{spec.name}: the Hub has no readable copy", f"use --task-data PATH to give {what}")


def _check_path(name: str) -> None:
    """Check that a text file or a pregenerated dataset is at a path."""
    if name.startswith(OWN):
        if not Path(name.removeprefix(OWN)).is_file():
            raise DataError(f"no such file: {name.removeprefix(OWN)}")
        return
    path = Path(name)
    if path.is_dir() and not is_packed_dataset(path):
        raise DataError(
            f"{path} is not a pregenerated dataset", "give a text file, or make a dataset with tinygpt2 pregenerate"
        )
    if path.exists():
        return
    if path.suffix or len(path.parts) > 1:
        raise DataError(f"no such file: {path}")
    raise ConfigError(
        f"unknown task {name!r}{did_you_mean(name, [*SPECS, ALL])}",
        "tinygpt2 ppl --list-tasks lists the names; or give a path",
    )


def find_task(spec: TaskSpec, data: Path, *, alone: bool) -> list[Path]:
    """Return a task's file or dataset: `data` itself, or the first path below it that has one of the task's names.

    A split in Parquet may have several files, which follow one another. They are known by the folder of the dataset's
    configuration or, if no other task is read from `data`, by the name of the split alone.
    """
    wanted = is_packed_dataset if spec.kind == "blocks" else Path.is_file
    if wanted(data):
        return [data]
    if data.is_dir():
        root = data.resolve()
        below = [(path, plain_name(str(path))) for path in sorted(root.rglob("*"))]
        for name in (*spec.files, *spec.copies):
            found = [path for path, plain in below if plain.match(name) and wanted(path)]
            if found:
                return [path for path in found if path.parent == found[0].parent] if name in spec.copies else found[:1]
        split = spec.source.split if spec.source and alone else None
        for pattern in (f"{split}-*.parquet", f"data/{split}-*.parquet", f"{split}/*.parquet"):
            if split and (found := sorted(root.glob(pattern))):
                return found
    kind = "pregenerated dataset" if spec.kind == "blocks" else "file"
    reason = f"{data} has no {kind} named {' or '.join(spec.files)}" if data.is_dir() else f"{data} is not a {kind}"
    if not data.exists():
        reason = f"no such file: {data}"
    raise DataError(f"{spec.name}: {reason}", f"--task-data must be the {kind} itself or a folder that contains it")
