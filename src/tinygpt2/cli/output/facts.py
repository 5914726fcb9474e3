"""A result as lines of a label and a value; what belongs together stands under a heading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tinygpt2.cli.output.tables import short_path
from tinygpt2.utils.units import duration, number, size

if TYPE_CHECKING:
    from rich.console import Console

_LABELS = {
    "layers": "blocks kept", "peak_memory_bytes": "peak memory", "memory_bytes": "needed",
    "memory_available_bytes": "available", "disk_bytes": "needed", "disk_free_bytes": "free", "bytes": "text",
    "test_bytes": "held-out text", "seconds": "time", "tokens_per_second": "tokens/s", "eval": "on held-out blocks",
    "eval_by_data": "on held-out blocks, by dataset", "tokens_by_data": "tokens, by dataset",
    "tasks": "perplexity on tasks", "accuracies": "accuracy on tasks",
    "sequences": "blocks", "train_sequences": "training blocks", "eval_sequences": "blocks per evaluation",
    "sequence_length": "tokens in a block", "vocab_size": "vocabulary", "encoding_errors": "documents not UTF-8",
    "stderr": "standard error", "loss": "last training loss",
}  # fmt: skip
_IN_A_GROUP = {"loss": "loss", "sequences": "blocks measured", "seconds": "time"}
_UNTOLD = {
    "encoding_errors": 0, "empty_documents": 0, "teacher_parameters": 0, "processes": 1, "test_bytes": 0,
    "bytes_per_token": None,
}  # fmt: skip
"""Values that tell nobody anything."""

Group = Callable[[str], str]
"""Returns the heading under which a field stands."""


def fields_of(result: Any) -> list[dataclasses.Field[Any]]:
    """Return a result's fields, without the optional ones that are None, because they were not requested."""
    every = dataclasses.fields(result)
    return [field for field in every if field.default is not None or getattr(result, field.name) is not None]


def print_facts(
    result: Any,
    console: Console,
    labels: Mapping[str, str] | None = None,
    group: Group | None = None,
    hidden: Collection[str] = (),
) -> None:
    """Print the fields of a result.

    Args:
        labels: names of fields in place of the usual ones.
        group: the heading of each field, if they are to stand in groups.
        hidden: names of fields that are printed elsewhere.
    """
    values = {field.name: getattr(result, field.name) for field in fields_of(result) if field.name not in hidden}
    labels = {**_LABELS, **(labels or {})}
    if group is None:
        lines = list(_lines(values, labels))
    else:
        headings = dict.fromkeys(map(group, values))
        groups = {heading: {key: item for key, item in values.items() if group(key) == heading} for heading in headings}
        lines = list(_lines(groups, labels))
    width = max((len(label) for label, value in lines if value), default=0)
    for label, value in lines:
        console.print(f"{label:<{width}}  {value}" if value else label, markup=False, soft_wrap=True)


def plan_group(name: str) -> str:
    """Return the part of a plan that a field belongs to."""
    if name.startswith(("memory", "disk")):
        return name.split("_")[0]
    timed = name.endswith("seconds") or name in ("steps", "tokens", "learning_rate", "tokens_per_second")
    return "length" if timed else "what runs"


def _lines(values: Mapping[str, Any], labels: Mapping[str, str], indent: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        label = labels.get(key) or _spaced(key)
        if key in _UNTOLD and value == _UNTOLD[key]:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in fields_of(value)}
        if isinstance(value, Mapping):
            yield f"{indent}{label}", ""
            # below a heading, labels need not tell what the heading tells
            yield from _lines(value, {**labels, **_IN_A_GROUP} if key not in _GROUPS else labels, f"{indent}  ")
        else:
            yield f"{indent}{label}", _text(key, value)


_GROUPS = ("memory", "disk", "length", "what runs")


def _spaced(key: str) -> str:
    name = key.removesuffix("_bytes")
    if name.endswith("_seconds"):
        name = f"{name.removesuffix('_seconds')} time"
    return name.replace("_", " ")


def _text(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "bytes" or key.endswith("_bytes"):
        return size(value)
    if key == "seconds" or key.endswith("_seconds"):
        return duration(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return number(value) if not isinstance(value, str) else short_path(value)
