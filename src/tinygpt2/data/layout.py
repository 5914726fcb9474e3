"""What a directory with a pregenerated dataset looks like."""

from __future__ import annotations

from pathlib import Path

from tinygpt2.data.block_writers import MANIFEST
from tinygpt2.errors import DataError


def is_packed_dataset(path: Path) -> bool:
    """Return whether a directory is a pregenerated dataset or contains shards of one."""
    return (path / MANIFEST).is_file() or (path / "dataset_dict.json").is_file() or bool(shard_folders(path))


def shard_folders(path: Path) -> list[Path]:
    """Return the directories of the shards in a folder; empty if it is a dataset itself, or contains none."""
    return sorted(file.parent for file in path.glob(f"*/{MANIFEST}")) if not (path / MANIFEST).is_file() else []


def dataset_folders(name: str) -> list[Path]:
    """Return the directories that hold a dataset's blocks: its shards', or its own.

    Raises:
        DataError: there is no dataset at that path.
    """
    path = Path(name)
    if not path.exists():
        raise DataError(
            f"no such dataset: {path}", "make one with: tinygpt2 pregenerate SOURCE --tokenizer T --out DIR"
        )
    folders = shard_folders(path) or [path]
    if not (folders[0] / MANIFEST).is_file():
        what = f"it has no {MANIFEST}" if path.is_dir() else "it is a file"
        raise DataError(
            f"{path} is not a pregenerated dataset: {what}",
            f"make one with: tinygpt2 pregenerate {path} --tokenizer T --out DIR",
        )
    return folders
