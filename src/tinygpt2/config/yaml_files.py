"""YAML as people write it: 1e-5 is a number, and no key stands twice."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from tinygpt2.errors import ConfigError, one_line

_FLOAT = r"[-+]?(\.\d[\d_]*|\d[\d_]*\.[\d_]*)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.inf$|\.nan$"
_INT = r"[-+]?(0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$"
_NUMBERS = {"tag:yaml.org,2002:float": _FLOAT, "tag:yaml.org,2002:int": _INT}


class _Loader(yaml.SafeLoader):
    """Reads YAML. As in YAML 1.2, 1e-5 is a float and 16:32 a text; no key may stand twice in a mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return node


class _Dumper(yaml.SafeDumper):
    """Writes YAML that `_Loader` reads as it was: a text such as 1e-5 is put in quotes."""


for _way in (_Loader, _Dumper):
    _way.yaml_implicit_resolvers = {
        first: [form for form in forms if form[0] not in _NUMBERS]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _tag, _form in _NUMBERS.items():
        _way.add_implicit_resolver(_tag, re.compile(_form), list("-+.0123456789"))


def dump_yaml(values: dict[str, Any]) -> str:
    """Write values as YAML; `load_yaml` reads the same ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_yaml(text: str, where: object) -> Any:
    """Read a YAML document.

    Args:
        text: the document.
        where: where it comes from, for error messages.

    Raises:
        ConfigError: it is not YAML, or a key stands twice in a mapping.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigError(f"{where}{line} is not valid YAML: {one_line(error.problem or error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {one_line(error, 300)}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read options from a YAML file. Their names may have dashes or underscores.

    Raises:
        ConfigError: the file cannot be read, is not YAML, does not contain a mapping, or has an option twice.
    """
    try:
        values = load_yaml(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {one_line(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must contain lines of 'option: value', but contains a {type(values).__name__}")
    options: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in options:
            raise ConfigError(f"{path}: the option {name} stands twice, with a dash and with an underscore")
        options[name] = value
    return options


def built_in_recipes() -> dict[str, Path]:
    """Return the file of every built-in recipe, by the recipe's name."""
    folder = files("tinygpt2.config").joinpath("recipes")
    return {Path(item.name).stem: Path(str(item)) for item in folder.iterdir() if item.name.endswith(".yaml")}
