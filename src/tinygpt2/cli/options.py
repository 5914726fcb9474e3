"""Make a command from a configuration class, whose fields define its options, help, defaults and YAML keys.

Typer reads every option as text. The configuration checks types and bounds, so that all problems on the command line
and in YAML are reported together.
"""

from __future__ import annotations

import inspect
import keyword
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from pydantic.fields import FieldInfo

from tinygpt2.cli.completion import completer
from tinygpt2.cli.early_checks import check_early
from tinygpt2.cli.help import (
    COMMON,
    EVERY_COMMAND,
    HELP_NAMES,
    REQUIRED,
    facts,
    help_command,
    needed,
    placeholder,
    show_everything,
)
from tinygpt2.cli.output.render import print_result
from tinygpt2.cli.session import choose_level
from tinygpt2.config.base import OPTIONS, Config, extra, flag_name, plain_type
from tinygpt2.config.cerebras import is_cerebras, options_of
from tinygpt2.config.common import DECODING, LENGTH, OBJECTIVES, OPTIMISATION, OWN_TEXT, RUN, TARGET, TEXT
from tinygpt2.config.data import PregenerateConfig
from tinygpt2.config.decoding import SampleConfig
from tinygpt2.config.distillation import read_recipe
from tinygpt2.config.training import length_options
from tinygpt2.config.workflows import QuickstartConfig
from tinygpt2.config.yaml_files import read_yaml
from tinygpt2.data.staging import staging_path
from tinygpt2.errors import ConfigError, InterruptedRunError
from tinygpt2.runtime.processes import rank
from tinygpt2.utils.terminal import printable

Run = Callable[[Any, bool], Any]
"""Called with the configuration and whether to print JSON. Returns the result, or None if it has printed it."""

HEADINGS = (REQUIRED, COMMON, OPTIONS, TARGET, OBJECTIVES, OWN_TEXT, DECODING, TEXT, LENGTH, OPTIMISATION, RUN)
"""Headings of the options, in the order in which help lists them."""

LETTERS = {"out": "-o", "model": "-m"}
"""Short forms of options, the same in every command."""


def add_command(
    app: typer.Typer,
    name: str,
    config_type: type[Config],
    about: str,
    examples: list[str],
    run: Run,
    short: Sequence[str] = (),
) -> None:
    """Add a command to `app`: build its configuration, call `run` with it, and print the result.

    Args:
        about: a sentence that describes the command.
        examples: command lines for the help, without the program's name.
        short: the options that --help lists, in this order, besides the required ones; --help-all lists all. Empty if
            --help lists all.
    """

    def command(**given: Any) -> None:
        file, print_config, as_json = given.pop("config"), given.pop("print_config"), given.pop("json")
        given.pop("version")
        given.pop("help_all")
        choose_level(quiet=given.pop("quiet"), verbose=given.pop("verbose"))
        if as_json and "output_format" in config_type.model_fields:
            given["json"] = True
        given = {key.rstrip("_"): value for key, value in given.items() if value not in (None, [], ())}
        config = resolve(config_type, file, given)
        as_json = as_json or getattr(config, "output_format", None) == "json"
        if print_config:
            typer.echo(_printed(config), nl=False)
            return
        try:
            if not rank():  # the other processes would find what this one has begun to write
                check_early(config)
            result = run(config, as_json)
        except KeyboardInterrupt:  # Typer would turn it into an exit without a word
            raise interrupted(config) from None
        if result is not None and not rank():
            print_result(result, as_json=as_json)
        raise typer.Exit(getattr(result, "exit_code", 0))

    recipe = read_recipe("default") if "recipe" in config_type.options() else {}
    parameters = _parameters(config_type, short, recipe) + _common(short)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    lines = "\n".join(["Examples:", *(f"  tinygpt2 {example}" for example in examples)])
    app.command(
        name,
        help=about,
        short_help=about,
        epilog=lines,
        cls=help_command(short),
        context_settings={"help_option_names": HELP_NAMES},
    )(command)


def _printed(config: Config) -> str:
    """Return a configuration as YAML, with the values that follow from files which are there."""
    from tinygpt2.planning.known_values import known_options

    known, open_ = known_options(config)
    note = f"# null: the run computes {' and '.join(open_)} from its model and data\n" if open_ else ""
    return note + known.to_yaml()


def interrupted(config: Config) -> InterruptedRunError:
    """Return the error of a command that was interrupted: what was kept, and which options continue it."""
    values = config.model_dump()
    if "resume" in values or isinstance(config, QuickstartConfig):
        out = Path(values["out"]).resolve()
        place = staging_path(out) if isinstance(config, PregenerateConfig | SampleConfig) else out
        if place.is_dir() and any(place.iterdir()):
            again = "add --resume to continue" if "resume" in values else "run the same command again to continue"
            return InterruptedRunError(f"interrupted; the finished work is kept in {place}", again)
    return InterruptedRunError("interrupted; nothing was saved", "run the command again")


def resolve(config_type: type[Config], file: str | None, given: dict[str, Any]) -> Config:
    """Build a configuration. Command-line options override the file, and the file overrides the defaults.

    Raises:
        ConfigError: options are invalid. The message lists all problems, and names the file if it may be the cause.
    """
    from_file = read_yaml(Path(file).expanduser()) if file else {}
    if file and is_cerebras(from_file):
        from_file = _translated(config_type, from_file, file)
    if from_file.get("allow_pickle") and "allow_pickle" not in given:
        _note(f"note: {file} allows pickled weights (allow_pickle)")
    from_file, given = config_type.in_full(from_file), config_type.in_full(given)
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
        _note(f"{file}: these keys have no counterpart and are ignored: {', '.join(left)}")
    return options


def _note(text: str) -> None:
    typer.echo(printable(text, sys.stderr), err=True)


def _parameters(config_type: type[Config], short: Sequence[str], recipe: dict[str, Any]) -> list[inspect.Parameter]:
    """Return a command's own options in the order of the help: by heading, the common ones as `short` lists them."""
    found = []
    for key, field in config_type.options().items():
        panel = extra(field, "panel")
        lifted = key in short and panel != OBJECTIVES
        heading = REQUIRED if needed(field) else COMMON if lifted else panel
        place = (HEADINGS.index(heading), short.index(key) if key in short else len(short))
        found.append((place, _parameter(key, field, heading, facts(config_type, key, field, recipe))))
    return [parameter for _, parameter in sorted(found, key=lambda item: item[0])]


def _parameter(key: str, field: FieldInfo, heading: str, known: str) -> inspect.Parameter:
    kind = plain_type(field)
    is_list = get_origin(kind) is list or extra(field, "repeated")
    annotation: Any = bool | None if kind is bool else list[str] | None if is_list else str | None
    about: dict[str, Any] = {
        "help": f"{field.description}{known}",
        "metavar": None if kind is bool else placeholder(field),
        "show_default": False,
        "rich_help_panel": heading,
    }
    if extra(field, "positional"):
        info: Any = typer.Argument(**about)
    else:
        flag = flag_name(key)
        if kind is not bool:
            about["autocompletion"] = completer(about["metavar"])
        names = [f"{flag}/--no-{flag[2:]}" if kind is bool else flag]
        info = typer.Option(*names, *([LETTERS[key]] if key in LETTERS else []), **about)
    name = f"{key}_" if keyword.iskeyword(key) else key  # --for
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, info])


def _common(short: Sequence[str]) -> list[inspect.Parameter]:
    """Return the options that every command has."""
    eager: dict[str, Any] = {"is_eager": True}
    options: list[tuple[list[str], Any, str, dict[str, Any]]] = [
        (["--config"], str | None, "Read options from a YAML file; the command line wins.", {"metavar": "PATH"}),
        (["--print-config"], bool, "Print all options with their values as YAML and exit.", {}),
        (["--json"], bool, "Print the result as one JSON object.", {}),
        (["--quiet", "-q"], bool, "Show no progress and no notes, only warnings.", {}),
        (["--verbose", "-v"], bool, "Also say what is decided and why.", {}),
        (["--version", "-V"], bool, "Print the version and exit.", {"callback": print_version, **eager}),
        (
            ["--help-all"],
            bool,
            "Show every option and exit.",
            {"callback": show_everything, "hidden": not short, **eager},
        ),
    ]
    return [
        inspect.Parameter(
            names[0].removeprefix("--").replace("-", "_"),
            inspect.Parameter.KEYWORD_ONLY,
            default=False if kind is bool else None,
            annotation=Annotated[
                kind, typer.Option(*names, help=text, show_default=False, rich_help_panel=EVERY_COMMAND, **more)
            ],
        )
        for names, kind, text, more in options
    ]


def print_version(asked: bool) -> None:
    """Print the version and exit, if asked."""
    if asked:
        from tinygpt2 import __version__

        typer.echo(f"tinygpt2 {__version__}")
        raise typer.Exit
