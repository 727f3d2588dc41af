"""
A model's chat template: the text that a conversation becomes. Templates are a stranger's programs: they run in the sandbox of
jinja2, which is asked for only where there is a conversation.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import ModelError
from .folder import Folder
from .tokenizer import chat_template, special_tokens

__all__ = ["ChatTemplate", "Message", "TemplateFailed"]

Message = Mapping[str, str]
"""What one side says: "role" and "content"."""
LONGEST_REASON = 200
LONGEST_TEXT = 2**26
"""Characters of a conversation's text: a template may write without end."""
SAFE_JINJA2 = (3, 1, 6)
"""Older sandboxes have known holes."""


class TemplateFailed(ValueError):
    """A template refuses a conversation, or fails on it; the message says why."""


class ChatTemplate:
    """
    Args:
        source: the template, as jinja2 reads it.
        special_tokens: the special tokens' texts by the names that a template knows them by, such as "bos_token".
        where: its file or folder, for messages.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: Path) -> None:
        self.source, self.special_tokens, self.where = source, dict(special_tokens), where

    @classmethod
    def find(cls, folder: Path | Folder) -> "ChatTemplate | None":
        """
        The template of a model's folder; None if it has none.

        Raises:
            ModelError: the files that may hold it cannot be read.
        """
        source = chat_template(folder)
        return (
            None if source is None else cls(source, special_tokens(folder), folder if isinstance(folder, Path) else folder.path)
        )

    @property
    def identity(self) -> str:
        """Everything that decides which text a conversation becomes."""
        return json.dumps([self.source, sorted(self.special_tokens.items())])

    def render(self, messages: Sequence[Message], *, opens_answer: bool = False) -> str:
        """
        The text of a conversation.

        Args:
            opens_answer: whether what begins the assistant's next turn is put behind it.

        Raises:
            TemplateFailed: the template does not take this conversation.
            ModelError: this is no template, or jinja2 is not installed.
        """
        given = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        template, text = self._compiled, ""
        try:
            for piece in template.generate(**given, add_generation_prompt=opens_answer, **self.special_tokens):
                text += piece
                if len(text) > LONGEST_TEXT:
                    raise TemplateFailed(f"it writes more than {LONGEST_TEXT >> 20} million characters")
        except TemplateFailed:
            raise
        except Exception as error:  # whatever a stranger's program raises
            raise TemplateFailed(_reason(error)) from None
        return text

    @cached_property
    def _compiled(self) -> Any:
        """
        As transformers compiles it, but without a clock: a template that asks for the day has its own date for this case, or
        fails. Else the same data would be other tokens tomorrow.
        """
        try:
            from jinja2 import TemplateError, __version__, nodes
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ModuleNotFoundError as error:
            raise ModelError(
                f"conversations become text by a template, which needs {error.name}, which is not installed: "
                "pip install 'splitlora[chat]'"
            ) from None

        if tuple(int(number) for number in re.findall(r"\d+", __version__)[:3]) < SAFE_JINJA2:
            raise ModelError(
                f"conversations become text by a template, whose sandbox has known holes in jinja2 {__version__}: "
                "pip install 'splitlora[chat]'"
            )

        class Generation(Extension):
            """Marks in a template what the assistant says. Here, that is found by comparing texts."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return nodes.Scope(body, lineno=line)

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        try:
            return environment.from_string(self.source)
        except Exception as error:
            raise ModelError(f"{self.where}: the chat template cannot be read: {_reason(error)}") from None


def _to_json(value: Any, **options: Any) -> str:
    """Unlike jinja2's own filter, this escapes nothing for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _reason(error: Exception) -> str:
    first = str(error).strip().split("\n")[0][:LONGEST_REASON] or type(error).__name__
    if "strftime_now" in first:
        return (
            "it asks for today's date, by which the same data would be other tokens tomorrow; take a template with a fixed one"
        )
    return first
