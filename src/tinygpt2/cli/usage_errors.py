"""What Typer says of a wrong command line, in the words of this program."""

from __future__ import annotations

import re
from typing import Any

from tinygpt2.errors import ConfigError
from tinygpt2.utils.suggestions import closest, did_you_mean

_WORDS = (
    (r"Option '(\S+)' requires an argument\.", r"\1 needs a value"),
    (r"Option '(\S+)' does not take a value\.", r"\1 is a switch: it takes no value"),
    (r"Got unexpected extra argument\(?s?\)? \((.*)\)", r"unexpected words: \1"),
    (r"Missing command\.", "no command was given"),
)


def usage_error(error: Any) -> ConfigError:
    """Return the error for a wrong option, command or argument, with the closest known name.

    Args:
        error: what Typer raised.
    """
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    if context is None:
        return ConfigError(_in_our_words(error.message), "--help after the command explains its options")
    path, commands = context.command_path, getattr(context.command, "commands", {})
    hint = f"{path} --help lists the commands" if commands else f"{path} --help-all lists the options"
    if option is not None and hasattr(error, "possibilities"):
        known = [name for one in context.command.get_params(context) for name in (*one.opts, *one.secondary_opts)]
        if not option.startswith("--"):
            return ConfigError(f"No such option: {option}", f"names of several letters begin with two dashes; {hint}")
        meant = closest(option, [name for name in known if name.startswith("--")])
        if commands and not meant:
            hint = f"the options of a command come after its name: {path} COMMAND {option}"
        guess = f", did you mean {' or '.join(meant)}?" if meant else ""
        return ConfigError(f"No such option: {option}{guess}", hint)
    if found := re.fullmatch(r"No such command '(.*)'\.", error.message):
        return ConfigError(f"No such command {found[1]!r}{did_you_mean(found[1], commands)}", hint)
    return ConfigError(_in_our_words(error.message), hint)


def _in_our_words(message: str) -> str:
    for pattern, words in _WORDS:
        if re.fullmatch(pattern, message):
            return re.sub(pattern, words, message)
    return message
