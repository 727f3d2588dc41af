"""The ids of a model folder are those of AutoTokenizer, or the folder is refused; and folders with the same ids agree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import make_tokenizer
from family_tokenizers import TOKENIZERS, make_family_tokenizer
from spoiling import swap_two_ids
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import AutoTokenizer

from split_model import PretrainedModel
from storage import ModelError, encode, load_tokenizer
from storage.tokenizer import beginning, separator, special_tokens, tokenizer_digest, write_tokenizer

TEXTS = [
    "<|user|>a pub near the river<|bot|>",
    " <|user|> a  pub\n\n",
    "<|endoftext|>The café costs £20<|endoftext|>",
    "x<|bot|><|pad|>y",
    "it's 3pm, don't\tgo  ",
    "",
]
SETTINGS = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
USER, BOT = {"content": "<|user|>", "special": True}, {"content": "<|bot|>", "special": True}
OPTIONS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE of 600 tokens."""
    return dict(json.loads(make_tokenizer().to_str()))


@pytest.fixture
def write(tmp_path: Path, whole: dict[str, Any]) -> Write:
    """A folder with the tokenizer as one file, or as two, and with other files by their names, "__" for the dot."""

    def write(form: str = "whole", *, name: str = "model", changes: dict[str, Any] | None = None, **files: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        if form == "whole":
            (folder / "tokenizer.json").write_text(json.dumps({**whole, **(changes or {})}))
        else:
            merges = ["#version: 0.2", *(" ".join(merge) for merge in whole["model"]["merges"])]
            (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
            (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
        for file, content in files.items():
            (folder / file.replace("__", ".")).write_text(json.dumps(content))
        return folder

    return write


FOLDERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "settings": {"tokenizer_config__json": SETTINGS},
    "added_tokens.json": {
        "added_tokens__json": {"<|user|>": 600, "<|bot|>": 601},
        "special_tokens_map__json": {"additional_special_tokens": ["<|user|>", "<|bot|>"]},
    },
    "added_tokens.json that are not special": {"added_tokens__json": {"<|bot|>": 601, "<|user|>": 600}},
    "added_tokens_decoder": {
        "tokenizer_config__json": {
            **SETTINGS,
            "added_tokens_decoder": {
                "0": {"content": "<|endoftext|>", "special": True, **OPTIONS},
                "601": {**BOT, **OPTIONS},
                "600": {**USER, **OPTIONS, "lstrip": True},
            },
        }
    },
    "additional_special_tokens": {
        "tokenizer_config__json": {**SETTINGS, "additional_special_tokens": ["<|user|>", "<|bot|>"]},
    },
    "special token as an object": {"special_tokens_map__json": {"pad_token": {"content": "<|pad|>", **OPTIONS}}},
    "pad_token": {"tokenizer_config__json": {**SETTINGS, "pad_token": "<|pad|>"}},
    "pad_token that is a word": {"tokenizer_config__json": {**SETTINGS, "pad_token": "Ġthe"}},
    "add_prefix_space": {"tokenizer_config__json": {**SETTINGS, "add_prefix_space": True}},
    "add_bos_token": {"tokenizer_config__json": {**SETTINGS, "add_bos_token": True}},
}


@pytest.mark.parametrize("form", ["whole", "two files"])
@pytest.mark.parametrize("case", FOLDERS)
def test_ids_are_those_of_transformers(write: Write, case: str, form: str) -> None:
    folder = write(form, **FOLDERS[case])
    expected = AutoTokenizer.from_pretrained(folder)(TEXTS, add_special_tokens=False)["input_ids"]
    assert encode(load_tokenizer(folder), TEXTS) == expected


MARKED = [
    *TEXTS,
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<s> [INST] Hi [/INST] a pub</s> more</s>\n<|user|>\nHi<|end|>\n<|assistant|>",
    "cafe\u0301 \u4f60\u597d \U0001f600 1234567 and 12 34",
    "\n\n  \r\n\ttabs   end   ",
]


OLDER = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 22), reason="before 5.22 transformers builds it as Llama 2's"
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=OLDER) if name == "Llama 3 that names Llama 2's" else name for name in TOKENIZERS]
)
def test_ids_of_every_family_are_those_of_transformers_with_what_begins_a_text(tmp_path: Path, name: str) -> None:
    folder = make_family_tokenizer(tmp_path / "model", name)
    ours, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert encode(ours, MARKED) == reference(MARKED, add_special_tokens=False)["input_ids"]
    begins = beginning(ours)
    assert [[*begins, *ids] for ids in encode(ours, MARKED)] == reference(MARKED)["input_ids"]
    assert bool(begins) == (TOKENIZERS[name][2] != "qwen")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_device_without_the_model_has_the_same_tokenizer_as_one_with_it(tmp_path: Path, name: str) -> None:
    folder, part = make_family_tokenizer(tmp_path / "model", name, chat_template="{{ bos_token }}"), tmp_path / "part"
    part.mkdir()
    write_tokenizer(folder, part)
    assert {path.name for path in part.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    one, other = load_tokenizer(folder), load_tokenizer(part)
    assert encode(one, MARKED) == encode(other, MARKED)
    assert tokenizer_digest(one) == tokenizer_digest(other)
    assert special_tokens(part) == special_tokens(folder)
    assert special_tokens(folder)["eos_token"] == AutoTokenizer.from_pretrained(folder).eos_token


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3 that names none"])
def test_two_files_of_another_class_than_gpt2s_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    folder = make_family_tokenizer(tmp_path / "model", name, extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]) + "\n", encoding="utf-8")
    expected = AutoTokenizer.from_pretrained(folder)(MARKED, add_special_tokens=False)["input_ids"]
    assert encode(load_tokenizer(folder), MARKED) == expected


def test_digits_stay_apart_where_transformers_forgets_that_they_do(tmp_path: Path) -> None:
    folder = make_family_tokenizer(tmp_path / "model", "SmolLM2")
    ours, as_it_stands = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "  12   345\n\n 6 x7"
    assert encode(ours, [text])[0] == as_it_stands.encode(text, add_special_tokens=False).ids
    assert len(ours.pre_tokenizer.pre_tokenize_str("34")) == 2
    assert len(AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer.pre_tokenize_str("34")) == 1


@pytest.mark.parametrize(
    ("name", "expected"), [("Qwen2", " "), ("SmolLM2", " "), ("Llama 3", " "), ("Llama 2", ""), ("Mistral", "")]
)
def test_space_before_a_continuation_is_there_once(tmp_path: Path, name: str, expected: str) -> None:
    tokenizer = load_tokenizer(make_family_tokenizer(tmp_path / "model", name))
    assert separator(tokenizer) == expected
    (ids,) = encode(tokenizer, [f"{expected}pub"])
    assert tokenizer.id_to_token(ids[0])[0] in "\u0120\u2581"
    assert tokenizer.id_to_token(ids[0])[1:2] not in ("\u0120", "\u2581")


def spoil_bytes(whole: dict[str, Any]) -> None:
    whole["model"]["byte_fallback"] = False


def spoil_space(whole: dict[str, Any]) -> None:
    whole["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(("spoil", "part"), [(spoil_bytes, "model.byte_fallback"), (spoil_space, "normalizer")])
def test_file_that_its_class_would_not_follow_is_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], part: str
) -> None:
    folder = make_family_tokenizer(tmp_path / "model", "Llama 2")
    whole = json.loads((folder / "tokenizer.json").read_text())
    spoil(whole)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ModelError, match=rf"{part} is not that of LlamaTokenizer, the tokenizer's class, which ignores it"):
        load_tokenizer(folder)


def test_folder_with_sentencepiece_alone_is_told_what_makes_a_file_of_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelError, match=r"has no tokenizer: .*save_pretrained\(.*makes a tokenizer.json of tokenizer.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("case", FOLDERS)
def test_both_forms_of_a_tokenizer_have_one_digest(write: Write, case: str) -> None:
    one, two = write("whole", name="one", **FOLDERS[case]), write("two files", name="two", **FOLDERS[case])
    assert tokenizer_digest(load_tokenizer(one)) == tokenizer_digest(load_tokenizer(two))


def test_tokenizer_that_transformers_has_saved_has_the_same_digest(write: Write, tmp_path: Path) -> None:
    folder = write("two files", **FOLDERS["added_tokens.json"])
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer.json").exists()
    assert tokenizer_digest(load_tokenizer(tmp_path / "saved")) == tokenizer_digest(load_tokenizer(folder))


def drop_last_merge(whole: dict[str, Any]) -> None:
    whole["model"]["merges"].pop()


DIFFERENT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ids": swap_two_ids,
    "a merge less": drop_last_merge,
    "other order of merges": lambda whole: whole["model"]["merges"].reverse(),
    "an added token": lambda whole: whole["added_tokens"].append({"id": 600, **USER, **OPTIONS}),
    "a token that takes space": lambda whole: whole["added_tokens"][0].update(lstrip=True),
    "a normalizer": lambda whole: whole.update(normalizer={"type": "Lowercase"}),
    "a prefix": lambda whole: whole["pre_tokenizer"].update(add_prefix_space=True),
    "words that are not split": lambda whole: whole["pre_tokenizer"].update(use_regex=False),
}
SAME: dict[str, Callable[[dict[str, Any]], Any]] = {
    "merges as texts": lambda whole: whole["model"].update(merges=[" ".join(pair) for pair in whole["model"]["merges"]]),
    "offsets": lambda whole: whole["pre_tokenizer"].update(trim_offsets=False),
    "decoder": lambda whole: whole.update(decoder=None, post_processor=None),
    "unused flags": lambda whole: whole["added_tokens"][0].update(special=False, normalized=True),
    "an empty suffix": lambda whole: whole["model"].update(end_of_word_suffix="", continuing_subword_prefix=""),
    "what no byte needs": lambda whole: whole["model"].update(unk_token="<|endoftext|>"),
    "padding": lambda whole: whole.update(
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    ),
}


@pytest.mark.parametrize("case", [*DIFFERENT, *SAME])
def test_digest_says_whether_ids_are_the_same_and_nothing_else(whole: dict[str, Any], case: str) -> None:
    changed = json.loads(json.dumps(whole))
    {**DIFFERENT, **SAME}[case](changed)
    one, other = (tokenizer_digest(Tokenizer.from_str(json.dumps(each))) for each in (whole, changed))
    assert (one == other) == (case in SAME)


def test_fingerprint_tells_another_tokenizer_from_another_model(model: Path, tiny_model: Path) -> None:
    whole = json.loads((model / "tokenizer.json").read_text())
    swap_two_ids(whole)
    (model / "tokenizer.json").write_text(json.dumps(whole))
    one, other = PretrainedModel(tiny_model).fingerprint(), PretrainedModel(model).fingerprint()
    assert one[:16] == other[:16]
    assert one[16:] != other[16:]
    assert len(one) == 32


AS_IT_STANDS = {"tokenizer_config__json": {"tokenizer_class": "PreTrainedTokenizerFast"}}


def test_file_is_taken_as_it_stands_where_its_class_says_so(write: Write, whole: dict[str, Any]) -> None:
    folder = write(changes={"normalizer": {"type": "Lowercase"}}, **AS_IT_STANDS)
    expected = AutoTokenizer.from_pretrained(folder)(TEXTS, add_special_tokens=False)["input_ids"]
    assert encode(load_tokenizer(folder), TEXTS) == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "normalizer": ({"changes": {"normalizer": {"type": "Lowercase"}}}, "normalizer is not that of GPT2Tokenizer"),
    "no pre_tokenizer": ({"changes": {"pre_tokenizer": None}}, "pre_tokenizer is not that of GPT2Tokenizer"),
    "other model": (
        {"changes": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}},
        "model is not that of GPT2Tokenizer",
    ),
    "unknown class": ({"tokenizer_config__json": {"tokenizer_class": "T5Tokenizer"}}, 'tokenizer_class is "T5Tokenizer"; GPT2'),
    "class no text": (
        {"tokenizer_config__json": {"tokenizer_class": ["GPT2Tokenizer"]}},
        'tokenizer_class is ["GPT2Tokenizer"]',
    ),
    "vocabulary of bytes alone": (
        {"tokenizer_config__json": {"tokenizer_class": "Qwen2Tokenizer"}},
        "normalizer is not that of Qwen2Tokenizer",
    ),
    "code": ({"tokenizer_config__json": {"auto_map": {"AutoTokenizer": ["a.B", None]}}}, "auto_map is "),
    "split special tokens": ({"tokenizer_config__json": {"split_special_tokens": True}}, "split_special_tokens is true"),
    "id that is taken": ({"added_tokens__json": {"the": 700}}, 'the added token "the" is declared with id 700, but gets'),
    "gap before an id": ({"added_tokens__json": {"<|user|>": 605}}, "is declared with id 605, but gets 600"),
    "id no number": ({"added_tokens__json": {"<|user|>": "605"}}, '"<|user|>" has the id "605", which is no whole number'),
    "contradiction": (
        {"tokenizer_config__json": {"added_tokens_decoder": {"600": {**USER, **OPTIONS}}}},
        'adds the token "<|endoftext|>" with id 0, for which added_tokens_decoder in tokenizer_config.json has nothing',
    ),
    "prefix contradicts": (
        {"tokenizer_config__json": {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}},
        "add_prefix_space is true, in tokenizer.json it is false",
    ),
    "prefix no boolean": ({"tokenizer_config__json": {"add_prefix_space": "no"}}, 'add_prefix_space is "no"; true or false'),
    "decoder no object": ({"tokenizer_config__json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder is [1]; an object"),
    "decoder without content": (
        {"tokenizer_config__json": {"added_tokens_decoder": {"600": {"special": True}}}},
        'added_tokens_decoder has {"special": true} where a token is expected',
    ),
    "id without end": (
        {"tokenizer_config__json": {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}},
        'added_tokens_decoder has a token of id "9999',
    ),
    "end no token": ({"tokenizer_config__json": {"eos_token": 3}}, "eos_token has 3 where a token is expected"),
    "more tokens no list": ({"tokenizer_config__json": {"additional_special_tokens": 3}}, "additional_special_tokens is 3"),
    "settings no object": ({"tokenizer_config__json": [1]}, "tokenizer_config.json is not a JSON object but [1]"),
    "added tokens no object": ({"added_tokens__json": 7}, "added_tokens.json is not a JSON object but 7"),
    "vocabulary no ids": ({"form": "two files", "vocab__json": {"a": "b"}}, 'vocab.json: "a" has the id "b"'),
    "vocabulary of another": ({"form": "two files", "vocab__json": {"a": 0}}, "the tokenizer cannot be read: "),
    "vocabulary with a hole": (
        {"form": "two files", "vocab__json": {"a": 4294967295}},
        'vocab.json: "a" has the id 4294967295',
    ),
    "tokens with a hole": (
        {"changes": {"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}},
        'tokenizer.json: "a" has the id 4294967295; it can be 0 to 10000000',
    ),
    "merges of three": ({"form": "two files", "merges__txt": "a b c"}, "merges.txt, line 1: two tokens are expected"),
    "class without its file": ({"form": "two files", **AS_IT_STANDS}, "has no tokenizer.json, which tokenizer_class"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folder_of_uncertain_meaning_is_refused(write: Write, case: str) -> None:
    files, reason = REFUSED[case]
    folder = write(**files)
    with pytest.raises(ModelError) as refused:
        load_tokenizer(folder)
    assert reason in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_ids_that_change_by_chance_are_refused(write: Write, whole: dict[str, Any]) -> None:
    folder = write(changes={"model": {**whole["model"], "dropout": 0.1}}, **AS_IT_STANDS)
    with pytest.raises(ModelError, match=r"model\.dropout is 0\.1, which makes ids random"):
        load_tokenizer(folder)


def test_bytes_without_a_token_are_refused_where_they_have_two_meanings(write: Write) -> None:
    model = {"type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1}, "merges": [], "unk_token": "<|endoftext|>"}
    with pytest.raises(ModelError, match=r"model\.unk_token is not that of GPT2Tokenizer"):
        load_tokenizer(write(changes={"model": model}))


def test_tokenizer_that_fails_on_a_text_is_one_sentence() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="nowhere"))
    with pytest.raises(ModelError, match="the tokenizer cannot be used: "):
        encode(tokenizer, ["b"])


def test_file_at_which_the_library_panics_is_refused(write: Write) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "######"}
    with pytest.raises(ModelError, match=r"tokenizer.json: the tokenizer cannot be read: "):
        load_tokenizer(write(changes={"model": model}, **AS_IT_STANDS))


def test_panic_of_the_library_is_one_sentence() -> None:
    class PanicException(BaseException):
        """As pyo3's: no Exception."""

    class Panicking:
        def encode_batch(self, *_: object, **__: object) -> object:
            raise PanicException("index out of bounds\nmore")

    with pytest.raises(ModelError, match=r"the tokenizer cannot be used: index out of bounds$"):
        encode(Panicking(), ["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_is_no_fault_of_the_tokenizer(signal: type[BaseException]) -> None:
    class Interrupted:
        def encode_batch(self, *_: object, **__: object) -> object:
            raise signal

    with pytest.raises(signal):
        encode(Interrupted(), ["a"])  # type: ignore[arg-type]


def test_settings_of_the_last_batch_are_left_out(write: Write) -> None:
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    folder = write(changes=json.loads(tokenizer.to_str()))
    assert encode(load_tokenizer(folder), ["a pub near the river"]) == encode(make_tokenizer(), ["a pub near the river"])


@pytest.mark.parametrize("end", ["Ġthe", "</s>"])
def test_model_that_ends_texts_by_another_token_than_its_tokenizer_is_refused(model: Path, end: str) -> None:
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    with pytest.raises(ModelError) as refused:
        PretrainedModel(model)
    assert 'eos_token_id is 0, which is "<|endoftext|>" in the tokenizer; its own eos_token is ' in str(refused.value)


def test_normalizer_counts_what_it_is_applied_to() -> None:
    digests = set()
    for normalized in (False, True):
        tokenizer = make_tokenizer()
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.add_tokens([AddedToken("<X>", normalized=normalized)])
        digests.add(tokenizer_digest(tokenizer))
    assert len(digests) == 2
