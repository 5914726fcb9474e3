"""Write docs/api.md, the reference of `import tinygpt2`, from the package itself; `--check` only compares.

python docs/make_api.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tinygpt2
from tinygpt2.cli.commands import COMMANDS
from tinygpt2.config.base import Config, extra

PAGE = Path(__file__).with_name("api.md")
INTRODUCTION = """# API reference

Made by `python docs/make_api.py` from the package's own signatures and docstrings.

Each command is a function here, with one configuration and one result: `tinygpt2.distill(tinygpt2.DistillConfig(...))`
does what `tinygpt2 distill ...` does. All arguments of a configuration are keyword arguments; they are checked when it
is made, and one `ConfigError` names all problems. The library prints nothing. Paths may be relative; results hold
absolute ones. [examples/library.py](../examples/library.py) is a program to start from.
"""


def render() -> str:
    """Return the page."""
    public = {name: getattr(tinygpt2, name) for name in tinygpt2.__all__}
    errors = {name: value for name, value in public.items() if inspect.isclass(value) and issubclass(value, Exception)}
    configs = {command.config.__name__: command.config for command in COMMANDS}
    functions = {name: value for name, value in public.items() if inspect.isfunction(value)}
    modules = {name: value for name, value in public.items() if inspect.ismodule(value)}
    done = {*errors, *configs, *functions, *modules}
    results = {name: value for name, value in public.items() if name not in done}
    commands = [command.name.replace("-", "_") for command in COMMANDS]
    order = [*commands, *(name for name in functions if name not in commands)]
    parts = [INTRODUCTION, "## Functions\n"]
    parts += [_function(name, functions[name]) for name in order]
    parts.append("## Results\n")
    parts += [_dataclass(name, value) for name, value in results.items()]
    parts.append("## Configurations\n")
    parts += [_config(name, value) for name, value in configs.items()]
    parts.append("## Errors\n")
    parts += [_error(name, value) for name, value in sorted(errors.items(), key=lambda item: item[1].exit_code)]
    parts.append("## Modules\n")
    parts += [f"### {name}\n\n{_prose(value)}" for name, value in modules.items()]
    return "\n".join(parts)


def _function(name: str, value: Any) -> str:
    return f"### {name}\n\n```python\n{_signature(name, value)}\n```\n\n{_prose(value)}"


def _signature(name: str, value: Any) -> str:
    signature = inspect.signature(value)
    parameters = ", ".join(_without_modules(one).replace("'", "") for one in signature.parameters.values())
    return f"{name}({parameters}) -> {_without_modules(signature.return_annotation)}"


def _without_modules(text: Any) -> str:
    """Shorten `tinygpt2.config.data.PregenerateConfig` to its last part, and drop the address of a function."""
    return re.sub(r"<function ([\w.<>]+) at 0x\w+>", "...", re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", str(text)))


def _dataclass(name: str, value: Any) -> str:
    if not dataclasses.is_dataclass(value):
        return f"### {name}\n\n{_prose(value)}"
    # with the quotes of the formatter, which also reads the blocks of Markdown pages
    lines = [f"{field.name}: {_without_modules(field.type)}".replace("'", '"') for field in dataclasses.fields(value)]
    return f"### {name}\n\n```python\n" + "\n".join(lines) + f"\n```\n\n{_prose(value)}"


def _config(name: str, value: type[Config]) -> str:
    rows = ["| argument | type | default | |", "|---|---|---|---|"]
    for key, field in value.options().items():
        default = "required" if field.is_required() else f"`{field.default!r}`"
        shown = extra(field, "shown")
        text = (field.description or "") + (f" Default: {shown}." if shown else "")
        kind = _without_modules(inspect.formatannotation(field.annotation)).replace("|", "\\|")
        rows.append(f"| `{key}` | `{kind}` | {default} | {text.replace('|', chr(92) + '|')} |")
    table = "\n".join(rows) if value.options() else ""
    return f"### {name}\n\n{_prose(value)}\n{table}\n"


def _error(name: str, value: Any) -> str:
    return f"### {name}\n\nExit code {value.exit_code}. {_prose(value)}"


def _prose(value: Any) -> str:
    """Render a docstring: its sections (Args, Raises, ...) as lists."""
    return "\n".join(_lines(inspect.getdoc(value) or "")).rstrip() + "\n"


def _lines(text: str) -> Iterator[str]:
    inside = False
    for line in text.splitlines():
        if heading := re.fullmatch(
            r"(Args|Returns|Raises|Attributes|Yields|Args, Raises|Args, Returns, Raises):", line
        ):
            inside = True
            yield f"**{heading[1]}**\n"
        elif inside and (item := re.match(r"    ([\w, ]+): (.*)", line)):
            yield f"- `{item[1]}`: {item[2]}"
        elif inside and line.startswith("    "):
            yield "  " + line.strip() if line.startswith("        ") else line.strip()
        else:
            inside = inside and not line
            yield line


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is out of date: run python docs/make_api.py")
    else:
        PAGE.write_text(text, encoding="utf-8")
