"""The Typer app: all commands, their help and the exit codes. Importing this module does not import torch."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Annotated

import typer

from tinygpt2.cli.commands import COMMANDS
from tinygpt2.cli.help import HELP_NAMES, HelpGroup
from tinygpt2.cli.options import add_command, print_version
from tinygpt2.cli.output.render import print_error
from tinygpt2.cli.usage_errors import usage_error
from tinygpt2.errors import ConfigError, InterruptedRunError, TinyGPT2Error, internal_error, machine_failure
from tinygpt2.runtime.processes import command_begins, rank
from tinygpt2.runtime.signals import stop_like_ctrl_c
from tinygpt2.utils.terminal import tolerate_encodings

app = typer.Typer(
    name="tinygpt2",
    help="Make GPT-2 small: cut a student out of a teacher, distil it, and measure how good it is.",
    epilog="COMMAND --help explains a command. First time here? Run: tinygpt2 quickstart",
    cls=HelpGroup,
    context_settings={"help_option_names": HELP_NAMES},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    suggest_commands=False,
)


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Print the version and exit.", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    pass


for _command in COMMANDS:
    add_command(app, *_command)

_CLOSED_PIPE = 141  # what shells report for a process that SIGPIPE ended
_TURN = 3.0  # seconds that other processes wait before they report an error


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the documented exit code."""
    tolerate_encodings()
    stop_like_ctrl_c()
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with command_begins():
            code = _run(arguments, as_json=asks_for_json(arguments))
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        code = _CLOSED_PIPE
    sys.exit(code)


def asks_for_json(arguments: list[str]) -> bool:
    """Return whether a command line asks for JSON, so that errors of the command line itself are JSON too."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return "--json" in arguments or any(
        part == "--output-format=json" or (part, then) == ("--output-format", "json") for part, then in pairs
    )


def _unexpected(error: Exception) -> TinyGPT2Error:
    if not isinstance(error, OSError):
        return internal_error(error)
    return ConfigError(
        f"{error.filename or 'input or output'}: {error.strerror or error}",
        "check the path, its permissions and the disk space",
    )


def _with_hint(error: TinyGPT2Error, command: str) -> TinyGPT2Error:
    """Return the error; one of the options that names nothing better says where they are listed."""
    if isinstance(error, ConfigError) and error.hint is None and command in {one.name for one in COMMANDS}:
        error.hint = f"tinygpt2 {command} --help-all lists the options"
    return error


def _run(arguments: list[str], *, as_json: bool) -> int:
    debug = os.environ.get("TINYGPT2_DEBUG") == "1"
    try:
        code = int(app(arguments, standalone_mode=False, prog_name="tinygpt2") or 0)
        if code != InterruptedRunError.exit_code:
            return code
        failure: TinyGPT2Error = InterruptedRunError("interrupted")  # before the command began
    except TinyGPT2Error as error:
        failure = _with_hint(error, arguments[0])
        if debug and error.__cause__ is not None:
            traceback.print_exc()
    except typer.TyperException as error:
        failure = usage_error(error)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # Typer has turned it into an exit with 1
            raise ended.__context__ from None
        raise
    except (KeyboardInterrupt, typer.Abort):
        failure = InterruptedRunError("interrupted")
    except Exception as error:
        failure = machine_failure(error) or _unexpected(error)
        if debug:
            traceback.print_exc()
    if rank():
        time.sleep(_TURN)  # process 0 usually reports the same error first, and its launcher then ends this process
        failure = type(failure)(f"process {rank()}: {failure.message}", failure.hint)
    print_error(failure, as_json=as_json and not rank())
    return failure.exit_code
