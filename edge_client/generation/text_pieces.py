"""The text of tokens that come one by one. Each is decoded with the few before it, so it costs the same in any text."""

from collections.abc import Callable, Iterable, Iterator

from tokenizers import Tokenizer

__all__ = ["text_pieces"]

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What bytes are decoded to that are no character, or not yet."""
LONGEST = 4
"""Bytes of a character in UTF-8, and so the most tokens that it can take."""


def text_pieces(tokenizer: Tokenizer, tokens: Iterable[int], guarded: Callable[[Callable[[], str]], str]) -> Iterator[str]:
    """
    The text of the tokens, piece by piece. A piece ends with a whole character and is never taken back; some tokens give none.
    Joined, the pieces are the tokenizer's decoding of all tokens where that has no U+FFFD. For a byte that fits no character,
    some decoders make U+FFFD of all bytes around it; characters that came before that byte stay here what they are.

    Args:
        guarded: does some work with the tokenizer; whatever it raises if that fails, this raises.
    """

    def decode(ids: list[int]) -> str:
        return guarded(lambda: tokenizer.decode(ids))

    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    # Tokens that are not given yet, behind some that are: many decoders remove a space before the first of all tokens.
    window: list[int] = []
    num_before, given = 0, ""
    for token in tokens:
        name = tokenizer.id_to_token(token)
        if name is None or token in special:
            continue  # it has no text, and would leave the next token the first of all that have
        window.append(token)
        text = decode(window)
        if not text.startswith(given):  # a byte that fits no character, behind bytes that were some
            window, num_before, given = window[num_before:], 0, ""
            text = decode(window)
        is_whole = not text.endswith(BROKEN) or name.endswith(BROKEN)
        if not is_whole and len(window) - num_before < LONGEST:
            continue
        window = window[num_before:]
        num_before, again = len(window), decode(window)
        unfinished = BROKEN if not is_whole and again.endswith(BROKEN) else ""  # the next token may still finish it
        yield text.removesuffix(unfinished)[len(given) :]
        given = again.removesuffix(unfinished)
    if rest := decode(window).removeprefix(given):
        yield rest
