"""The help: options under headings, in panels on a terminal and as plain text elsewhere.

Typer's own panels give each part of an option a column, which leaves the text less than twenty characters on a terminal
of 80 columns. Here an option has two columns, and a name that is too long for its column has a line of its own.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from tinygpt2.cli.completion import described
from tinygpt2.config.base import OPTIONS, Config, extra, plain_type
from tinygpt2.errors import first_sentence
from tinygpt2.utils.terminal import open_console

REQUIRED, COMMON, EVERY_COMMAND, COMMANDS = "Required", "Common options", "Options of every command", "Commands"
HELP_NAMES = ["-h", "--help"]
_WIDTH = 100  # columns in a file or a pipe, and the most on a terminal
_NAMES = 34  # most columns for names; a longer name has a line of its own
_FULL = "tinygpt2.full_help"


class Section(NamedTuple):
    """A heading, and what stands below it: names with their descriptions."""

    heading: str
    rows: list[tuple[str, str]]


def help_command(short: Collection[str]) -> type[TyperCommand]:
    """Return the class of a command whose --help lists these parameters and the required ones, each in one sentence.

    --help-all lists all of them, and so does --help if `short` is empty.
    """

    class Documented(TyperCommand):
        def collect_usage_pieces(self, ctx: Any) -> list[str]:
            return ["[OPTIONS]", *(str(one.metavar) for one in self.params if isinstance(one, TyperArgument))]

        def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
            return described(super().shell_complete(ctx, incomplete))

        def format_help(self, ctx: Any, formatter: Any) -> None:
            formatter.write(_page(self, ctx, () if ctx.meta.get(_FULL) else short))

    return Documented


class HelpGroup(TyperGroup):
    """The program, whose help lists its commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the program's help."""
        formatter.write(_page(self, ctx))

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Return the completions of a word: names of commands and options."""
        return described(super().shell_complete(ctx, incomplete))


def show_everything(ctx: typer.Context, asked: bool) -> None:
    """Print the help with all options and exit, if asked."""
    if asked:
        ctx.meta[_FULL] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


def sections(command: Any, ctx: Any, short: Collection[str] = ()) -> list[Section]:
    """Return the headings of a command's help in the order of its parameters, with the options below each.

    Args:
        short: the names of the parameters to list, besides the required ones; all if empty.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    rest = EVERY_COMMAND
    if isinstance(command, TyperGroup):
        rest, commands = OPTIONS, command.commands.items()
        found[COMMANDS] = [(name, one.get_short_help_str(200)) for name, one in commands if not one.hidden]
    for parameter in command.get_params(ctx):
        heading = getattr(parameter, "rich_help_panel", None) or rest
        if parameter.hidden or (short and parameter.name.rstrip("_") not in short and heading != REQUIRED):
            continue
        text = parameter.help or ""
        found.setdefault(heading, []).append((_names(parameter), _brief(text) if short else text))
    return [Section(heading, rows) for heading, rows in found.items()]


def _names(parameter: TyperOption | TyperArgument) -> str:
    """Return an option's names and the kind of its value. The --no- form of a switch that is off is left out."""
    if isinstance(parameter, TyperArgument):
        return str(parameter.metavar)
    names = ", ".join(sorted(parameter.opts, key=len))
    if parameter.is_flag:
        return names if "default yes" not in (parameter.help or "") else f"{names} / {parameter.secondary_opts[0]}"
    return f"{names} {parameter.metavar}"


def _brief(text: str) -> str:
    """Return the first sentence of a description, and the facts in brackets at its end."""
    sentence, known = re.match(r"(.*?)( \[[^\[\]]*\])?$", text).groups("")  # type: ignore[union-attr]
    return first_sentence(str(sentence)) + str(known)


def _page(command: Any, ctx: Any, short: Collection[str] = ()) -> str:
    parts = sections(command, ctx, short)
    top, bottom = [command.get_usage(ctx), command.help or ""], [command.epilog or ""]
    if short:
        every = [one for one in command.get_params(ctx) if one.rich_help_panel in (EVERY_COMMAND, None)]
        others = [_names(one).replace(", ", "/") for one in every]
        hint = f"{ctx.command_path} --help-all shows every option."
        bottom = [f"Every command also takes {', '.join(others)}.", *bottom, hint]
    if not sys.stdout.isatty():
        return "\n\n".join([*top, *map(_plain, parts), *bottom]) + "\n"
    console = open_console()
    width = min(console.width, _WIDTH)
    with console.capture() as captured:
        for text in top:
            console.print(textwrap.fill(text, width), style="bold", markup=False)
        for part in parts:
            console.print(_panel(part, width))
        for text in bottom:
            console.print(text if "\n" in text else textwrap.fill(text, width), soft_wrap=True, markup=False)
    return captured.get()


def _plain(part: Section) -> str:
    lines = _lines(part.rows, _WIDTH - 2)
    return "\n".join([f"{part.heading}:", *(f"  {names:<{column}}{text}".rstrip() for column, names, text in lines)])


def _panel(part: Section, width: int) -> Any:
    from rich.panel import Panel
    from rich.text import Text

    body = Text()
    for number, (column, names, text) in enumerate(_lines(part.rows, width - 4)):
        body.append("\n" * bool(number)).append(f"{names:<{column}}", "bold").append(text)
    body.highlight_regex(r"\[[^\[\]]+\]", "dim")
    return Panel(body, title=f"[bold]{part.heading}[/]", title_align="left", border_style="dim", width=width)


def _lines(rows: list[tuple[str, str]], width: int) -> Iterator[tuple[int, str, str]]:
    """Yield lines of two columns: the width of the first one, a name (or nothing), and a part of its description."""
    most = min(_NAMES, width * 2 // 5)
    column = max((len(names) for names, _ in rows if len(names) <= most), default=most) + 2
    for names, text in rows:
        fits = len(names) <= column - 2
        if not fits:
            yield 0, names, ""
        for number, line in enumerate(textwrap.wrap(text, width - column, break_on_hyphens=False) or [""] * fits):
            yield column, names if fits and not number else "", line


def placeholder(field: FieldInfo) -> str:
    """Return what help shows in the place of an option's value: choices such as `a|b`, or its kind, such as PATH."""
    kind = plain_type(field)
    several = "..." if get_origin(kind) is list or extra(field, "repeated") else ""
    if extra(field, "metavar"):
        return f"{extra(field, 'metavar')}{several}"
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "N", float: "X"}.get(kind, "PATH" if extra(field, "path") else "TEXT") + several


def facts(config_type: type[Config], key: str, field: FieldInfo, recipe: dict[str, Any]) -> str:
    """Return the bounds and the default of an option as the help shows them: `[>= 1; default 8]`.

    Args:
        recipe: the options of the default recipe.
    """
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = {name: getattr(item, name) for item in field.metadata for name in signs if hasattr(item, name)}
    narrow = len(bounds) == 2 and max(bounds.values()) <= 1  # a lower bound alone says what everybody expects
    found = [", ".join(f"{signs[name]} {bound}" for name, bound in bounds.items())] if narrow else []
    shown = config_type.shown_defaults.get(key, extra(field, "shown"))
    if needed(field):
        found.append(f"required {extra(field, 'required') or ''}".rstrip())
    elif key in recipe:
        found.append(f"default recipe: {_shown(recipe[key])}")
    elif shown or (shown is None and field.default not in ([], None) and field.default is not False):
        found.append(f"default {shown or _shown(field.default)}")
    return f" [{'; '.join(found)}]" if found else ""


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "yes" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def needed(field: FieldInfo) -> bool:
    """Return whether an option has to be given, perhaps only in some cases."""
    return field.is_required() or extra(field, "required") is not None
