"""What the samples of a conversation share is encoded once, and their tokens are those of each text encoded by itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_tokenizers import CHATML, MARKERS, TOKENIZERS, make_family_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat import INSTRUCTIONS, LLAMA3, MARKED, THINKING
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

import edge_client.text_encoder
from edge_client.samples import Form, samples
from edge_client.text_encoder import TextEncoder
from edge_client.text_file import Conversation
from storage import ChatTemplate, load_tokenizer
from storage.tokenizer import described

pytest.importorskip("jinja2")

PIECES = (
    *(
        "a",
        " ",
        "  ",
        "\n",
        "\n\n",
        "pub",
        "The Mill",
        "don't",
        "12",
        "\u00e9",
        "e\u0301",
        "\U0001f600",
        "\u3000",
        "\u2581",
        ".",
    ),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|user|>", "<|end|>", "<s>", "</s>", "<unk>", "<", "|>"),
)
WORDS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
TEMPLATES = {
    "chatml": CHATML,
    "markers": MARKERS,
    "instructions": INSTRUCTIONS,
    "llama3": LLAMA3,
    "marked": MARKED,
    "thinking": THINKING,
}
AGAIN = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def by_itself(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def ids(encoder: TextEncoder, texts: Sequence[str]) -> list[list[int]]:
    return [np.frombuffer(found, encoder.dtype).tolist() for found in encoder.encode(texts)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_each_text_by_itself(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(make_family_tokenizer(tmp_path / "model", name))
    encoder = TextEncoder(tokenizer, 0)
    assert encoder._added is not None
    assert encoder._cuts

    @AGAIN
    @given(st.lists(WORDS, max_size=4))
    def check(texts: list[str]) -> None:
        assert ids(encoder, texts) == [by_itself(tokenizer, text) for text in texts]

    check()


ODD: dict[str, list[AddedToken]] = {
    "takes white space before it": [AddedToken("<|end|>", lstrip=True, normalized=False)],
    "takes white space behind it": [AddedToken("<|user|>", rstrip=True, normalized=False), AddedToken("<|end|>", rstrip=True)],
    "is a word of its own": [AddedToken("pub", single_word=True, normalized=False), AddedToken("<|user|>", normalized=False)],
    "is found in what the text becomes": [AddedToken("e\u0301", normalized=True), AddedToken("<|user|>", normalized=True)],
    "begins as another": [AddedToken(content, normalized=False) for content in ("<", "<|", "|>")],
    "is white space": [AddedToken(content, rstrip=content > " ", normalized=False) for content in ("  ", "\n", "<|user|>")],
}


@pytest.mark.parametrize("name", ["Llama 2", "Mistral, Metaspace", "Qwen2", "SmolLM2"])
@pytest.mark.parametrize("odd", ODD)
def test_ids_are_so_also_where_an_added_token(tmp_path: Path, name: str, odd: str) -> None:
    tokenizer = load_tokenizer(make_family_tokenizer(tmp_path / "model", name))
    tokenizer.add_tokens(ODD[odd])
    encoder = TextEncoder(tokenizer, 0)

    @AGAIN
    @given(st.lists(WORDS, max_size=4))
    def check(texts: list[str]) -> None:
        assert ids(encoder, texts) == [by_itself(tokenizer, text) for text in texts]

    check()


@pytest.mark.parametrize("name", ["Llama 3", "Llama 2", "Mistral", "Mistral, Metaspace", "Qwen2", "SmolLM2", "Phi-3"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_samples_of_a_conversation_are_those_of_its_beginnings_each_encoded_by_itself(
    tmp_path: Path, name: str, template: str
) -> None:
    folder = make_family_tokenizer(tmp_path / "model", name, chat_template=TEMPLATES[template])
    tokenizer, form = load_tokenizer(folder), Form(template=ChatTemplate.find(folder))
    encoder, rendered = TextEncoder(tokenizer, 0), form.template
    assert rendered is not None
    rendered.special_tokens.setdefault("bos_token", "")  # which some templates write, and some tokenizers have not

    @AGAIN
    @given(st.lists(st.tuples(WORDS, WORDS.filter(str.strip)), min_size=1, max_size=4))
    def check(turns: list[tuple[str, str]]) -> None:
        roles = ("user", "assistant")
        messages = [{"role": roles[i], "content": turn[i]} for turn in turns for i in (0, 1)]
        expected = []
        for number in range(1, len(messages), 2):
            before = by_itself(tokenizer, rendered.render(messages[:number], opens_answer=True))
            whole = by_itself(tokenizer, rendered.render(messages[: number + 1]))
            num_alike = next(
                (i for i, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other),
                min(len(before), len(whole)),
            )
            expected.append((whole, len(whole) - max(num_alike, 1)))
        found = [
            (np.frombuffer(tokens, encoder.dtype).tolist(), count)
            for tokens, count in samples([Conversation(tuple(messages))], form, encoder, 0)
        ]
        assert found == expected

    check()


def test_conversation_twice_as_long_takes_twice_as_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_family_tokenizer(tmp_path / "model", "Qwen2", chat_template=CHATML)
    tokenizer, form = load_tokenizer(folder), Form(template=ChatTemplate.find(folder))
    given_texts: list[str] = []
    num_renders = 0
    encode, render = edge_client.text_encoder.encode, ChatTemplate.render

    def noting(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        given_texts.extend(texts)
        return encode(tokenizer, texts)

    def counting(*arguments: Any, **options: Any) -> str:
        nonlocal num_renders
        num_renders += 1
        return render(*arguments, **options)

    monkeypatch.setattr(edge_client.text_encoder, "encode", noting)
    monkeypatch.setattr(ChatTemplate, "render", counting)
    for num_answers in (10, 20, 40):
        talk = [
            {"role": role, "content": f"{role} says {number} and much more that is no less important to know"}
            for number in range(num_answers)
            for role in ("user", "assistant")
        ]
        given_texts.clear()
        num_renders = 0
        found = list(samples([Conversation(tuple(talk))], form, TextEncoder(tokenizer, 0), 0))
        assert len(found) == num_answers
        assert num_renders == 2 * num_answers
        assert sum(map(len, given_texts)) <= 1.2 * len(render(form.template, talk))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_is_described_as_in_its_file(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(make_family_tokenizer(tmp_path / "model", name))
    tokenizer.add_tokens([AddedToken("<|x|>", lstrip=True, single_word=True)])
    whole, found = json.loads(tokenizer.to_str()), described(tokenizer)
    del whole["model"]["vocab"], whole["model"]["merges"]
    assert found == {part: whole[part] for part in found}


def test_large_vocabulary_is_not_read_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As such it takes more memory than all that a device has of its model."""
    folders = [make_family_tokenizer(tmp_path / name, name) for name in ("Qwen2", "Llama 2", "Llama 3")]
    read, largest = json.loads, 0

    def noting(text: str | bytes, **options: Any) -> Any:
        nonlocal largest
        largest = max(largest, len(text))
        return read(text, **options)

    monkeypatch.setattr(json, "loads", noting)
    for folder in folders:
        TextEncoder(load_tokenizer(folder), 0)
    assert 0 < largest < 2000 < min((folder / "tokenizer.json").stat().st_size for folder in folders)


def test_pre_tokenizer_of_a_kind_that_has_no_options_is_described(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_family_tokenizer(tmp_path / "model", "Qwen2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert described(tokenizer)["pre_tokenizer"] == {"type": "Whitespace"}
