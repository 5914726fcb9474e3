"""What every command's configuration can do: check itself whole, come from YAML and flags, print itself.

A configuration is a pydantic model. Its fields are the options: name, type, default, bounds and help are
written once, and the command line, the YAML keys and `--print-config` follow from them.
"""

from __future__ import annotations

import difflib
import shlex
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from tinygpt2.errors import ConfigError


def option(
    default: Any,
    text: str,
    *,
    panel: str = "Options",
    positional: bool = False,
    commas: bool = False,
    shown: str | None = None,
    **rest: Any,
) -> Any:
    """Declare an option.

    Args:
        default: its value when nobody gives one; `...` makes the option required.
        text: its help, one sentence.
        panel: the heading under which help lists it.
        positional: whether it is given without its name.
        commas: whether it is text of numbers between commas, which YAML may give as a list or one number.
        shown: what help shows as the default where the value alone would not tell.
        rest: pydantic's ge, gt, le, lt and alias.
    """
    extra: dict[str, Any] = {"panel": panel, "positional": positional, "commas": commas, "shown": shown}
    return Field(default, description=text, json_schema_extra=extra, **rest)


def extra(field: FieldInfo, key: str) -> Any:
    """Return what `option` was told about a field beyond pydantic's own notions."""
    return field.json_schema_extra.get(key) if isinstance(field.json_schema_extra, dict) else None


def flag_name(key: str) -> str:
    """Spell a field's name as its option: `max_steps` is `--max-steps`."""
    return "--" + key.replace("_", "-")


def plain_type(field: FieldInfo) -> Any:
    """Return the field's type without `| None`."""
    if get_origin(field.annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(field.annotation) if kind is not type(None))
    return field.annotation


class Config(BaseModel):
    """Base of every command's configuration.

    Raises:
        ConfigError: on construction, naming every problem at once: unknown keys (with the closest known
            one), wrong types, values out of bounds, missing options, contradictions.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, defer_build=True, populate_by_name=True, protected_namespaces=()
    )

    def __init__(self, **values: Any) -> None:
        values = self.layered(values)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("\n".join(self._problems(error, values))) from None

    @field_validator("*", mode="before")
    @classmethod
    def _accept_natural_yaml(cls, value: Any, info: ValidationInfo) -> Any:
        """Take one value where a list is expected, a YAML list where commas are, and no yes/no for a number."""
        field = cls.model_fields[info.field_name or ""]
        kind = plain_type(field)
        if extra(field, "commas") and isinstance(value, list | int) and not isinstance(value, bool):
            return ",".join(str(item) for item in value) if isinstance(value, list) else str(value)
        if get_origin(kind) is list and isinstance(value, str):
            return [value]
        if kind in (int, float) and isinstance(value, bool):
            raise ValueError("a number is expected, not a yes/no")
        return value

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        problems = list(self.conflicts())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @classmethod
    def layered(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Put what lies between the defaults and the given values under the given ones."""
        return values

    def conflicts(self) -> Iterator[str]:
        """Yield one message per contradiction between options."""
        return iter(())

    @classmethod
    def options(cls) -> dict[str, FieldInfo]:
        """Return every option by its key, in the order of declaration."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    @classmethod
    def _problems(cls, error: ValidationError, values: Mapping[str, Any]) -> Iterator[str]:
        options = {**cls.model_fields, **cls.options()}
        bad = {str(item["loc"][0]) if item["loc"] else "" for item in error.errors()}
        for item in error.errors():
            key = str(item["loc"][0]) if item["loc"] else ""
            if not key:
                yield str(item["ctx"]["error"])
            elif item["type"] == "extra_forbidden":
                close = difflib.get_close_matches(key, cls.options(), n=1)
                yield f"unknown option '{key}'" + (f", did you mean '{close[0]}'?" if close else "")
            elif item["type"] == "missing":
                name = key.upper() if extra(options[key], "positional") else flag_name(key)
                yield f"missing {name}: {options[key].description}"
            else:
                message = item["msg"].removeprefix("Value error, ")
                yield f"{flag_name(key)} {item['input']}: {message[0].lower()}{message[1:]}"
        if "" not in bad:  # pydantic looks for contradictions only in a sound whole: look in what is sound
            blank = {key: "?" for key, field in cls.options().items() if field.is_required()}
            sound = {key: value for key, value in values.items() if key in options and key not in bad}
            try:
                cls(**{**blank, **sound})
            except ConfigError as contradictions:
                yield contradictions.message

    def flags(self) -> str:
        """Render the options that are not what they would be by themselves, as a command line has them."""
        recipe = {"recipe": self.recipe} if hasattr(self, "recipe") else {}
        defaults = {key: field.default for key, field in self.options().items()} | self.layered(recipe)
        words: list[str] = []
        for key, value in self.model_dump(mode="json", by_alias=True).items():
            field = self.options()[key]
            if value == defaults[key] and key not in recipe:
                continue
            if isinstance(value, bool):
                words.append(flag_name(key) if value else f"--no-{flag_name(key)[2:]}")
                continue
            for item in value if isinstance(value, list) else [value]:
                words += [str(item)] if extra(field, "positional") else [flag_name(key), str(item)]
        return shlex.join(words)

    def to_yaml(self) -> str:
        """Render every option with its resolved value; the text runs the command again through --config."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def type_label(field: FieldInfo) -> str:
    """Return the short type that help shows for an option: INTEGER, NUMBER, TEXT or its choices."""
    kind = plain_type(field)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "INTEGER", float: "NUMBER"}.get(kind, "TEXT")


def bounds_label(field: FieldInfo) -> str:
    """Return the bounds of a number as help shows them, such as `>= 1`, or an empty string."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{sign} {getattr(item, name)}"
        for item in field.metadata
        for name, sign in signs.items()
        if hasattr(item, name)
    ]
    return ", ".join(found)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping of options from YAML; keys may be spelled with dashes or underscores.

    Raises:
        ConfigError: the file is missing, is no YAML, or does not hold a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold 'option: value' lines, not a {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}
