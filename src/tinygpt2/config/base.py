"""The base of every configuration: it validates itself and prints itself as YAML.

A configuration is a pydantic model, and each of its fields is an option. An option's name, type, default, bounds and
help are declared once. The command line, the YAML keys and `--print-config` follow from the declaration.
"""

from __future__ import annotations

import inspect
import keyword
import re
import shlex
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, Union, dataclass_transform, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tinygpt2.config.yaml_files import dump_yaml
from tinygpt2.errors import ConfigError, first_sentence, one_line
from tinygpt2.utils.files import shared_name
from tinygpt2.utils.suggestions import did_you_mean

OPTIONS = "Options"  # the heading of options without another one


def option(
    text: str,
    *,
    default: Any = PydanticUndefined,
    panel: str = OPTIONS,
    positional: bool = False,
    commas: bool = False,
    repeated: bool = False,
    path: bool = False,
    shown: str | None = None,
    metavar: str | None = None,
    required: str | None = None,
    alias: str | None = None,
    **bounds: Any,
) -> Any:
    """Declare an option.

    Args:
        text: its help.
        default: its value if it is not given; without a default the option is required.
        panel: the heading that lists it in the help.
        positional: whether its value is given without its name.
        commas: whether its value is a text of numbers between commas; YAML may also give a list or one number.
        repeated: whether it may be given several times, though one value is not a list.
        path: whether it may name a file or directory; a leading ~ is the home directory.
        shown: the default that the help shows, if the value itself says too little.
        metavar: what the help shows in the place of its value: words in small letters between bars stand for
            themselves, the others say what kind of value is meant. By default, this follows from the type.
        required: the condition under which an option with a default has to be given; empty if it always has to be.
        alias: its name, if the field cannot have the same name.
        bounds: pydantic's ge, gt, le and lt.
    """
    extra: dict[str, Any] = {
        "panel": panel, "positional": positional, "commas": commas, "repeated": repeated,
        "path": path, "shown": shown, "metavar": metavar, "required": required,
    }  # fmt: skip
    return Field(default, description=text, json_schema_extra=extra, alias=alias, **bounds)


def extra(field: FieldInfo, key: str) -> Any:
    """Return what `option` was told of an option, by the name of the argument: `panel`, `path`, `shown` and so on."""
    return field.json_schema_extra.get(key) if isinstance(field.json_schema_extra, dict) else None


def flag_name(key: str) -> str:
    """Return the option for a field's name, such as `--max-steps` for `max_steps`."""
    return "--" + key.replace("_", "-")


def required(name: str, field: FieldInfo) -> str:
    """Return the message that an option is missing, with its help, and without the word that its help begins with."""
    help_text = re.sub(r"^[A-Z]\w+: ", "", summary(field))
    return f"{name} is required: {help_text}"


def summary(field: FieldInfo) -> str:
    """Return the first sentence of an option's help."""
    return first_sentence(field.description or "")


def plain_type(field: FieldInfo) -> Any:
    """Return the field's type without `| None`."""
    if get_origin(field.annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(field.annotation) if kind is not type(None))
    return field.annotation


def spelled(key: str, value: Any) -> str:
    """Return an option as it is given for a value: --no-NAME for False."""
    return f"--no-{flag_name(key)[2:]}" if value is False else flag_name(key)


_BLANK = "?"  # stands for a text that is missing


@dataclass_transform(kw_only_default=True, field_specifiers=(option,))
class Config(BaseModel):
    """Base of every command's configuration.

    Raises:
        ConfigError: a value is invalid. One error names all problems: unknown options (with the closest known name),
            wrong types, values out of bounds, missing options, contradictions.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        defer_build=True,
        populate_by_name=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )
    shown_defaults: ClassVar[Mapping[str, str]] = {}
    """Defaults that the help of this command shows in place of `shown`, by the option's name."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Give the class the signature that pydantic makes only when the first configuration is built."""
        cls.__signature__ = inspect.Signature(
            [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if field.is_required() else field.default,
                    annotation=field.annotation,
                )
                for name, field in cls.arguments().items()
            ]
        )

    @field_validator("*", mode="before")
    @classmethod
    def _accept_natural_yaml(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept one value for a list, a YAML list between commas, a number as a text. Refuse yes and no as numbers."""
        field = cls.model_fields[info.field_name or ""]
        kind = plain_type(field)
        if extra(field, "commas") and isinstance(value, list):
            return ",".join(str(item) for item in value)
        if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if get_origin(kind) is list and isinstance(value, str):
            value = [value]
        if extra(field, "repeated") and isinstance(value, list) and len(value) == 1:
            (value,) = value
        if kind in (int, float) and isinstance(value, bool):
            raise ValueError(f"expected a number, got {_quoted(value)}")
        if kind is int:
            return whole_number(value)
        return _expanded(value) if extra(field, "path") else value

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        problems = list(self.conflicts())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Complete the values with `layered`, and report all problems as one ConfigError."""
        values = cls.layered(cls.in_full(values))
        try:
            return handler(values)
        except ValidationError as error:
            raise ConfigError("\n".join(cls._problems(error, values))) from None

    @classmethod
    def in_full(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return values in which the options that short forms stand for have replaced them."""
        return values

    @classmethod
    def layered(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the given values together with values that replace defaults, such as a recipe's. Given values win."""
        return values

    def conflicts(self) -> Iterator[str]:
        """Yield one message for each contradiction between options."""
        return iter(())

    def changed(self, *names: str) -> list[str]:
        """Return those of these options that are not their defaults, as they are given: `--seed 7`, `--no-shuffle`."""
        values = {name: getattr(self, name) for name in names}
        fields = type(self).model_fields
        there = {fields[name].alias or name: one for name, one in values.items() if one != fields[name].default}
        return [spelled(key, one) if isinstance(one, bool) else f"{flag_name(key)} {one}" for key, one in there.items()]

    @classmethod
    def options(cls) -> dict[str, FieldInfo]:
        """Return every option by its name, in the order of declaration."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    @classmethod
    def arguments(cls) -> dict[str, FieldInfo]:
        """Return the options by their names in Python: --for, which is a word of the language, by the field's name."""
        return {
            name if keyword.iskeyword(field.alias or name) else field.alias or name: field
            for name, field in cls.model_fields.items()
        }

    @classmethod
    def _problems(cls, error: ValidationError, values: Mapping[str, Any]) -> Iterator[str]:
        options = {**cls.model_fields, **cls.options()}
        reported: set[str] = set()
        bad = {str(item["loc"][0]) if item["loc"] else "" for item in error.errors()}
        for item in error.errors():
            key = str(item["loc"][0]) if item["loc"] else ""
            if not key:
                yield str(item["ctx"]["error"])
            elif item["type"] == "extra_forbidden":
                yield f"unknown option '{key}'{did_you_mean(key, cls.options())}"
            elif item["type"] == "missing":
                name = key.upper() if extra(options[key], "positional") else flag_name(key)
                yield required(name, options[key])
            elif key not in reported:
                reported.add(key)  # a value that may be of two types is wrong for both
                yield f"{flag_name(key)}: {_reason(item)}"
        valid = {key: value for key, value in values.items() if key in options and key not in bad}
        blank = {key: field for key, field in cls.options().items() if field.is_required() and key not in valid}
        # after an invalid value, pydantic skips the check for contradictions
        if "" not in bad and all(plain_type(field) in (str, list[str]) for field in blank.values()):
            try:
                cls(**dict.fromkeys(blank, _BLANK), **valid)
            except ConfigError as contradictions:
                yield from (line for line in contradictions.message.split("\n") if repr(_BLANK) not in line)

    def flags(self, *, shared: bool = False) -> str:
        """Return the options that differ from their defaults as a command line.

        Args:
            shared: shorten the paths of this machine to their last names, because other people will read them.
        """
        recipe = {"recipe": self.recipe} if hasattr(self, "recipe") else {}
        defaults = {key: field.default for key, field in self.options().items()} | self.layered(recipe)
        words: list[str] = []
        for key, value in self.model_dump(mode="json", by_alias=True).items():
            field = self.options()[key]
            if value == defaults[key] and key not in recipe:
                continue
            if isinstance(value, bool):
                words.append(spelled(key, value))
                continue
            for item in value if isinstance(value, list) else [value]:
                item = shared_name(str(item)) if shared and extra(field, "path") else item
                words += [str(item)] if extra(field, "positional") else [flag_name(key), str(item)]
        return shlex.join(words)

    def to_yaml(self) -> str:
        """Return every option with its value as YAML; `--config` runs the command again from it."""
        return dump_yaml(self.model_dump(mode="json", by_alias=True))


def _expanded(value: Any) -> Any:
    """Put the home directory in the place of a leading ~, in one path or in several."""
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError:  # there is no such user
        return value


def whole_number(value: Any) -> Any:
    """Return a number such as 1e3 or "1e3" as a whole number, if it is one, and any other value unchanged."""
    if not isinstance(value, float | str) or re.fullmatch(r"\s*[+-]?\d+\s*", str(value)):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() and abs(number) < 2**53 else value


def _reason(item: Any) -> str:
    """Return what was expected of a value, and what was given."""
    kinds = {"int": "a whole number", "float": "a number", "bool": "yes or no", "list": "a list", "string": "a text"}
    kinds |= {"finite_number": "a finite number"}
    bounds = {"greater_than_equal": "at least", "greater_than": "more than", "less_than_equal": "at most"}
    bounds |= {"less_than": "less than"}
    expected = next((words for name, words in kinds.items() if item["type"].startswith(name)), None)
    if item["type"] in bounds:
        expected = f"{bounds[item['type']]} {next(iter(item['ctx'].values())):.12g}"
    elif item["type"] == "literal_error":
        expected = str(item["ctx"]["expected"]).replace("'", "")
    if expected is None:
        message = str(item["msg"]).removeprefix("Value error, ")
        return f"{message[0].lower()}{message[1:]}"
    return f"expected {expected}, got {_quoted(item['input'])}"


def _quoted(value: Any) -> str:
    """Return a value as a message shows it: numbers as they are, yes and no as in YAML, everything else in quotes."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "nothing"}[value]
    try:
        float(value)
    except (TypeError, ValueError):
        return one_line(repr(value), 100)
    return str(value)
