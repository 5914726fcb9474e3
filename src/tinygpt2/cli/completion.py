"""What the shell completes as the value of an option. Without an answer, shells complete the names of files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from tinygpt2.config.yaml_files import built_in_recipes
from tinygpt2.errors import first_sentence

_MOST = 76  # characters of a description; Typer breaks longer ones into lines, which shells take for more names


def completer(placeholder: str) -> Callable[[str], list[str]] | None:
    """Return a function that completes the value of an option, or None if there are only files to complete.

    Args:
        placeholder: what stands for the value in the help, such as `uniform|last|N,...` or `PRESET|PATH`.
    """
    parts = placeholder.removesuffix("...").split("|")
    words = [part for part in parts if part.islower() and ":" not in part]
    named = [_NAMES[part] for part in parts if part in _NAMES]
    if not words and not named:
        return None

    def complete(incomplete: str) -> list[str]:
        known = [*words, *(name for names in named for name in names())]
        return [name for name in known if name.startswith(incomplete)]

    return complete


def described(items: list[Any]) -> list[Any]:
    """Return Typer's completions with descriptions of one short line."""
    for item in items:
        item.help = item.help and textwrap.shorten(first_sentence(item.help.split(" [")[0]), _MOST, placeholder=" ...")
    return items


def _presets() -> Iterable[str]:
    from tinygpt2.models.configuration import preset_names

    return preset_names()


def _tasks() -> Iterable[str]:
    from tinygpt2.evaluation.named_tasks import ALL, SPECS

    return [*SPECS, ALL]


_NAMES = {"PRESET": _presets, "RECIPE": built_in_recipes, "TASK": _tasks}
