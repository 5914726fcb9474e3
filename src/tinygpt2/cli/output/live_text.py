"""Generated texts: whole, or while they grow; one below the other, or those of several models side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from tinygpt2.cli.output.tables import Column, print_table
from tinygpt2.utils.terminal import open_console, printable

if TYPE_CHECKING:
    from rich.console import Console

    from tinygpt2.decoding.generation import GenerateResult, Generation
    from tinygpt2.decoding.text_statistics import TextStatistics

_PIPED_RULE = 80  # columns of a rule in files and pipes
_NARROWEST, _GAP = 36, 3  # columns of a text beside others, and between two texts


class TextView(Protocol):
    """Shows texts while they are generated."""

    def begin(self, model: str, prompt: str) -> Callable[[str], None]:
        """Begin a text of a model; the function that is returned shows the next piece of it."""

    def finish(self, text: Generation) -> None:
        """Show the figures of the text that has just ended."""

    def close(self) -> None:
        """Leave what is shown as it is, also in the middle of a text."""


class WordWrap:
    """Breaks a text that grows into lines between words, so that the window's edge does not break a word.

    The characters of Chinese and Japanese are words of their own. A word is held back until it is complete.

    Args:
        width: returns the columns of the window, which may change.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width, self._column = width, 0
        self._spaces, self._word = "", list[tuple[str, str]]()

    def feed(self, text: str, style: str = "") -> Iterator[tuple[str, str]]:
        """Take the next piece of the text; yield what can be shown, with its style. A line end completes the text."""
        from rich.cells import cell_len

        for character in text:
            wide = cell_len(character) > 1
            if character.isspace() or wide:
                yield from self._place()
            if character == "\n":
                yield "\n", ""
                self._column, self._spaces = 0, ""
            elif character.isspace():
                tab = 8 - (self._column + len(self._spaces)) % 8
                self._spaces += " " * tab if character == "\t" else character
            else:
                self._word.append((character, style))
                if wide or len(self._word) >= self._width():  # longer than a line: no place to break it
                    yield from self._place()

    def _place(self) -> Iterator[tuple[str, str]]:
        """Yield the word that is complete, with the spaces or the line end before it."""
        from rich.cells import cell_len

        if not self._word:
            return
        width = sum(cell_len(character) for character, _ in self._word)
        if self._column > 0 and self._column + len(self._spaces) + width > self._width():
            yield "\n", ""
            self._column, self._spaces = 0, ""
        yield self._spaces, ""
        for style, letters in groupby(self._word, key=lambda part: part[1]):
            yield "".join(character for character, _ in letters), style
        self._column += len(self._spaces) + width
        self._spaces, self._word = "", []


class OneByOne:
    """Shows one text below the other while they grow.

    Args:
        names: the models' names, and how to show them.
        headed: whether a line with the model's name stands above each text.
    """

    def __init__(self, names: dict[str, str], console: Console, *, headed: bool) -> None:
        self._names, self._console, self._headed = names, console, headed

    def begin(self, model: str, prompt: str) -> Callable[[str], None]:
        """Print the model and the prompt."""
        if self._headed:
            _rule(self._names[model], self._console)
        lines = WordWrap(lambda: self._console.width)
        self._show(lines.feed(printable(prompt, sys.stdout), "bold"))
        return lambda piece: self._show(lines.feed(printable(piece, sys.stdout)))

    def finish(self, text: Generation) -> None:
        """Print the number of tokens and the speed."""
        self._console.print(f"{_figures(text)}\n", style="dim", markup=False)

    def close(self) -> None:
        """Do nothing: everything is on the terminal."""

    def _show(self, parts: Iterator[tuple[str, str]]) -> None:
        from rich.text import Text

        if shown := Text.assemble(*parts):
            self._console.print(shown, end="", soft_wrap=True)
            self._console.file.flush()


class SideBySide:
    """Shows the texts of several models side by side while they grow, one model after the other.

    Args:
        names: the models' names, and how to show them.
    """

    def __init__(self, names: dict[str, str], console: Console) -> None:
        from rich.live import Live

        self._names, self._console = names, console
        self._prompt, self._model, self._parts = "", "", dict[str, tuple[str, str]]()
        self._live: Live | None = None

    def begin(self, model: str, prompt: str) -> Callable[[str], None]:
        """Begin a text in the model's column; the first model's begins a new row of texts."""
        from rich.live import Live

        if self._live is None:
            self._prompt, self._parts = prompt, dict.fromkeys(self._names, ("", ""))
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._model = model

        def show(piece: str) -> None:
            self._change(model, self._parts[model][0] + piece, "")

        show("")
        return show

    def finish(self, text: Generation) -> None:
        """Show the number of tokens and the speed below the text; the last model's ends the row."""
        self._change(self._model, self._parts[self._model][0], _figures(text))
        if all(figures for _, figures in self._parts.values()):
            self.close()

    def close(self) -> None:
        """Leave what is shown on the terminal as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _change(self, model: str, text: str, figures: str) -> None:
        self._parts[model] = (text, figures)
        if self._live is not None:
            columns = [(self._names[name], [(self._prompt, *part)]) for name, part in self._parts.items()]
            self._live.update(_side_by_side(columns), refresh=True)


def fits_side_by_side(console: Console, models: int) -> bool:
    """Return whether the window is a terminal on which the texts of several models can stand side by side."""
    room = (console.width + _GAP) // max(models, 1) - _GAP
    return models > 1 and room >= _NARROWEST and console.is_terminal and not console.is_dumb_terminal


def render_generate(result: Any, console: Console) -> None:
    """Print whole texts: those of a prompt side by side on a wide terminal, otherwise one below the other."""
    from tinygpt2.evaluation.results import short_names

    names = short_names([text.model for text in result.results])
    for prompt, of_prompt in groupby(result.results, key=lambda text: text.prompt):
        texts = {model: list(of_model) for model, of_model in groupby(of_prompt, key=lambda text: text.model)}
        if fits_side_by_side(console, len(texts)):
            columns = [
                (names[model], [(prompt, text.text, _figures(text)) for text in several])
                for model, several in texts.items()
            ]
            console.print(_side_by_side(columns))
            continue
        for model, several in texts.items():
            for number, text in enumerate(several, 1):
                title = [names[model], *([f"text {number} of {len(several)}"] if len(several) > 1 else [])]
                _rule(", ".join([*title, _figures(text)]), console)
                _print_text(text, console)
    render_summary(result, console)


def render_summary(result: GenerateResult, console: Console) -> None:
    """Print what the draft model was worth and the statistics of the texts, as far as there are any."""
    from tinygpt2.evaluation.results import short_names

    render_draft(result, console)
    if result.statistics is not None:
        names = short_names([one.model for one in result.statistics])
        render_statistics({names[one.model]: one.statistics for one in result.statistics}, console)


def render_statistics(statistics: dict[str, TextStatistics], console: Console) -> None:
    """Print the statistics of the texts of each model."""

    def shown(values: Iterable[float | None], digits: int) -> list[str]:
        return ["-" if value is None else f"{value:.{digits}f}" for value in values]

    every = list(statistics.values())
    print_table(
        [
            Column("model", list(statistics), left=True),
            Column("texts", [str(one.texts) for one in every], rank=2),
            *(Column(f"distinct-{n}", shown((getattr(one, f"distinct_{n}") for one in every), 3)) for n in (1, 2, 3)),
            Column("repeated 4-grams", shown((one.repeated_4 for one in every), 3)),
            Column("tokens", shown((one.length for one in every), 1), rank=1),
            Column("tokens to end", shown((one.length_to_end for one in every), 1), rank=1),
            Column("ended", shown((one.ended for one in every), 2)),
        ],
        console,
    )


def render_draft(result: GenerateResult, console: Console) -> None:
    """Print what the draft model was worth, if there was one."""
    if (draft := result.draft) is not None:
        accepted = (
            "no token was drafted" if draft.acceptance is None else f"{draft.acceptance:.0%} of its tokens accepted"
        )
        console.print(f"draft: {accepted}, {draft.speedup:.2f} times as fast as the model alone", markup=False)


def _print_text(text: Generation, console: Console) -> None:
    if not console.is_terminal:  # in files and pipes, the text is as the model wrote it
        console.print(text.prompt + text.text)
        return
    view = OneByOne({text.model: ""}, console, headed=False)
    show = view.begin(text.model, text.prompt)
    show(f"{text.text}\n")


def _side_by_side(columns: Sequence[tuple[str, list[tuple[str, str, str]]]]) -> Any:
    """Return the texts of several models as one row: for each its name, then prompt, text and figures of each text."""
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, _GAP, 0, 0), expand=True)
    for _ in columns:
        grid.add_column(ratio=1, overflow="fold")
    grid.add_row(*(Rule(Text(printable(name, sys.stdout)), align="left") for name, _ in columns))
    for row in zip(*(texts for _, texts in columns), strict=True):
        grid.add_row(*(_cell(*texts) for texts in row))
    return grid


def _cell(prompt: str, text: str, figures: str) -> Any:
    from rich.text import Text

    shown = printable(text.rstrip("\n"), sys.stdout)
    return Text.assemble((printable(prompt, sys.stdout), "bold"), shown, (f"\n{figures}\n", "dim"))


def _rule(title: str, console: Console) -> None:
    """Print a line with a title: as wide as the window, or shorter in files and pipes."""
    from rich.rule import Rule
    from rich.text import Text

    rule = Rule(Text(printable(title, sys.stdout)), align="left")
    console.print(rule, width=console.width if console.is_terminal else max(_PIPED_RULE, len(title) + 6))


def _figures(text: Generation) -> str:
    return f"{text.tokens:,} tokens, {text.tokens / max(text.seconds, 1e-9):,.0f} tokens/s"


def choose_view(names: dict[str, str], *, headed: bool) -> TextView:
    """Return the view for a terminal: side by side if there are several models and room for them."""
    console = open_console()
    if fits_side_by_side(console, len(names)):
        return SideBySide(names, console)
    return OneByOne(names, console, headed=headed)
