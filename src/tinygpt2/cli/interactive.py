"""`generate` on a terminal: shows text while it is generated, and runs the interactive prompt."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.markup import escape

from tinygpt2.cli.render import print_error
from tinygpt2.config.base import extra, flag_name
from tinygpt2.config.common import DECODING
from tinygpt2.config.decoding import GenerateConfig
from tinygpt2.decoding.generation import (
    GenerateResult,
    Generation,
    LoadedModel,
    continue_prompt,
    generate,
    load_with_tokenizer,
)
from tinygpt2.errors import ConfigError, TinyGPT2Error
from tinygpt2.runtime.devices import computes_on_device
from tinygpt2.utils.progress import say
from tinygpt2.utils.terminal import open_console, printable

_HELP = "/NAME VALUE changes a setting, /NAME resets it to its default, // starts a prompt that begins with a slash"


@computes_on_device
def generate_on_terminal(config: GenerateConfig, *, as_json: bool) -> GenerateResult | None:
    """Run `generate`. Return None if the texts were already shown while they were generated."""
    if config.interactive:
        return _converse(config, as_json=as_json)
    live = not as_json and sys.stdout.isatty() and _can_stream(config)
    if not live:
        return generate(config)
    generate(config, _announce)
    return None


def _can_stream(config: GenerateConfig) -> bool:
    return config.num_beams == 1 and config.num_samples == 1


def _announce(loaded: LoadedModel, prompt: str) -> Callable[[str], None]:
    """Print the model and the prompt, and return a function that prints the text while it is generated."""
    console = open_console()
    console.rule(escape(printable(loaded.name, sys.stdout)), align="left")
    console.print(prompt, markup=False, style="bold", end="", soft_wrap=True)
    return _show


def _show(text: str) -> None:
    print(printable(text, sys.stdout), end="", flush=True)


def _converse(config: GenerateConfig, *, as_json: bool) -> GenerateResult | None:
    """Read prompts until end of input and continue each with every model. A line such as `/seed 1` changes settings."""
    models = [load_with_tokenizer(name, allow_pickle=config.allow_pickle) for name in config.model]
    console = open_console()
    texts: list[Generation] = []
    with _history():
        turn = -1
        for line in _lines():
            if line.startswith("/") and not line.startswith("//"):
                try:
                    config = _changed(config, line)
                    turn = -1 if re.match(r"/\s*seed\b", line) else turn
                except ConfigError as error:
                    print_error(error, as_json=False)
                continue
            prompt, turn = line.removeprefix("/"), turn + 1
            # Each turn uses another seed, so that repeating a prompt gives another sample.
            settings = config.model_copy(update={"seed": config.seed + turn})
            for loaded in models:
                live = not as_json and _can_stream(config)
                try:
                    added = list(continue_prompt(loaded, prompt, settings, _announce(loaded, prompt) if live else None))
                except TinyGPT2Error as error:  # a prompt that is too long must not end the session
                    print_error(error, as_json=False)
                    continue
                texts += added
                for text in added if not live and not as_json else []:
                    console.print(text.prompt, markup=False, style="bold", end="", soft_wrap=True)
                    console.print(text.text, markup=False, soft_wrap=True)
    return GenerateResult(texts) if as_json else None


def _changed(config: GenerateConfig, line: str) -> GenerateConfig:
    """Return the settings changed by a line such as `/temperature 0.7`, and show them.

    Raises:
        ConfigError: the setting is unknown, or its value is invalid.
    """
    fields = {key: field for key, field in config.options().items() if extra(field, "panel") == DECODING}
    names = {flag_name(key)[2:]: key for key in fields}
    name, _, value = line[1:].strip().partition(" ")
    if name in names:
        asked = {names[name]: value.strip() or fields[names[name]].default}
        config = GenerateConfig(**config.model_dump(by_alias=True) | asked)
    elif name:
        raise ConfigError(
            f"unknown setting /{name}", f"the settings are /{', /'.join(names)}; / alone shows their values"
        )
    values = [f"{name} {getattr(config, key)}" for name, key in names.items() if getattr(config, key) is not None]
    say(", ".join(values) if name else f"{', '.join(values)}\n{_HELP}")
    return config


def _lines() -> Iterator[str]:
    while True:
        try:
            if sys.stdin.isatty() and not sys.stdout.isatty():
                print("> ", end="", file=sys.stderr, flush=True)  # stdout is not a terminal: keep it free for results
            prompt = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            print_error(ConfigError(f"the prompt is not valid UTF-8: {error.reason}"), as_json=False)
            continue
        if prompt.strip():
            yield prompt


@contextmanager
def _history() -> Iterator[None]:
    """Keep the history of the prompts typed on a terminal from one session to the next."""
    try:
        import readline
    except ImportError:  # some builds of Python do not have readline: no history then
        yield
        return
    path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tinygpt2" / "history"
    if path.is_file():
        readline.read_history_file(path)
    try:
        yield
    finally:
        if sys.stdin.isatty():
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(path)
