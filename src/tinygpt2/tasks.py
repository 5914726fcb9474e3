"""Evaluation texts: a text file as it stands, a pregenerated dataset, or WikiText-2 by its name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from tinygpt2.corpus import read_text
from tinygpt2.dataset import Packed, is_packed, load_packed
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.progress import track

NAMES = ("wikitext",)


@dataclass(frozen=True)
class Task:
    """One text to measure on: either `text`, or `packed`, whose test split is the text."""

    name: str
    text: str = ""
    packed: Packed | None = None


def load_task(name: str, data: str | None) -> Task:
    """Find an evaluation text.

    Args:
        name: `wikitext`, a text file, or a pregenerated dataset.
        data: file or folder with a named task's text.

    Raises:
        ConfigError: unknown name, or `data` beside a path.
        DataError: the text is missing, empty, not UTF-8, or cannot be had from the Hub.
    """
    if name in NAMES:
        return Task(name, _wikitext(data))
    if data is not None:
        raise ConfigError(f"--task-data goes with a named task ({', '.join(NAMES)}), not with the path {name}")
    path = Path(name)
    if path.is_dir():
        if not is_packed(path):
            raise DataError(
                f"{path} is no pregenerated dataset",
                "give a text file, or make a dataset with tinygpt2 pregenerate",
            )
        return Task(name, packed=load_packed(name))
    if not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise DataError(f"no such file: {path}")
        close = difflib.get_close_matches(name, NAMES, n=1)
        raise ConfigError(
            f"unknown task {name!r}" + (f", did you mean {close[0]}?" if close else ""), "a name or a path"
        )
    return Task(name, _read(path))


def _read(path: Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path} holds no text")
    return text


def _wikitext(data: str | None) -> str:
    """Return WikiText-2 raw test as transformers' page "Perplexity of fixed-length models" joins it.

    Rows are joined with two newlines; a blank line is an empty row, every other row keeps its own newline.
    GPT-2's tokenizer makes 287,644 tokens of it.
    """
    if data is None:
        return "\n\n".join(_wikitext_from_hub())
    path = Path(data)
    if path.is_dir():
        path = next((file for file in sorted(path.rglob("wiki.test.raw"))), path / "wiki.test.raw")
    if not path.is_file():
        raise DataError(f"no such file: {path}", "--task-data takes wiki.test.raw or the folder that holds it")
    rows = _read(path).splitlines(keepends=True)
    return "\n\n".join("" if row.isspace() else row for row in rows)


def _wikitext_from_hub() -> list[str]:
    import datasets

    try:
        with track("fetch wikitext from the Hub", None):
            rows: list[str] = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    except Exception as error:  # whatever the network makes the library raise
        raise DataError(
            f"wikitext cannot be had from the Hub: {' '.join(str(error).split())[:200]}",
            "give --task-data wiki.test.raw, or check HF_ENDPOINT and REQUESTS_CA_BUNDLE",
        ) from error
    return list(rows)
