"""`generate` on a terminal: shows text while it is generated, and runs the interactive prompt."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from tinygpt2.cli.output.live_text import TextView, choose_view, render_draft, render_generate, render_summary
from tinygpt2.cli.output.render import print_error
from tinygpt2.cli.output.tables import print_note
from tinygpt2.config.base import extra, flag_name
from tinygpt2.config.common import DECODING
from tinygpt2.config.decoding import GenerateConfig
from tinygpt2.decoding.generation import (
    GenerateResult,
    Generation,
    LoadedModel,
    continue_prompt,
    draft_figures,
    generate,
    load_models,
)
from tinygpt2.errors import ConfigError, TinyGPT2Error
from tinygpt2.evaluation.results import short_names
from tinygpt2.models.parameters import count_parameters
from tinygpt2.runtime.devices import computes_on_device
from tinygpt2.utils.progress import say
from tinygpt2.utils.suggestions import closest
from tinygpt2.utils.terminal import open_console
from tinygpt2.utils.units import short_count

_HELP, _SETTINGS, _QUIT = "help", "settings", ("quit", "exit")
_COMMANDS = [
    ("/NAME VALUE", "changes a setting, as in /temperature 0.7"),
    ("/NAME", "resets a setting to its default"),
    ("/settings", "shows the values of all settings"),
    ("//TEXT", "is a prompt that begins with a slash"),
    ("/quit", "ends the session, and so does Ctrl-D"),
]


@computes_on_device
def generate_on_terminal(config: GenerateConfig, *, as_json: bool) -> GenerateResult | None:
    """Run `generate`. Return None if the texts were already shown while they were generated."""
    if config.interactive:
        return _converse(config, as_json=as_json)
    if as_json or not sys.stdout.isatty() or not _can_stream(config):
        return generate(config)
    with _view(config, headed=True) as view:
        result = generate(config, lambda loaded, prompt: view.begin(loaded.name, prompt), view.finish)
    render_summary(result, open_console())
    return None


def _can_stream(config: GenerateConfig) -> bool:
    return config.num_beams == 1 and config.num_samples == 1


@contextmanager
def _view(config: GenerateConfig, *, headed: bool) -> Iterator[TextView]:
    view = choose_view(short_names(config.model), headed=headed)
    try:
        yield view
    finally:
        view.close()


def _converse(config: GenerateConfig, *, as_json: bool) -> GenerateResult | None:
    """Read prompts until end of input and continue each with every model. A line such as `/seed 1` changes settings."""
    models = load_models(config)
    if sys.stdin.isatty():
        _greet(models)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that a line with a bad byte is refused alone
    texts: list[Generation] = []
    with _history():
        turn = -1
        for line in _lines():
            command = line[1:].strip() if line.startswith("/") and not line.startswith("//") else None
            if command in _QUIT:
                break
            if command is not None:
                try:
                    config = _obeyed(config, command)
                    turn = -1 if re.match(r"seed\b", command) else turn
                except ConfigError as error:
                    print_error(error, as_json=False)
                continue
            prompt, turn = line.removeprefix("/"), turn + 1
            # Each turn uses another seed, so that repeating a prompt gives another sample.
            texts += _answer(models, prompt, config.model_copy(update={"seed": config.seed + turn}), as_json=as_json)
    return GenerateResult(texts, draft_figures(models)) if as_json else None


def _greet(models: list[LoadedModel]) -> None:
    names = short_names([loaded.name for loaded in models])
    known = [f"{names[one.name]} ({short_count(count_parameters(one.model))} parameters)" for one in models]
    say(" and ".join(known))
    say("Type the beginning of a text. /help explains the settings, /quit or Ctrl-D ends.")


def _answer(models: list[LoadedModel], prompt: str, config: GenerateConfig, *, as_json: bool) -> list[Generation]:
    """Continue a prompt with every model, and show the texts unless they become JSON."""
    texts: list[Generation] = []
    live = not as_json and sys.stdout.isatty() and _can_stream(config)
    with _view(config, headed=len(models) > 1) as view:
        for loaded in models:
            try:
                added = list(continue_prompt(loaded, prompt, config, view.begin(loaded.name, prompt) if live else None))
            except TinyGPT2Error as error:  # a prompt that is too long must not end the session
                view.close()
                print_error(error, as_json=False)
                continue
            texts += added
            if live:
                view.finish(added[0])
    if live:
        render_draft(GenerateResult(texts, draft_figures(models)), open_console())
    elif not as_json:
        render_generate(GenerateResult(texts, draft_figures(models)), open_console())
        sys.stdout.flush()
    return texts


def _obeyed(config: GenerateConfig, command: str) -> GenerateConfig:
    """Return the settings changed by a command such as `temperature 0.7`, and show them, or the help.

    Raises:
        ConfigError: the setting is unknown, or its value is invalid.
    """
    fields = {key: field for key, field in config.options().items() if extra(field, "panel") == DECODING}
    names = {flag_name(key)[2:]: key for key in fields}
    name, _, value = command.partition(" ")
    if name == _HELP:
        _print_help(config, names)
        return config
    if name in names:
        asked = {names[name]: value.strip() or fields[names[name]].default}
        config = GenerateConfig(**config.model_dump(by_alias=True) | asked)
    elif name not in ("", _SETTINGS):
        near = closest(name, [*names, _HELP, _SETTINGS, *_QUIT])
        guess = f", did you mean /{near[0]}?" if near else ""
        raise ConfigError(
            f"unknown setting /{name}{guess}", f"the settings are /{', /'.join(names)}; /help explains them"
        )
    values = [f"{name} {getattr(config, key)}" for name, key in names.items() if getattr(config, key) is not None]
    print_note(", ".join(values), open_console(stderr=True))
    return config


def _print_help(config: GenerateConfig, names: dict[str, str]) -> None:
    console = open_console(stderr=True)
    values = [getattr(config, key) for key in names.values()]
    fields = [config.options()[key] for key in names.values()]
    width = max(map(len, names))
    for name, value, field in zip(names, values, fields, strict=True):
        shown = extra(field, "shown")
        now = value if value is not None else f"default: {shown}" if shown else "not set"
        print_note(f"/{name:<{width}}  {now}. {field.description}", console, indent=" " * (width + 3))
    for form, meaning in _COMMANDS:
        print_note(f"{form:<{width + 1}}  {meaning}", console)


def _lines() -> Iterator[str]:
    while True:
        try:
            if sys.stdin.isatty() and not sys.stdout.isatty():
                print("> ", end="", file=sys.stderr, flush=True)  # stdout is not a terminal: keep it free for results
            prompt = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
        except EOFError:
            return
        if prompt.strip():
            yield prompt


@contextmanager
def _history() -> Iterator[None]:
    """Keep the history of the prompts typed on a terminal from one session to the next, if it can be kept."""
    try:
        import readline
    except ImportError:  # some builds of Python do not have readline: no history then
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    kept = suppress(OSError, RuntimeError)  # no home directory, one that is not ours, another program's format
    path = None
    with kept:
        path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tinygpt2" / "history"
        if path.is_file():
            readline.read_history_file(path)
    try:
        yield
    finally:
        with kept:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                readline.set_history_length(1000)
                readline.write_history_file(path)
