"""Files appear whole or not at all, and nothing that matters is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinygpt2.errors import ConfigError
from tinygpt2.utils.files import atomic_path, is_free, require_free, staged_files, write_text


def test_a_file_never_replaces_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "precious").write_text("x")
    with pytest.raises(IsADirectoryError):
        write_text(folder, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    assert (folder / "precious").read_text() == "x"


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model", target_is_directory=True)
    for content in ("old", "new"):
        with atomic_path(tmp_path / "link") as path:
            path.mkdir()
            (path / "weights").write_text(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "model" / "weights").read_text() == content
    assert {path.name for path in tmp_path.rglob("*")} == {"disk", "link", "model", "weights"}


def test_leftovers_of_a_killed_process_block_nothing_and_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".abc.tmp").mkdir(parents=True)
    (out / ".abc.tmp" / "half").write_text("x")
    require_free(out, "hint")
    with staged_files(out) as folder:
        (folder / "whole").write_text("y")
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert not is_free(out)
    with pytest.raises(ConfigError, match="is not empty"):
        require_free(out, "hint")
