"""
A model's chat template: the text that a conversation becomes. Templates are a stranger's programs: they run in the sandbox of
jinja2, which is asked for only where there is a conversation, and with bounds on the time and memory that one text takes.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
LONGEST_SECONDS = 10.0
"""Of a processor, for one text; templates take some milliseconds."""
LARGEST_NUMBER = 4096
"""In bits: a product of two long numbers takes hours, in which nobody is asked how long they last."""
MOST_BYTES = 2**30
"""Of memory, for one text."""
SAFE_JINJA2 = (3, 1, 6)
"""Older sandboxes have known holes."""


class TemplateFailed(ValueError):
    """A template refuses a conversation, or fails on it; the message says why."""


class _Bounds:
    """What one text may take at most. One is made at a time, since the limit on memory is the whole process's."""

    def __init__(self) -> None:
        self._lock, self._end = threading.Lock(), 0.0

    @contextmanager
    def on_one_text(self) -> Iterator[None]:
        with self._lock, _bounded_memory():
            self._end = time.thread_time() + LONGEST_SECONDS
            yield

    def check_time(self) -> None:
        """To be called in each round of a loop, and by each macro."""
        if time.thread_time() > self._end:
            raise TemplateFailed(f"it computes for more than {LONGEST_SECONDS:g} seconds")


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Within, this process gets no more than `MOST_BYTES` in addition, where the system knows such a limit: on Linux."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if before == resource.RLIM_INFINITY or in_use + MOST_BYTES < before:
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


BOUNDS = _Bounds()


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
            with BOUNDS.on_one_text():
                for piece in template.generate(**given, add_generation_prompt=opens_answer, **self.special_tokens):
                    text += piece
                    if len(text) > LONGEST_TEXT:
                        raise TemplateFailed(f"it writes more than {LONGEST_TEXT >> 20} million characters")
        except TemplateFailed:
            raise
        except MemoryError:
            raise TemplateFailed(f"it needs more than {MOST_BYTES >> 20} MiB of memory") from None
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

        class Environment(ImmutableSandboxedEnvironment):
            """In which no range is longer than 100,000, and no number is so long that a product with it takes long."""

            intercepted_binops = frozenset(("*", "**"))

            def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
                if isinstance(left, int) and isinstance(right, int):
                    bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                    if bits > LARGEST_NUMBER:
                        raise TemplateFailed(f"it computes with numbers of more than {LARGEST_NUMBER} bits")
                return super().call_binop(context, operator, left, right)

            @property
            def check_time(self) -> None:
                """What a template asks for in each round of a loop; a call would take as long as the round itself."""
                BOUNDS.check_time()

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        try:
            tree = environment.parse(self.source)
            repeated: list[Any] = list(tree.find_all((nodes.For, nodes.Macro, nodes.Block)))
            for node in repeated:
                check = nodes.ExprStmt(nodes.EnvironmentAttribute("check_time"))
                node.body.insert(0, check.set_lineno(node.lineno).set_environment(environment))
            return environment.from_string(tree)
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
