"""Rows of prompts and responses, or of chats, as texts whose parts the loss counts or does not.

A row becomes a JSON list of turns: the text before a response, and the response. So pairs go through the same readers
as any other document.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tinygpt2.config.data import PairOptions
from tinygpt2.errors import ConfigError, DataError
from tinygpt2.utils.files import read_text, require_valid

MESSAGES = "messages"  # the column of a chat
DEFAULT_TEMPLATE = "{prompt}\n{response}"
_PROMPT, _RESPONSE = "{prompt}", "{response}"


@dataclass(frozen=True)
class PairReader:
    """How a row becomes turns.

    Attributes:
        prompt, response: the columns; None if rows are chats.
        template: how a turn is written, with {prompt} and {response}.
    """

    prompt: str | None = None
    response: str | None = None
    template: str = DEFAULT_TEMPLATE
    needs_rows: ClassVar[bool] = True

    @classmethod
    def of(cls, options: PairOptions) -> PairReader:
        """Return the reader that the options describe.

        Raises:
            ConfigError: there is no such template, or it does not have {prompt} and then {response}, each once.
        """
        template = DEFAULT_TEMPLATE
        if options.template is not None:
            template = read_text(Path(options.template)).removesuffix("\n")
            once = template.count(_PROMPT) == 1 and template.count(_RESPONSE) == 1
            if not once or template.index(_PROMPT) > template.index(_RESPONSE):
                raise ConfigError(
                    f"--template {options.template} does not have {_PROMPT} and then {_RESPONSE}, each once",
                    f"a template is a text such as: Question: {_PROMPT} Answer: {_RESPONSE}",
                )
        return cls(options.prompt_column, options.response_column, template)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return (MESSAGES,) if self.prompt is None or self.response is None else (self.prompt, self.response)

    def text(self, row: Any, where: str, *, lenient: bool) -> str:
        """Return the turns of a row as JSON, or an empty text if it has no response.

        Raises:
            DataError: the row lacks a column, or a column holds neither text nor messages.
        """
        if not isinstance(row, dict) or any(name not in row for name in self.columns):
            found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{where}: no {' and '.join(repr(name) for name in self.columns)} (found: {found})",
                "give the names of the fields with --prompt-column and --response-column",
            )
        if self.prompt is None or self.response is None:
            turns = _chat(row[MESSAGES], where)
        else:
            turns = [(_content(row[self.prompt], where), _content(row[self.response], where))]
        if not any(answer.strip() for _, answer in turns):
            return ""
        before, rest = self.template.split(_PROMPT)
        between, after = rest.split(_RESPONSE)
        texts = json.dumps(
            [(before + prompt + between, answer + after) for prompt, answer in turns], ensure_ascii=False
        )
        if not lenient:
            require_valid(texts, where)
        return texts


def _chat(messages: Any, where: str) -> list[tuple[str, str]]:
    """Return the turns of a chat: what is said before each answer of the assistant, and the answer."""
    turns: list[tuple[str, str]] = []
    before: list[str] = []
    for message in _messages(messages, where):
        if message["role"] == "assistant":
            turns.append(("\n".join(before), message["content"]))
            before = []
        else:
            before.append(message["content"])
    return turns


def _content(value: Any, where: str) -> str:
    """Return a column's text. It may be a list of messages, whose texts are joined by line ends."""
    if value is None or isinstance(value, str):
        return value or ""
    return "\n".join(message["content"] for message in _messages(value, where))


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    messages: list[Any] = value if isinstance(value, list) else [None]
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(
                f"{where}: neither a text nor a list of messages",
                'a message is an object with texts: {"role": "user", "content": "..."}',
            )
    return messages
