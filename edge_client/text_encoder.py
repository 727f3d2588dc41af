"""From texts to token ids. What comes again, a word or a message, is not encoded again."""

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from storage import encode
from storage.tokenizer import beginning, described, separator

__all__ = ["TextEncoder"]

MOST_KNOWN = 2**16
"""Pieces of text whose ids are kept, about 250 bytes each."""
LONGEST_KNOWN = 32
"""Characters of such a piece."""
WHITE_SPACE = re.compile(r"\s")


class TextEncoder:
    """
    Gives each text the ids that the tokenizer gives it: the bytes of an array of ``dtype``.

    A tokenizer first looks for its added tokens, such as those that a chat template puts around messages, and then encodes what
    is between two of them by itself. So the ids of a text are those of its messages, each with the token before it, and a
    message that stands in many texts, as one at the beginning of a conversation does, is encoded once.

    A tokenizer that cuts a text into words, as GPT-2's does, gives a word the same ids wherever it stands. Where all words are
    separated by single spaces, the ids are therefore those of the words, each with the space before it.
    """

    def __init__(self, tokenizer: Tokenizer, end_token: int) -> None:
        highest = max(end_token, *tokenizer.get_vocab(with_added_tokens=True).values(), 0)
        self.dtype = np.dtype("<u2" if highest < 2**16 else "<u4")
        self.beginning = beginning(tokenizer)
        """The ids that the tokenizer puts before a text; `encode` does not."""
        self.separator = separator(tokenizer)
        """What is put before a text that continues another."""
        self._tokenizer = tokenizer
        whole = described(tokenizer)
        self._knows_words = _cuts_into_words(whole)
        self._added, self._cuts = _where_to_cut(whole)
        self._known: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """
        Raises:
            ModelError: the tokenizer fails on a text.
        """
        pieces = [list(self._pieces(text)) for text in texts]
        new = list(set(chain.from_iterable(pieces)) - self._known.keys())
        for piece, ids in zip(new, encode(self._tokenizer, new), strict=True):
            self._known[piece] = np.array(ids, self.dtype).tobytes()
        known = self._known.__getitem__
        encoded = [b"".join(map(known, some)) for some in pieces]
        self._forget(new)
        return encoded

    def _pieces(self, text: str) -> Iterator[str]:
        """Those of which the text's ids are, one after the other."""
        start = 0
        for found in self._added.finditer(text) if self._added else ():
            if found[0] in self._cuts and found.start() > start:
                yield from self._words(text[start : found.start()])
                start = found.start()
        yield from self._words(text[start:])

    def _words(self, text: str) -> list[str]:
        if not self._knows_words:
            return [text]
        pieces = [f" {word}" for word in text.split()]
        if pieces and text[0] != " ":
            pieces[0] = pieces[0][1:]
        return pieces if "".join(pieces) == text else [text]

    def _forget(self, new: list[str]) -> None:
        for piece in new:
            if len(piece) > LONGEST_KNOWN:
                del self._known[piece]
        if len(self._known) > MOST_KNOWN:
            self._known.clear()  # the frequent ones are soon back


def _where_to_cut(whole: dict[str, Any]) -> tuple[re.Pattern[str] | None, frozenset[str]]:
    """
    The added tokens that are looked for first, as a pattern that finds them as the library does: at each place the longest. And
    those of them before which a text may be cut: behind that, nothing depends on what stands before.
    """
    tokens = [token for token in whole["added_tokens"] if not token["normalized"] and token["content"]]
    if not tokens or any(token["single_word"] for token in tokens):  # whether such a word is one, its neighbours decide
        return None, frozenset()
    longest_first = sorted((token["content"] for token in tokens), key=len, reverse=True)
    # One with lstrip takes the white space before it.
    cuts = {token["content"] for token in tokens if not token["lstrip"] and not token["content"][0].isspace()}
    return re.compile("|".join(map(re.escape, longest_first))), frozenset(cuts)


def _cuts_into_words(whole: dict[str, Any]) -> bool:
    """
    Whether every space between two words is where the tokenizer cuts, so that nothing on one side decides on the other's ids:
    GPT-2's own way to cut, nothing that changes the text before, and no added token that reaches over a space.
    """
    cutter = whole["pre_tokenizer"] or {}
    return (
        whole["model"]["type"] == "BPE"
        and cutter.get("type") == "ByteLevel"
        and cutter.get("use_regex", True)
        and not cutter.get("add_prefix_space", True)
        and not whole["normalizer"]
        and not any(
            token["lstrip"] or token["rstrip"] or token["single_word"] or WHITE_SPACE.search(token["content"])
            for token in whole["added_tokens"]
        )
    )
