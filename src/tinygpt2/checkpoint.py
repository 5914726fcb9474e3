"""Training checkpoints: OUT/checkpoints/step-N, complete or not there at all.

Accelerate writes model, optimizer and random states in its own layout, so that sharded runs save too; we
add `state.json` with what the loop itself needs, and one rename makes the checkpoint visible.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tinygpt2.errors import ModelError
from tinygpt2.files import read_json, write_json

STATE = "state.json"


def save_checkpoint(accelerator: Accelerator, out: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write the checkpoint of `step` and remove all but the newest `keep`."""
    root = out / "checkpoints"
    temporary, final = root / f".step-{step}.tmp", root / f"step-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / STATE, {"step": step, **state})
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        for old in checkpoints(out)[:-keep]:
            shutil.rmtree(old)


def checkpoints(out: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first."""
    found = {}
    for path in (out / "checkpoints").glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / STATE).is_file():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def load_checkpoint(accelerator: Accelerator, path: Path) -> dict[str, Any]:
    """Restore everything that `save_checkpoint` kept; return the loop's own state.

    Raises:
        ModelError: the checkpoint cannot be read or is another model's.
    """
    try:
        accelerator.load_state(str(path))
        state: dict[str, Any] = read_json(path / STATE)
    except Exception as error:  # whatever a damaged file makes the libraries raise
        message = " ".join(str(error).split())[:300]
        raise ModelError(
            f"cannot resume from {path}: {message}", f"remove {path} to resume from an older one"
        ) from error
    return state
