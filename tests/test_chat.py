"""Conversations: their text and tokens are those of transformers, and what is learnt is what the assistant says."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import run_in_thread
from family_models import make_talking_model
from family_tokenizers import CHATML, MARKERS, SYSTEM, TALK, make_family_tokenizer
from transformers import AutoTokenizer

import storage.chat_template
from edge_client.data import DataError, Dataset, Form
from edge_client.token_file import windows
from storage import ChatTemplate, ModelError, TemplateFailed, encode, load_tokenizer

pytest.importorskip("jinja2")

MARKED = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
THINKING = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
    {{- message.content | trim + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
INSTRUCTIONS = (
    "{% if messages[0]['role'] == 'system' %}{% set given = messages[1:] %}{% else %}{% set given = messages %}{% endif %}"
    "{% for message in given %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "SmolLM2": CHATML,
    "Qwen2": CHATML,
    "Qwen3": THINKING,
    "Llama 2": INSTRUCTIONS,
    "Mistral": INSTRUCTIONS,
    "Phi-3": MARKERS,
}


def folder_of(tmp_path: Path, name: str, template: str | None) -> Path:
    return make_family_tokenizer(tmp_path / "model", name, **({} if template is None else {"chat_template": template}))


def write(tmp_path: Path, *entries: object) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def load(path: Path, folder: Path, *, max_length: int = 1000, long: str = "cut", loss_on: str | None = None) -> Dataset:
    tokenizer, template = load_tokenizer(folder), ChatTemplate.find(folder)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    return Dataset.load(path, tokenizer, end, max_length, form=Form(template=template, loss_on=loss_on), long=long)


def learnt(data: Dataset, folder: Path) -> list[str]:
    """The text of what is learnt of each sample."""
    reference = AutoTokenizer.from_pretrained(folder)
    return [reference.decode(sample.labels) for sample in data.samples]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("begins", [(), (SYSTEM,)], ids=["user", "system"])
def test_tokens_of_a_conversation_are_those_of_transformers(tmp_path: Path, name: str, begins: tuple[Any, ...]) -> None:
    folder = folder_of(tmp_path, name, TEMPLATES[name])
    reference, messages = AutoTokenizer.from_pretrained(folder), [*begins, *TALK]
    data = load(write(tmp_path, {"messages": messages}), folder)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(data.samples) == len(answers)
    for sample, number in zip(data.samples, answers, strict=True):
        whole = reference.apply_chat_template(messages[: number + 1], return_dict=False)
        before = reference.apply_chat_template(messages[:number], add_generation_prompt=True, return_dict=False)
        assert sample.tokens.tolist() == whole
        assert sample.num_labels == len(whole) - len(before)
    (all_of_it,) = load(write(tmp_path, {"messages": messages}), folder, loss_on="all").samples
    assert all_of_it.tokens.tolist() == reference.apply_chat_template(messages, return_dict=False)
    assert all_of_it.num_labels == len(all_of_it.tokens) - 1


def test_what_is_learnt_is_what_a_template_marks(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "Qwen2", MARKED)
    reference = AutoTokenizer.from_pretrained(folder)
    marked = reference.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    data = load(write(tmp_path, {"messages": TALK}), folder)
    assert data.samples[1].tokens.tolist() == marked["input_ids"]
    expected = [token for token, mark in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mark]
    assert [token for sample in data.samples for token in sample.labels.tolist()] == expected


def test_text_is_that_of_transformers_with_a_fixed_day(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "Llama 3", LLAMA3)
    template = ChatTemplate.find(folder)
    assert template is not None
    reference = AutoTokenizer.from_pretrained(folder)
    expected = reference.apply_chat_template(TALK, tokenize=False, date_string="26 Jul 2024", add_generation_prompt=True)
    assert template.render(TALK, opens_answer=True) == expected
    (first, _) = load(write(tmp_path, {"messages": TALK}), folder).samples
    assert first.tokens.tolist()[:2].count(reference.bos_token_id) == 1, "the template has it, and nobody adds it again"


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_is_learnt_to_its_end_and_nothing_else_is(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, name, TEMPLATES[name])
    first, second = learnt(load(write(tmp_path, {"messages": TALK}), folder), folder)
    end = {"Llama 2": "</s>", "Mistral": "</s>", "Phi-3": "<|end|>"}.get(name, "<|im_end|>")
    assert "The Mill, by the river." in first
    assert "Aromi \U0001f600: 12 tables" in second
    for text in (first, second):
        assert text.rstrip().endswith(end)
        assert "river?" not in text
        assert "user" not in text


def test_only_the_last_answer_is_the_completion(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "Qwen2", CHATML)
    path = write(tmp_path, {"messages": TALK})
    assert learnt(load(path, folder, loss_on="completion"), folder) == learnt(load(path, folder), folder)[1:]
    assert learnt(load(path, folder, loss_on="assistant"), folder) == learnt(load(path, folder), folder)


def test_pair_of_lists_is_the_conversation_of_which_the_completion_is_learnt(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "Qwen2", CHATML)
    pair = load(write(tmp_path, {"prompt": TALK[:3], "completion": TALK[3:]}), folder)
    whole = load(write(tmp_path, {"messages": TALK}), folder, loss_on="completion")
    assert [sample.tokens.tolist() for sample in pair.samples] == [sample.tokens.tolist() for sample in whole.samples]
    assert [sample.num_labels for sample in pair.samples] == [sample.num_labels for sample in whole.samples]


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": "by the river"}])
def test_instruction_is_a_conversation_where_there_is_a_template_and_else_a_pair(tmp_path: Path, given: dict[str, str]) -> None:
    entry = {"instruction": "Name a pub", **given, "output": "The Mill"}
    asked = "Name a pub\n\nby the river" if given.get("input") else "Name a pub"
    folder = folder_of(tmp_path, "Qwen2", CHATML)
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "The Mill"}]
    (sample,) = load(write(tmp_path, entry), folder).samples
    (expected,) = load(write(tmp_path, {"messages": turns}), folder).samples
    assert (sample.tokens.tolist(), sample.num_labels) == (expected.tokens.tolist(), expected.num_labels)
    folder = folder_of(tmp_path, "Qwen2", None)
    (sample,) = load(write(tmp_path, entry), folder).samples
    (expected,) = load(write(tmp_path, {"prompt": asked, "completion": "The Mill"}), folder).samples
    assert (sample.tokens.tolist(), sample.num_labels) == (expected.tokens.tolist(), expected.num_labels)


@pytest.mark.parametrize("name", ["Llama 3", "Llama 2", "Mistral", "Qwen2", "SmolLM2"])
def test_text_begins_and_ends_as_the_tokenizer_begins_and_ends_it(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, name, None)
    reference = AutoTokenizer.from_pretrained(folder)
    pair, text = load(write(tmp_path, {"prompt": "a pub", "completion": "The Mill"}, {"text": "a caf\u00e9"}), folder).samples
    end, ids = reference.eos_token_id, reference("a caf\u00e9")["input_ids"]
    assert text.tokens.tolist() == [*ids, end]
    assert text.num_labels == len(ids)
    rest = reference("The Mill" if reference.unk_token == "<unk>" else " The Mill", add_special_tokens=False)["input_ids"]
    assert pair.tokens.tolist() == [*reference("a pub")["input_ids"], end, *rest, end]
    assert pair.num_labels == len(rest) + 1


@pytest.mark.parametrize("loss_on", ["completion", "assistant"])
def test_text_alone_has_no_completion(tmp_path: Path, loss_on: str) -> None:
    data = write(tmp_path, {"prompt": "a", "completion": "b"}, {"text": "a"})
    with pytest.raises(DataError, match=f"line 2: --loss-on {loss_on} learns nothing of a text that stands alone"):
        load(data, folder_of(tmp_path, "Qwen2", CHATML), loss_on=loss_on)


def test_loss_on_all_learns_the_prompt_too(tmp_path: Path) -> None:
    (sample,) = load(
        write(tmp_path, {"prompt": "a pub", "completion": "c"}), folder_of(tmp_path, "Qwen2", None), loss_on="all"
    ).samples
    assert sample.num_labels == len(sample.tokens) - 1


def talk(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [TALK[0], *turns]}


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "pubs"}}]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown role": (
        talk({"role": "bot", "content": "x"}),
        'line 1: "messages", message 2: role is "bot"; system, user and assistant',
    ),
    "tool call": (talk(CALL), 'message 2: tool_calls is [{"function": {"name": "pubs"}}]: calls of tools are not learnt'),
    "answer of a tool": (talk(TALK[1], {"role": "tool", "content": "3"}), 'message 3: its role is "tool": answers of tools'),
    "empty answer": (talk({"role": "assistant", "content": " \n"}), "message 2: the assistant's content is empty"),
    "content in parts": (talk({"role": "assistant", "content": [{"type": "text"}]}), 'content is [{"type": "text"}]; a string'),
    "no object": ({"messages": ["hi"]}, 'message 1: expected an object with "role" and "content"; found "hi"'),
    "no message": ({"messages": []}, '"messages" has no message'),
    "weight": (talk({**TALK[1], "weight": 0}), 'message 2: "weight" is not known; a message has role and content'),
    "no answer": ({"messages": TALK[:1]}, "line 1: the assistant says nothing, so there is nothing to learn; --loss-on all"),
    "completion without answer": ({"prompt": TALK[:1], "completion": TALK[:1]}, 'in "completion" the assistant says nothing'),
    "list and string": (
        {"prompt": TALK[:1], "completion": "x"},
        'expected "prompt" and "completion", both strings, or both lists of messages; "prompt" is [{',
    ),
    "empty output": ({"instruction": "a", "output": " "}, 'line 1: "output" is empty'),
    "empty completion": ({"prompt": "a", "completion": " "}, 'line 1: "completion" is empty: there is nothing to learn; leave'),
    "empty answer of a completion": (
        {"prompt": TALK[:1], "completion": [{"role": "assistant", "content": ""}]},
        '"completion", message 1: the assistant\'s content is empty: there is nothing to learn; leave the entry out',
    ),
    "two kinds": ({"text": "a", "messages": TALK}, 'both a "text" and "messages"; leave one of them empty'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_entry_that_cannot_be_learnt_from_is_named(tmp_path: Path, case: str) -> None:
    entry, reason = REFUSED[case]
    with pytest.raises(DataError) as refused:
        load(write(tmp_path, entry), folder_of(tmp_path, "Qwen2", CHATML))
    assert reason in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_model_without_a_template_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r'line 1: .*the model has none: take a model .*chat_template\.jinja .*"completion" as str'
    ):
        load(write(tmp_path, {"messages": TALK}), folder_of(tmp_path, "Qwen2", None))


def test_template_that_refuses_a_conversation_is_quoted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "Mistral", INSTRUCTIONS)
    with pytest.raises(
        DataError, match=r"line 2: the model's chat template does not take this conversation: Conversation roles must"
    ):
        load(write(tmp_path, {"messages": TALK}, {"messages": [TALK[0], *TALK]}), folder)


def test_instruction_that_the_template_refuses_is_named_by_its_line(tmp_path: Path) -> None:
    template = (
        "{{ messages | map(attribute='content') | join }}{{ raise_exception('no pubs') if 'pub' in messages[0].content }}"
    )
    entries = ({"instruction": asked, "output": "Anna"} for asked in ("name a person", "name a pub"))
    with pytest.raises(DataError, match=r"line 2: the model's chat template does not take this conversation: no pubs"):
        load(write(tmp_path, *entries), folder_of(tmp_path, "Qwen2", template))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages.nothing.more }}", "has no attribute"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "is not safely callable|access to"),
        ("{{ strftime_now('%d') }}", "it asks for today's date, by which the same data would be other tokens tomorrow"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endfor %}",
            "more than 64 million",
        ),
        ("{% for i in range(100001) %}{% endfor %}", "Range too big. The sandbox blocks ranges larger than MAX_RANGE"),
        ("{{ messages[0].update(role='x') }}", "is not safely callable|access to"),
        ("{{ 10 ** (10 ** 9) }}", "it computes with numbers of more than 4096 bits"),
        ("{{ 2 ** 3000 * 2 ** 3000 }}", "it computes with numbers of more than 4096 bits"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_template_that_raises_or_reaches_out_fails_in_a_sentence(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(TemplateFailed, match=reason):
        ChatTemplate(template, {}, tmp_path).render(TALK)


LOOPS = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for i in [[[1]]] recursive %}{{ loop(i) if i is iterable }}{% endfor %}",
    "block": "{% block b %}{% if messages %}{{ self.b() }}{{ self.b() }}{% endif %}{% endblock %}",
}


@pytest.mark.parametrize("kind", LOOPS)
def test_template_that_does_not_end_is_ended(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.chat_template, "LONGEST_SECONDS", 0.0)
    with pytest.raises(TemplateFailed, match=r"^it computes for more than 0 seconds$"):
        ChatTemplate(LOOPS[kind], {}, tmp_path).render(TALK)


def test_time_is_that_of_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, and whatever else this machine does."""
    now = iter(range(100))
    monkeypatch.setattr(storage.chat_template.time, "thread_time", lambda: float(next(now)))
    template = ChatTemplate("{% for i in range(9) %}x{% endfor %}", {}, tmp_path)
    assert [template.render(TALK) for _ in range(9)] == ["x" * 9] * 9


@pytest.mark.skipif(sys.platform != "linux", reason="no other system limits the memory of a process")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 12 }}",
        "{{ 'a'.ljust(10 ** 12) }}",
        "{{ '%999999999999d' % 1 }}",
        "{% set at = namespace(x='a') %}{% for i in range(60) %}{% set at.x = at.x ~ at.x %}{% endfor %}",
        "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}",
    ],
)
def test_template_that_fills_the_memory_is_ended(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(storage.chat_template, "MOST_BYTES", 2**26)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(TemplateFailed, match=r"^it needs more than 64 MiB of memory$|too big|too many|width"):
        ChatTemplate(template, {}, tmp_path).render(TALK)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_template_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the chat template cannot be read: "):
        ChatTemplate("{% for %}", {}, tmp_path).render(TALK)


def test_template_that_opens_answers_otherwise_than_it_writes_them_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "Qwen2", CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"))
    with pytest.raises(
        DataError, match=r"line 1, message 2: the chat template opens an answer with .*<think>.* does not write that"
    ):
        load(write(tmp_path, {"messages": TALK}), folder)


FIRST_WORD = "{{ (messages[-1].content.split() | first) if messages[-1].role == 'assistant' }}"


@pytest.mark.parametrize(
    ("template", "loss_on", "reason"),
    [
        (
            "{{ messages[0].content[:1] }}",
            "all",
            "line 1: the chat template makes a text of 1 token of it; a token is learnt from",
        ),
        (FIRST_WORD, None, "line 1, message 2: the chat template makes a text of 1 token"),
        ("{{ '' }}", "all", 'line 1: the chat template writes nothing of what is said there, only ""'),
        ("{{ eos_token }}", "all", 'line 1: the chat template writes nothing of what is said there, only "<|im_end|>"'),
        ("{{ '' }}", None, "line 1, message 2: the chat template writes nothing of what the assistant says there"),
        ("{{ messages[0].content }}", None, "line 1, message 2: the chat template writes nothing of what the assistant says"),
    ],
)
@pytest.mark.parametrize("long", ["cut", "split", "skip"])
def test_conversation_of_which_nothing_can_be_predicted_is_refused(
    tmp_path: Path, template: str, loss_on: str | None, reason: str, long: str
) -> None:
    """Such a sample is a sequence of no rows, which no part of a model computes."""
    with pytest.raises(DataError, match=reason):
        load(write(tmp_path, {"messages": TALK}), folder_of(tmp_path, "Qwen2", template), loss_on=loss_on, long=long)


PARTS = CHATML.replace("+ message['content'] +", "+ message['content'] | join('', attribute='text') +")
"""As templates of models for pictures are, whose messages have content in parts: of a string, they write nothing."""
WRITTEN_OTHERWISE = {
    "trimmed": ("message['content'] | trim", " The  Mill \n", "The  Mill"),
    "thought taken out": ("message['content'].split('</think>')[-1]", "<think>A pub?</think>Aromi", "Aromi"),
    "in capitals": ("message['content'] | upper", "The Mill", "THE MILL"),
    "in words": ("message['content'] | replace('&', 'and')", "Mill & Sons", "Mill and Sons"),
    "a symbol": ("message['content']", " \U0001f600 ", "\U0001f600"),
}


@pytest.mark.parametrize(
    ("loss_on", "reason"),
    [
        (
            None,
            r'line 1, message 2: .* writes nothing of what the assistant says there, only "<\|im_end\|>\\n": .*; take a',
        ),
        ("completion", "line 1, message 4: the chat template writes nothing of what the assistant says there"),
        ("all", "line 1: the chat template writes nothing of what is said there"),
    ],
)
def test_template_that_writes_nothing_of_what_is_said_is_refused(tmp_path: Path, loss_on: str | None, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load(write(tmp_path, {"messages": TALK}), folder_of(tmp_path, "Qwen2", PARTS), loss_on=loss_on)


@pytest.mark.parametrize("case", WRITTEN_OTHERWISE)
def test_answer_may_be_written_otherwise_than_it_is_said(tmp_path: Path, case: str) -> None:
    writes, said, written = WRITTEN_OTHERWISE[case]
    folder = folder_of(tmp_path, "Qwen2", CHATML.replace("message['content']", f"({writes})"))
    turns = [TALK[0], {"role": "assistant", "content": said}]
    (text,) = learnt(load(write(tmp_path, {"messages": turns}), folder), folder)
    assert text.strip().removesuffix("<|im_end|>").strip() == written


@pytest.mark.parametrize("long", ["cut", "split", "skip"])
@pytest.mark.parametrize("most", [2, 3, 5])
def test_every_sample_of_whatever_data_has_a_row(tmp_path: Path, long: str, most: int) -> None:
    """Also texts of which a tokenizer makes nothing, and the last part of one that is split."""
    folder = folder_of(tmp_path, "Qwen2", CHATML)
    whole = json.loads((folder / "tokenizer.json").read_text())
    gone = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "x"}, "content": ""}]}
    (folder / "tokenizer.json").write_text(json.dumps({**whole, "normalizer": gone}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}))
    texts = [{"text": "x"}, {"text": "xx a"}, {"prompt": "x", "completion": "x"}, {"prompt": "", "completion": "x"}]
    more = [{"text": "a" * length} for length in range(1, 9)]
    data = load(write(tmp_path, *texts, *more, {"messages": TALK}), folder, max_length=most, long=long)
    assert all(len(sample.tokens) >= 2 for sample in data.samples)
    assert data.batch(1, len(data.samples), None).lengths.min() >= 1


@pytest.mark.parametrize("form", ["file", "text", "list"])
def test_template_is_found_where_transformers_finds_it(tmp_path: Path, form: str) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": MARKERS}]
    folder = folder_of(tmp_path, "Qwen2", {"file": "not this", "text": MARKERS, "list": named}[form])  # type: ignore[arg-type]
    if form == "file":
        (folder / "chat_template.jinja").write_text(MARKERS)
    template = ChatTemplate.find(folder)
    assert template is not None
    assert template.render(TALK) == AutoTokenizer.from_pretrained(folder).apply_chat_template(TALK, tokenize=False)


def test_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "Qwen2", [{"name": "rag", "template": "x"}])  # type: ignore[arg-type]
    with pytest.raises(
        ModelError, match=r'chat_template is \{"rag": "x"\}; a text, or a list with one called default, is expected'
    ):
        ChatTemplate.find(folder)


def test_device_without_jinja2_is_told_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    folder = folder_of(tmp_path, "Qwen2", CHATML)
    with pytest.raises(ModelError, match=r"needs jinja2, which is not installed: pip install 'splitlora\[chat\]'"):
        load(write(tmp_path, {"messages": TALK}), folder)
    assert len(load(write(tmp_path, {"text": "a pub"}), folder).samples) == 1, "nothing else needs it"


def test_device_without_a_model_learns_conversations_by_the_template_that_it_is_handed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from edge_client import EdgeClient
    from gpu_server import GpuServer

    model = make_talking_model(tmp_path / "model", "Llama 2", MARKERS)
    file = write(tmp_path, *({"messages": [SYSTEM, *TALK]} for _ in range(3)), {"instruction": "a pub", "output": "The Mill"})
    expected, losses, ways = load(file, model, max_length=60, long="split"), {}, {}
    for name, options in {"given": {}, "own": {"model": str(model), "engine": "torch", "dtype": "float32"}}.items():
        settings = {"model": str(model), "cut_layer": 1, "lora_rank": 2, "steps": 3, "dtype": "float32", "port": 0}
        with GpuServer(**settings, run_dir=tmp_path / name) as server:
            served = run_in_thread(lambda server=server: list(server.train()))
            with EdgeClient(
                server.url, name="a", data=file, state_dir=tmp_path / f"of-{name}", max_length=60, long="split", **options
            ) as client:
                assert client.data.num_cut == expected.num_cut > 0
                assert [s.tokens.tolist() for s in client.data.samples] == [s.tokens.tolist() for s in expected.samples]
                ways[name] = client._way_to_compute(part="")
                losses[name] = [step.loss for step in client.train()]
            served.result()
    assert losses["given"] == pytest.approx(losses["own"], rel=1e-5)
    assert ways["given"].other_data(ways["own"]) == [], "a device that comes back with the other has the same data"


@pytest.mark.parametrize(("how", "way"), [("loss_on", "completion"), ("long", "split")])
def test_device_goes_on_with_what_it_has_learnt_so_far(tmp_path: Path, how: str, way: str) -> None:
    """Samples that are made in another way are other data."""
    pytest.importorskip("torch")
    from edge_client import EdgeClient

    model, file = make_talking_model(tmp_path / "model", "Qwen2", CHATML), write(tmp_path, {"messages": TALK})
    one, other = (EdgeClient("ws://127.0.0.1:1", model=str(model), data=file, name="a", **more) for more in ({}, {how: way}))
    assert one._described_data() == f"{one.data.digest} max-length=512 shuffled", "as before there were other ways"
    assert other._described_data() == f"{one._described_data()} {how.replace('_', '-')}={way}"


@pytest.mark.parametrize("name", ["SmolLM2", "Llama 2", "Llama 3", "Mistral", "Qwen3", "Phi-3"])
def test_exported_model_has_the_tokens_that_it_was_trained_with(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    from export import export_onnx

    model = make_talking_model(tmp_path / "model", name, CHATML)
    export_onnx(str(model), tmp_path / "exported", precisions=("fp32",))
    reference, texts = AutoTokenizer.from_pretrained(tmp_path / "exported"), ["a pub  12", "<s>a</s> b", "  \n 3"]
    assert reference(texts, add_special_tokens=False)["input_ids"] == encode(load_tokenizer(model), texts)
    if name == "SmolLM2":
        assert len(reference.backend_tokenizer.pre_tokenizer.pre_tokenize_str("34")) == 2
    template = ChatTemplate.find(tmp_path / "exported")
    assert template is not None
    assert template.render(TALK) == reference.apply_chat_template(TALK, tokenize=False)


# Long samples


def test_split_sample_learns_each_token_once_behind_what_stands_before_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "Qwen2", None)
    path = write(
        tmp_path,
        {"text": "a pub near the river " * 9},
        {"prompt": "name " * 30, "completion": "The Mill " * 12},
        {"text": "a b"},
    )
    whole, parts = load(path, folder), load(path, folder, max_length=16, long="split")
    assert [t for sample in parts.samples for t in sample.labels.tolist()] == [
        t for s in whole.samples for t in s.labels.tolist()
    ]
    assert max(len(sample.tokens) for sample in parts.samples) == 16
    assert (parts.num_cut, parts.num_unlabelled) == (2, 0)
    text = " ".join(map(str, whole.samples[0].tokens.tolist()))
    for sample in parts.samples[:3]:
        assert " ".join(map(str, sample.tokens.tolist())) in text
    assert all(len(sample.tokens) - sample.num_labels >= 4 for sample in parts.samples[1:4])


def test_skipped_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "Qwen2", None)
    path = write(tmp_path, {"text": "a pub near the river " * 9}, {"text": "a b"})
    data = load(path, folder, max_length=16, long="skip")
    assert [sample.tokens.tolist() for sample in data.samples] == [load(path, folder).samples[1].tokens.tolist()]
    assert data.num_cut == 1
    with pytest.raises(
        DataError, match="all samples have more than 2 tokens, and --long skip leaves them out; raise --max-length"
    ):
        load(path, folder, max_length=2, long="skip")


@pytest.mark.parametrize("most", [2, 3, 5, 16])
@pytest.mark.parametrize(("num_tokens", "num_labels"), [(40, 39), (40, 1), (41, 17), (2, 1)])
def test_windows_hold_every_label_once(num_tokens: int, num_labels: int, most: int) -> None:
    found = list(windows(num_tokens, num_labels, most))
    labels = [number for _, end, count in found for number in range(end - count, end)]
    assert labels == list(range(num_tokens - num_labels, num_tokens))
    assert all(end - start <= most and count < end - start for start, end, count in found)


@pytest.mark.parametrize(("more", "reason"), [({"long": "wrap"}, "long must be cut, split or skip, got wrap")])
def test_unknown_way_with_long_samples_is_refused(tmp_path: Path, more: dict[str, str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load(write(tmp_path, {"text": "a"}), folder_of(tmp_path, "Qwen2", None), **more)  # type: ignore[arg-type]


def test_unknown_part_to_learn_is_refused() -> None:
    with pytest.raises(DataError, match="loss-on must be all, completion or assistant, got user"):
        Form(loss_on="user")


# Parquet


def test_rows_of_a_parquet_file_are_the_lines_of_a_jsonl_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = folder_of(tmp_path, "Qwen2", CHATML)
    entries = [{"messages": TALK}, {"text": "a pub"}, {"prompt": "a", "completion": "b"}, {"text": " "}]
    parquet.write_table(
        pyarrow.Table.from_pylist(
            entries,
            schema=pyarrow.schema(
                [
                    (
                        "messages",
                        pyarrow.list_(pyarrow.struct([("role", "string"), ("content", "string"), ("tool_calls", "string")])),
                    ),
                    *((name, "string") for name in ("text", "prompt", "completion")),
                ]
            ),
        ),
        tmp_path / "a.parquet",
        row_group_size=2,
    )
    one, other = load(write(tmp_path, *entries), folder), load(tmp_path / "a.parquet", folder)
    assert [sample.tokens.tolist() for sample in one.samples] == [sample.tokens.tolist() for sample in other.samples]
    assert [sample.num_labels for sample in one.samples] == [sample.num_labels for sample in other.samples]


def test_parquet_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder, path = folder_of(tmp_path, "Qwen2", CHATML), tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: "):
        load(path, folder)
    parquet.write_table(pyarrow.table({"name": ["a"], "food": ["b"]}), path)
    with pytest.raises(DataError, match=r'a\.parquet, columns: expected "prompt" and .*found "name", "food"'):
        load(path, folder)
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", " "]}), path)
    with pytest.raises(DataError, match=r'a\.parquet, row 2: "completion" is empty: there is nothing to learn; leave'):
        load(path, folder)
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", None]}), path)
    with pytest.raises(DataError, match=r'row 2: expected "prompt" and .*; "prompt" is a string, "completion" is null$'):
        load(path, folder)
    parquet.write_table(pyarrow.table({"text": ["a", None], "prompt": [None, "b"]}), path)
    with pytest.raises(
        DataError, match=r'a\.parquet, row 2: expected "prompt" and .*; "prompt" is a string, there is no "completion"$'
    ):
        load(path, folder)


def test_device_without_pyarrow_is_told_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ImportError, match=r"needs pyarrow, which is not installed: pip install 'splitlora\[parquet\]', or save"
    ):
        load(tmp_path / "a.parquet", folder_of(tmp_path, "Qwen2", None))
