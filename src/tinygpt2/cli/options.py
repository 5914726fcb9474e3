"""Make a command from a configuration class, whose fields define its options, help, defaults and YAML keys.

Typer reads every option as text. The configuration checks types and bounds, so that all problems on the command line
and in YAML are reported together.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from pydantic.fields import FieldInfo

from tinygpt2.cli.render import print_result
from tinygpt2.cli.session import choose_level
from tinygpt2.config.base import Config, bounds_label, extra, flag_name, plain_type, read_yaml, type_label
from tinygpt2.config.cerebras import is_cerebras, options_of
from tinygpt2.config.common import DECODING, LENGTH, OBJECTIVES, OPTIMISATION, RUN, TEXT
from tinygpt2.config.data import PregenerateConfig
from tinygpt2.config.distillation import read_recipe
from tinygpt2.config.training import length_options
from tinygpt2.config.workflows import QuickstartConfig
from tinygpt2.data.staging import staging_path
from tinygpt2.errors import ConfigError, InterruptedRunError
from tinygpt2.runtime.processes import rank
from tinygpt2.utils.terminal import printable

Run = Callable[[Any, bool], Any]
"""Called with the configuration and whether to print JSON. Returns the result, or None if it has printed it."""

PANELS = (
    "Options",
    OBJECTIVES,
    DECODING,
    TEXT,
    LENGTH,
    OPTIMISATION,
    RUN,
)
"""Headings of the options, in the order in which help lists them."""


def add_command(
    app: typer.Typer, name: str, config_type: type[Config], about: str, examples: list[str], run: Run
) -> None:
    """Add a command to `app`: build its configuration, call `run` with it, and print the result.

    Args:
        about: a sentence that describes the command.
        examples: command lines for the help, without the program's name.
    """

    def command(**given: Any) -> None:
        file, print_config, as_json = given.pop("config"), given.pop("print_config"), given.pop("json")
        given.pop("version")
        choose_level(quiet=given.pop("quiet"), verbose=given.pop("verbose"))
        config = resolve(config_type, file, {key: value for key, value in given.items() if value not in (None, [], ())})
        if print_config:
            typer.echo(_printed(config), nl=False)
            return
        try:
            result = run(config, as_json)
        except KeyboardInterrupt:  # Typer would turn it into an exit without a word
            raise interrupted(config) from None
        if result is not None and not rank():
            print_result(result, as_json=as_json)
        raise typer.Exit(getattr(result, "exit_code", 0))

    options = sorted(config_type.options().items(), key=lambda item: PANELS.index(extra(item[1], "panel")))
    recipe = read_recipe("default") if "recipe" in dict(options) else {}
    parameters = [_parameter(key, field, recipe) for key, field in options] + _common()
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    lines = "\n\n".join(f"  tinygpt2 {example}" for example in examples)
    app.command(name, help=about, short_help=about, epilog=f"Examples:\n\n{lines}")(command)


def _printed(config: Config) -> str:
    """Return a configuration as YAML, with the values that follow from files which are there."""
    from tinygpt2.planning.known_values import known_options

    known, open_ = known_options(config)
    note = f"# null: the run computes {' and '.join(open_)} from its student and data\n" if open_ else ""
    return note + known.to_yaml()


def interrupted(config: Config) -> InterruptedRunError:
    """Return the error of a command that was interrupted: what was kept, and which options continue it."""
    values = config.model_dump()
    if "resume" in values or isinstance(config, QuickstartConfig):
        out = Path(values["out"]).resolve()
        place = staging_path(out) if isinstance(config, PregenerateConfig) else out
        if place.is_dir() and any(place.iterdir()):
            again = "add --resume to continue" if "resume" in values else "run the same command again to continue"
            return InterruptedRunError(f"interrupted; the finished work is kept in {place}", again)
    return InterruptedRunError("interrupted; nothing was saved", "run the command again")


def resolve(config_type: type[Config], file: str | None, given: dict[str, Any]) -> Config:
    """Build a configuration. Command-line options override the file, and the file overrides the defaults.

    Raises:
        ConfigError: options are invalid. The message lists all problems, and names the file if it may be the cause.
    """
    from_file = read_yaml(Path(file)) if file else {}
    if file and is_cerebras(from_file):
        from_file = _translated(config_type, from_file, file)
    if from_file.get("allow_pickle") and "allow_pickle" not in given:
        typer.echo(f"note: {file} allows pickled weights (allow_pickle)", err=True)
    if any(key in given for key in ("plan", *length_options())):  # a length on the command line replaces the file's
        from_file = {key: value for key, value in from_file.items() if key not in length_options()}
    if "recipe" in given:  # a recipe on the command line overrides the file's values of all its options
        given = config_type.layered(given)
    try:
        return config_type(**{**from_file, **given})
    except ConfigError as error:
        if from_file.keys() - given.keys():
            raise ConfigError(
                f"{error.message}\n(the options are from {file} and the command line)", error.hint
            ) from None
        raise


def _translated(config_type: type[Config], values: dict[str, Any], file: str) -> dict[str, Any]:
    """Translate a Cerebras parameter file to options, and print the keys that are ignored."""
    if "model_config" not in config_type.options():
        raise ConfigError(f"{file} is a Cerebras parameter file, which only tinygpt2 pretrain reads")
    options, left = options_of(values, file)
    if left:
        ignored = f"{file}: these keys have no counterpart and are ignored: {', '.join(left)}"
        typer.echo(printable(ignored, sys.stderr), err=True)
    return options


def _parameter(key: str, field: FieldInfo, recipe: dict[str, Any]) -> inspect.Parameter:
    kind = plain_type(field)
    is_list = get_origin(kind) is list or extra(field, "repeated")
    annotation: Any = bool | None if kind is bool else list[str] | None if is_list else str | None
    default = "default from the recipe" if key in recipe else _default(field)
    facts = [part for part in (bounds_label(field), default) if part]
    text = (field.description or "") + (f" [{'; '.join(facts)}]" if facts else "")
    if extra(field, "positional"):
        info: Any = typer.Argument(help=text, metavar=key.upper(), show_default=False)
    else:
        flag = flag_name(key)
        names = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
        info = typer.Option(names, help=text, metavar=None if kind is bool else type_label(field), show_default=False)
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, info])


def _default(field: FieldInfo) -> str:
    """Return the text about the default that the help shows."""
    shown = extra(field, "shown")
    if field.is_required() and not extra(field, "positional"):
        return "required"
    if shown is None and (field.is_required() or field.default in ([], None) or field.default is False):
        return ""
    value = ", ".join(field.default) if isinstance(field.default, list) else field.default
    return f"default {shown or ('yes' if value is True else value)}"


def _common() -> list[inspect.Parameter]:
    options: list[tuple[str, Any, Any]] = [
        (
            "config",
            str | None,
            _common_option("--config", "Read options from a YAML file. Command-line options override it.", "FILE"),
        ),
        (
            "print_config",
            bool,
            _common_option("--print-config", "Print all options with their values as YAML and exit."),
        ),
        ("json", bool, _common_option("--json", "Print the result as one JSON object.")),
        (
            "quiet",
            bool,
            _common_option("--quiet", "Show no progress and no notes, only warnings.", short="-q"),
        ),
        ("verbose", bool, _common_option("--verbose", "Also say what is decided and why.", short="-v")),
        (
            "version",
            bool,
            _common_option("--version", "Print the version and exit.", callback=print_version, is_eager=True),
        ),
    ]
    defaults = {"config": None}
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(name, False),
            annotation=Annotated[annotation, info],
        )
        for name, annotation, info in options
    ]


def _common_option(name: str, text: str, metavar: str | None = None, **more: Any) -> Any:
    short = [more.pop("short")] if "short" in more else []
    return typer.Option(name, *short, help=text, metavar=metavar, show_default=False, **more)


def print_version(asked: bool) -> None:
    """Print the version and exit, if asked."""
    if asked:
        from tinygpt2 import __version__

        typer.echo(f"tinygpt2 {__version__}")
        raise typer.Exit
