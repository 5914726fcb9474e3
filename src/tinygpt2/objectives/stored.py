"""The predictions of teachers in a directory of caches: which of them a run without a teacher learns from."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, get_args

from tinygpt2.config.distillation import CacheKind, SparseKind
from tinygpt2.errors import ConfigError, DataError, listed
from tinygpt2.objectives.sparse import LAYOUT, SparseForm

ABOUT = "about.json"  # in the directory of each cache


class StoredPredictions(NamedTuple):
    """What a cache of predictions says of itself.

    Attributes:
        path: its directory, whose name is its fingerprint.
        teacher: the teacher's name.
        form: of the records.
        length: number of positions of each block.
        data: the fingerprint of the blocks.
    """

    path: Path
    teacher: str
    form: SparseForm
    length: int
    data: str


def find_predictions(root: Path, content: str, kind: CacheKind | None, temperature: float) -> StoredPredictions:
    """Find the cache that serves a run which has no teacher.

    Args:
        root: the directory of all caches, or of one.
        content: the fingerprint of the blocks.
        kind: of the predictions; None takes the one that is there.
        temperature: of the run.

    Raises:
        DataError: there are no predictions, or only of other blocks.
        ConfigError: there are only some of another kind or temperature, or those of several teachers.
    """
    where, teach = f"--teacher-cache {root}", "fill it with tinygpt2 teach"
    found = [one for one in map(_stored, [root / ABOUT, *sorted(root.glob(f"*/{ABOUT}"))]) if one is not None]
    if not found:
        raise DataError(f"{where} holds no predictions of a teacher", f"{teach}, or give --teacher")
    found = [one for one in found if one.data == content]
    if not found:
        raise DataError(f"{where} was made from other blocks than those of --data", f"{teach}, from the same --data")
    if not any(one.form.kind == kind for one in found) and kind is not None:
        raise ConfigError(f"{where} does not hold --teacher-cache-kind {kind}", f"leave it out, or {teach}")
    found = [one for one in found if kind in (None, one.form.kind)]
    known = sorted({one.form.temperature for one in found})
    if temperature not in known:
        at = listed(f"{one:g}" for one in known)
        raise ConfigError(
            f"{where} holds predictions at temperature {at}, and the run has --temperature {temperature:g}",
            f"add --temperature {known[0]:g}, or {teach} --temperature {temperature:g}",
        )
    found = [one for one in found if one.form.temperature == temperature]
    if len(found) > 1:
        names = listed((f"{one.path.name} ({one.form.kind} of {one.teacher})" for one in found), 5)
        raise ConfigError(f"{where} holds several that fit: {names}", "name one of these directories")
    return found[0]


def _stored(file: Path) -> StoredPredictions | None:
    """Return what a file about.json says, if it is of a cache of predictions."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        about = json.loads(file.read_text("utf-8"))
        if about["kind"] in get_args(SparseKind) and about["layout"] == LAYOUT:
            form = SparseForm(about["kind"], int(about["vocabulary"]), float(about["temperature"]))
            return StoredPredictions(file.parent, about["teacher"], form, int(about["length"]), about["data"])
    return None
