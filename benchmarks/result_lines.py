"""The results of a study: a file with a line of JSON for each finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def finished_runs(results: Path) -> list[dict[str, Any]]:
    """Return the finished runs; none if there is no file yet."""
    text = results.read_text(encoding="utf-8") if results.is_file() else ""
    return [json.loads(line) for line in text.splitlines()]


def is_finished(results: Path, known: dict[str, Any]) -> bool:
    """Return whether there is a line of the run that these values identify."""
    return any(known == {key: line.get(key) for key in known} for line in finished_runs(results))


def add_line(results: Path, line: dict[str, Any]) -> None:
    """Add a finished run."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
