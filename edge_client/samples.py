"""From the entries of a file to samples of token ids: what stands in them, and how much of each is learnt."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from storage import ChatTemplate, Message, TemplateFailed, shown
from terminal import count

from .text_encoder import TextEncoder
from .text_file import ANSWERS, Conversation, DataError, Entry, Instruction

__all__ = ["LOSS_ON", "Form", "samples"]

ALL, COMPLETION, ASSISTANT = LOSS_ON = ("all", "completion", "assistant")
WORD = re.compile(r"\w+")
NO_TEMPLATE = (
    "a conversation becomes text by the model's chat template, and the model has none: take a model that was made for "
    'conversations, put a chat_template.jinja into its folder, or write "prompt" and "completion" as strings'
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """
    How entries become samples.

    Raises:
        DataError: ``loss_on`` is none of these.
    """

    template: ChatTemplate | None = None
    """The model's."""
    loss_on: str | None = None
    """
    What is learnt: "all"; or of conversations the turns of the "assistant", or only the last of these, the "completion", and of
    pairs their completion. None is "assistant", but learns all of a text that stands alone.
    """

    def __post_init__(self) -> None:
        if self.loss_on is not None and self.loss_on not in LOSS_ON:
            raise DataError(f"loss-on must be {', '.join(LOSS_ON[:-1])} or {LOSS_ON[-1]}, got {self.loss_on}")

    @property
    def identity(self) -> list[str]:
        """What decides on the samples of a file; nothing of the usual form of a model without a template."""
        return [*([self.template.identity] if self.template else []), *([f"loss-on={self.loss_on}"] if self.loss_on else [])]


Parts = tuple[str | None, str, str | None]
"""
The texts of a sample: what is given, or None where nothing is; the rest; and of a conversation, of which the rest has what is
given, too, where it stands.
"""


def samples(entries: Sequence[Entry], form: Form, encoder: TextEncoder, end_token: int) -> Iterator[tuple[bytes, int]]:
    """
    The token ids of each sample, as bytes, and the number of its last tokens that are predicted.

    A pair is begin + ids(prompt) + end + ids(" " + completion) + end, as in the LoRA papers; a text alone is begin + ids(text)
    + end. ``begin`` is what the tokenizer itself puts before a text; the space is left out where the tokenizer puts one there.
    ``end`` is added only to what does not end with it already.

    Of a conversation each turn of the assistant is a sample, which ends with it. Its tokens are what the template makes of the
    messages so far; learnt is that in which they differ from the messages before, with an answer opened. So each answer stands
    behind exactly what the model is given when it is used, also where a template writes the last turn as no other.

    Raises:
        DataError: an entry cannot be learnt from in this form.
        ModelError: the tokenizer or the template fails.
    """
    size = encoder.dtype.itemsize
    end, begin = np.array(end_token, encoder.dtype).tobytes(), np.array(encoder.beginning, encoder.dtype).tobytes()
    parts: list[Parts] = []
    for entry in entries:
        if isinstance(entry, Conversation):
            parts += _turns(entry, form)
        elif isinstance(entry, Instruction) and form.template is not None and entry.completion:
            turns = ({"role": "user", "content": entry.prompt or ""}, {"role": ANSWERS, "content": entry.completion})
            parts += _turns(Conversation(turns, where=entry.where), form)
        elif entry.prompt is not None:
            parts.append((entry.prompt, f"{encoder.separator}{entry.completion}", None))
        elif entry.completion:
            if form.loss_on not in (None, ALL):
                raise DataError(
                    f"{entry.where}: --loss-on {form.loss_on} learns nothing of a text that stands alone; leave it out"
                )
            parts.append((None, entry.completion, None))
    encoded = encoder.encode([text for given, rest, _ in parts for text in (given or "", rest)])
    for (given, _, conversation), context, rest in zip(parts, encoded[::2], encoded[1::2], strict=True):
        if conversation is not None:
            tokens, num_given = rest, _num_alike(context, rest, size)
            if len(tokens) < 2 * size:
                raise DataError(
                    f"{conversation}: the chat template makes a text of {count(len(tokens) // size, 'token')} of it; a token "
                    "is learnt from those before it, so that two are the least: leave the entry out"
                )
        elif given is None:
            tokens, num_given = begin + _ended(rest, end), 0
        else:
            before = begin + _ended(context, end)
            tokens, num_given = before + _ended(rest, end), len(before) // size
        if form.loss_on == ALL:
            num_given = 0
        if rest not in (b"", end) or given is not None:  # a text of an end alone is as empty as one of nothing
            # Nothing stands before the first token, from which it could be predicted.
            yield tokens, len(tokens) // size - max(num_given, 1)


def _turns(entry: Conversation, form: Form) -> Iterator[Parts]:
    if form.template is None:
        raise DataError(f"{entry.where}: {NO_TEMPLATE}")
    try:
        if form.loss_on == ALL:
            whole = form.template.render(entry.messages)
            _check_written(entry.messages, whole, entry.where, "is said")
            yield None, whole, entry.where
            return
        answers = entry.answers[-1:] if form.loss_on == COMPLETION else entry.answers
        if not answers:
            raise DataError(
                f"{entry.where}: the assistant says nothing, so there is nothing to learn; --loss-on all learns the rest"
            )
        for number in answers:
            before = form.template.render(entry.messages[:number], opens_answer=True) if number else ""
            whole, where = form.template.render(entry.messages[: number + 1]), f"{entry.where}, message {number + 1}"
            if not whole.startswith(before):
                raise DataError(
                    f"{where}: the chat template opens an answer with {shown(before[-40:])} and "
                    "does not write that once the answer is there: what is to be learnt is not known; --loss-on all learns all"
                )
            _check_written(entry.messages[number : number + 1], whole[len(before) :], where, "the assistant says")
            yield before, whole, where
    except TemplateFailed as failure:
        raise DataError(f"{entry.where}: the model's chat template does not take this conversation: {failure}") from None


def _check_written(messages: Sequence[Message], text: str, where: str, what: str) -> None:
    """
    A template may trim what a message says, take a thought out of it, or write it in capitals. But one that was made for
    content in parts, such as pictures, finds none in a string: to say nothing would be learnt.

    Raises:
        DataError: the text has neither the content nor a word of any of the messages.
    """
    if any(message["content"].strip() in text for message in messages):
        return
    said = {word for message in messages for word in WORD.findall(message["content"].casefold())}
    if said.isdisjoint(WORD.findall(text.casefold())):
        raise DataError(
            f"{where}: the chat template writes nothing of what {what} there, only {shown(text)}: there is nothing to learn; "
            "take a template that writes a message's content as a string, or leave the entry out"
        )


def _ended(ids: bytes, end: bytes) -> bytes:
    return ids if ids.endswith(end) else ids + end


def _num_alike(one: bytes, other: bytes, size: int) -> int:
    """With how many equal ids two arrays of ids begin."""
    dtype = f"<u{size}"
    first, second = np.frombuffer(one, dtype), np.frombuffer(other, dtype)
    shorter = min(len(first), len(second))
    different = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(different[0]) if len(different) else shorter
