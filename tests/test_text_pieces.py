"""The text of tokens that come one by one, held to the tokenizer's own decoding of all of them."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import make_tokenizer
from family_tokenizers import TOKENIZERS, make_family_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from edge_client.generation.text_pieces import LONGEST, text_pieces
from storage import load_tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTES_AS_CHARACTERS = ("GPT-2", "Llama 3", "Qwen2", "SmolLM2")
BYTES_AS_NUMBERS = ("Llama 2", "Llama 2, no prefix", "Metaspace")


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    def unguarded(work: Callable[[], str]) -> str:
        return work()

    return list(text_pieces(tokenizer, tokens, unguarded))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {"GPT-2": make_tokenizer()}
    names = [name for name in (*BYTES_AS_CHARACTERS, *BYTES_AS_NUMBERS) if name in TOKENIZERS]
    made |= {name: load_tokenizer(make_family_tokenizer(folder / name, name)) for name in names}
    made["Metaspace"] = Tokenizer.from_str(made["Llama 2"].to_str())
    made["Metaspace"].decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(SPACE)])
    for name in BYTES_AS_NUMBERS:
        made[name].add_tokens([BROKEN])  # their vocabularies have it, and it is no broken character where it is a token
    return made


def byte_token(tokenizer: Tokenizer, byte: int) -> int:
    if (token := tokenizer.token_to_id(f"<0x{byte:02X}>")) is None:
        # GPT-2's way: a byte is the letter of its number, or one from 256 on where that would not be visible.
        hidden = [number for number in range(256) if not chr(number).isprintable() or chr(number).isspace()]
        token = tokenizer.token_to_id(chr(256 + hidden.index(byte) if byte in hidden else byte))
    assert isinstance(token, int)
    return token


PARTS = st.lists(
    st.one_of(
        st.integers(0, 720),  # any token, and numbers of a model's vocabulary that the tokenizer has no token for
        st.binary(min_size=1, max_size=6),
        st.text(min_size=1, max_size=3).filter(lambda text: text.isprintable()).map(str.encode),
        st.sampled_from(("\u00e9", "\u6771", "\U0001f600", " ", "  a", BROKEN)),
    ),
    max_size=12,
)
"""Tokens, texts as their bytes, one token each, and texts as the tokenizer encodes them."""


def tokens_of(tokenizer: Tokenizer, parts: list[int | bytes | str]) -> list[int]:
    tokens: list[int] = []
    for part in parts:
        if isinstance(part, int):
            tokens.append(part)
        elif isinstance(part, bytes):
            tokens += [byte_token(tokenizer, byte) for byte in part]
        else:
            tokens += tokenizer.encode(part, add_special_tokens=False).ids
    return tokens


def is_within(part: str, whole: str) -> bool:
    """Whether all characters of a text stand in another one, in the same order."""
    rest = iter(whole)
    return all(character in rest for character in part)


@pytest.mark.parametrize("name", BYTES_AS_CHARACTERS)
@given(parts=PARTS)
@settings(max_examples=100)
def test_pieces_of_bytes_as_characters_are_the_text_of_any_tokens(
    tokenizers: dict[str, Tokenizer], name: str, parts: list[int | bytes | str]
) -> None:
    tokens = tokens_of(tokenizers[name], parts)
    assert "".join(pieces(tokenizers[name], tokens)) == tokenizers[name].decode(tokens)


@pytest.mark.parametrize("name", BYTES_AS_NUMBERS)
@given(parts=PARTS)
@settings(max_examples=200)
def test_pieces_of_bytes_as_numbers_are_the_text_of_any_tokens_but_keep_what_was_a_character(
    tokenizers: dict[str, Tokenizer], name: str, parts: list[int | bytes | str]
) -> None:
    tokenizer = tokenizers[name]
    tokens = tokens_of(tokenizer, parts)
    found, whole = "".join(pieces(tokenizer, tokens)), tokenizer.decode(tokens)
    if BROKEN not in whole:
        assert found == whole
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    names = [name for name in map(tokenizer.id_to_token, tokens) if name is not None and name not in special]
    written = [bytes([int(name[3:5], 16)]) if name.startswith("<0x") else name.replace(SPACE, " ").encode() for name in names]
    most = b"".join(written).decode(errors="replace").replace(BROKEN, "")
    assert is_within(whole.replace(BROKEN, ""), found), "nothing is left out"
    assert is_within(found.replace(BROKEN, ""), most), "nothing is repeated"


A, C3, A9 = "a", b"\xc3", b"\xa9"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([A, C3, A9, C3, A], ["a", "\u00e9", f"{BROKEN}a"]),
        ([A, C3, A9, C3], ["a", "\u00e9", BROKEN]),
        ([A, C3, A9, C3, A9], ["a", "\u00e9", "\u00e9"]),
        ([A, b"\xf0\x9f\x98\x80", b"\xff", A], ["a", "\U0001f600", f"{BROKEN}a"]),
        ([A, b"\xff" * 5, A], ["a", BROKEN * 3, f"{BROKEN * 2}a"]),
        ([A, BROKEN, BROKEN, b"\xf0\x9f\x98\x80"], ["a", BROKEN, BROKEN, "\U0001f600"]),
    ],
)
def test_character_that_was_given_is_neither_taken_back_nor_given_again(
    tokenizers: dict[str, Tokenizer], parts: list[bytes | str], expected: list[str]
) -> None:
    tokenizer = tokenizers["Llama 2, no prefix"]
    assert pieces(tokenizer, tokens_of(tokenizer, list(parts))) == expected


def test_tokens_that_all_end_within_a_character_are_given_as_they_come() -> None:
    """A byte-level vocabulary may have tokens of a character's end and the next one's beginning."""
    whole = json.loads(make_tokenizer().to_str())
    letters = [make_tokenizer().id_to_token(byte_token(make_tokenizer(), byte)) for byte in b"\xe6\x9d\xb1"]
    crossing = "".join((*letters[1:], letters[0]))
    whole["model"]["vocab"][crossing] = len(whole["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    begin, cross, *end = [tokenizer.token_to_id(name) for name in (letters[0], crossing, *letters[1:])]
    tokens = [begin, *[cross] * 20, *end, *tokenizer.encode("\u00e9").ids]
    found = pieces(tokenizer, tokens)
    assert "".join(found) == tokenizer.decode(tokens) == "\u6771" * 21 + "\u00e9"
    assert max(map(len, found)) <= LONGEST


@pytest.mark.parametrize("part", ["a b ", b"\xff", b"\xf0\x9f\x98\x80", 0])
@pytest.mark.parametrize("name", ["GPT-2", "Llama 2"])
def test_a_token_costs_the_same_however_long_the_text_is(tokenizers: dict[str, Tokenizer], name: str, part: Any) -> None:
    tokenizer, sizes = tokenizers[name], list[int]()

    class Counting:
        id_to_token, get_added_tokens_decoder = tokenizer.id_to_token, tokenizer.get_added_tokens_decoder

        def decode(self, tokens: list[int]) -> str:
            sizes.append(len(tokens))
            return str(tokenizer.decode(tokens))

    tokens = tokens_of(tokenizer, [part] * 500)
    pieces(Counting(), tokens)
    assert max(sizes) <= 2 * LONGEST
    assert len(sizes) <= 3 * len(tokens) + 1


def test_space_behind_tokens_without_a_text_is_kept(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["Llama 2"]
    word, begin, end = (tokenizer.token_to_id(name) for name in (f"{SPACE}the", "<s>", "</s>"))
    tokens = [begin, word, end, begin, 5000, word, word]
    assert pieces(tokenizer, tokens) == ["the", " the", " the"]
