from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinygpt2.data import external_sort
from tinygpt2.data.external_sort import EncodedBatch, ExternalSort


def test_a_run_counts_only_when_all_of_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[str, bool]] = []

    def flush(path: Path) -> None:
        flushed.append((path.name, (tmp_path / "run-000000.json").exists()))

    monkeypatch.setattr(external_sort, "flush_to_disk", flush)
    sort = ExternalSort(tmp_path, np.dtype(np.uint16), None)
    sort.add(EncodedBatch.of([(0, 1, 2, 3, True, True)], [np.array([4, 5], np.uint16)]))
    sort.finish(1, 2)
    names = ["run-000000.tokens", "run-000000.npy", tmp_path.name, "run-000000.json"]
    assert flushed == [(name, False) for name in names]
    again = ExternalSort(tmp_path, np.dtype(np.uint16), None).progress
    assert (again.done, again.tokens, again.encoding_errors, again.empty_documents) == (True, 2, 1, 2)
