"""From texts to token ids. What comes again, a word above all, is not encoded again."""

import json
import re
from collections.abc import Sequence
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from storage import encode
from storage.tokenizer import beginning, separator

__all__ = ["TextEncoder"]

MOST_KNOWN = 2**16
"""Pieces of text whose ids are kept, about 250 bytes each."""
LONGEST_KNOWN = 32
"""Characters of such a piece."""
WHITE_SPACE = re.compile(r"\s")


class TextEncoder:
    """
    Gives each text the ids that the tokenizer gives it: the bytes of an array of ``dtype``.

    A tokenizer that cuts a text into words, as GPT-2's does, gives a word the same ids wherever it stands. Where all words are
    separated by single spaces, the ids of a text are therefore those of its words, each with the space before it.
    """

    def __init__(self, tokenizer: Tokenizer, end_token: int) -> None:
        highest = max(end_token, *tokenizer.get_vocab(with_added_tokens=True).values(), 0)
        self.dtype = np.dtype("<u2" if highest < 2**16 else "<u4")
        self.beginning = beginning(tokenizer)
        """The ids that the tokenizer puts before a text; `encode` does not."""
        self.separator = separator(tokenizer)
        """What is put before a text that continues another."""
        self._tokenizer = tokenizer
        self._knows_words = _cuts_into_words(tokenizer)
        self._known: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """
        Raises:
            ModelError: the tokenizer fails on a text.
        """
        pieces = [self._pieces(text) for text in texts] if self._knows_words else [[text] for text in texts]
        new = list(set(chain.from_iterable(pieces)) - self._known.keys())
        for piece, ids in zip(new, encode(self._tokenizer, new), strict=True):
            self._known[piece] = np.array(ids, self.dtype).tobytes()
        known = self._known.__getitem__
        encoded = [b"".join(map(known, some)) for some in pieces]
        self._forget(new)
        return encoded

    @staticmethod
    def _pieces(text: str) -> list[str]:
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


def _cuts_into_words(tokenizer: Tokenizer) -> bool:
    """
    Whether every space between two words is where the tokenizer cuts, so that nothing on one side decides on the other's ids:
    GPT-2's own way to cut, nothing that changes the text before, and no added token that reaches over a space.
    """
    whole = json.loads(tokenizer.to_str())
    cutter = whole["pre_tokenizer"] or {}
    return (
        whole["model"]["type"] == "BPE"
        and cutter.get("type") == "ByteLevel"
        and cutter.get("use_regex", True)
        and not cutter.get("add_prefix_space", True)
        and not any(whole[part] for part in ("normalizer", "truncation", "padding"))
        and not any(
            token["lstrip"] or token["rstrip"] or token["single_word"] or WHITE_SPACE.search(token["content"])
            for token in whole["added_tokens"]
        )
    )
