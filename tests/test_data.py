"""From files to batches: what is read, how it is encoded, in which order it comes, and what is said of a bad file."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared_path
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import edge_client  # its EdgeClient needs torch, and most of these tests do not
from edge_client.data import DataError, Dataset, Sample, pack
from edge_client.given_texts import TextFiles
from edge_client.text_file import Text, read_texts
from edge_client.token_file import Samples
from storage import ModelError, load_tokenizer

END = 256

WriteFile = Callable[[str, "str | bytes"], Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Bytes, and an end: every length in these tests can be counted."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**alphabet, "<|endoftext|>": END}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def texts(path: Path) -> list[tuple[str | None, str]]:
    return [(text.prompt, text.completion) for text in read_texts(path) if isinstance(text, Text)]


# Formats


def test_jsonl_of_pairs_is_read(write: WriteFile) -> None:
    path = write("a.jsonl", '{"prompt": "p", "completion": "c"}\n{"completion": "d", "prompt": "q", "other": 1}\n')
    assert texts(path) == [("p", "c"), ("q", "d")]


def test_jsonl_of_texts_is_read(write: WriteFile) -> None:
    assert texts(write("a.jsonl", '{"text": "one"}\n\n{"text": "two"}')) == [(None, "one"), (None, "two")]


def test_jsonl_may_mix_pairs_and_texts(write: WriteFile) -> None:
    assert texts(write("a.jsonl", '{"text": "one"}\n{"prompt": "p", "completion": "c"}\n')) == [(None, "one"), ("p", "c")]


def test_jsonl_keeps_a_line_separator_inside_a_string(write: WriteFile) -> None:
    path = write("a.jsonl", '{"text": "one\u2028line\x85still"}\n{"text": "two"}\n')
    assert texts(path) == [(None, "one\u2028line\x85still"), (None, "two")]


def test_jsonl_from_windows_is_read(write: WriteFile) -> None:
    path = write("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert texts(path) == [(None, "one"), (None, "two")]


@pytest.mark.parametrize(("name", "content"), [("a.csv", "text\none\n"), ("a.txt", "one\n")])
def test_byte_order_mark_is_no_text(write: WriteFile, name: str, content: str) -> None:
    assert texts(write(name, b"\xef\xbb\xbf" + content.encode())) == [(None, "one")]


def test_csv_of_pairs_is_read_whatever_the_order_of_its_columns(write: WriteFile) -> None:
    assert texts(write("a.csv", "id,completion,prompt\n1,c,p\n2,d,q\n")) == [("p", "c"), ("q", "d")]


def test_csv_of_texts_is_read(write: WriteFile) -> None:
    assert texts(write("a.csv", "text\none\ntwo\n")) == [(None, "one"), (None, "two")]


def test_csv_keeps_newlines_commas_and_quotes_in_quotes(write: WriteFile) -> None:
    path = write("a.csv", 'prompt,completion\r\n"one\r\nline, two","say ""so"""\r\nq,d\r\n')
    assert texts(path) == [("one\r\nline, two", 'say "so"'), ("q", "d")]


def test_txt_is_one_text_a_line(write: WriteFile) -> None:
    assert texts(write("a.txt", "one\n\n  \ntwo, three\r\nfour")) == [(None, "one"), (None, "two, three"), (None, "four")]


def test_txt_of_pairs_is_cut_at_the_first_bars(write: WriteFile) -> None:
    assert texts(write("a.txt", "p||c\nq || d||e\n")) == [("p", "c"), ("q", "d||e")]


def test_endings_and_names_may_be_in_capitals(write: WriteFile) -> None:
    assert texts(write("a.CSV", "Prompt, COMPLETION \np,c\n")) == [("p", "c")]
    assert texts(write("A.JSONL", '{"Text": "one"}')) == [(None, "one")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt,completion,text\np,c,\n,,one\n , ,\n"),
        (
            "a.jsonl",
            '{"prompt": "p", "completion": "c", "text": ""}\n{"prompt": "", "completion": " ", "text": "one"}\n'
            '{"prompt": "", "completion": ""}\n',
        ),
    ],
)
def test_table_with_all_fields_says_one_thing_in_each_row(
    write: WriteFile, tokenizer: Tokenizer, name: str, content: str
) -> None:
    path = write(name, content)
    assert texts(path) == [("p", "c"), (None, "one"), (None, "")]
    assert len(Dataset.load(path, tokenizer, END, 100).samples) == 2


NULL_ROWS: list[dict[str, Any]] = [
    {"prompt": None, "completion": None, "number": 3},
    {"prompt": "p", "completion": "c", "number": 4},
]


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet", "values"])
def test_row_without_any_value_is_an_empty_text(write: WriteFile, tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    path, given = tmp_path / "a.parquet", TextFiles()  # which removes its files with itself
    if kind == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(NULL_ROWS), path)
    elif kind == "values":
        path = given.path(NULL_ROWS, "data")
    else:
        path = write(kind, "".join(json.dumps(row) + "\n" for row in NULL_ROWS))
    assert texts(path) == [(None, ""), ("p", "c")]
    data = Dataset.load(path, tokenizer, END, 100)
    assert (len(data.samples), data.samples.summary.num_entries) == (1, 2)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_field_may_have_any_length(write: WriteFile, name: str) -> None:
    text = "x" * 300_000
    assert texts(write(name, f"text\n{text}\n" if name == "a.csv" else json.dumps({"text": text}))) == [(None, text)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": " \\tp x ", "completion": "\\n c y\\u00a0"}'),
        ("a.csv", 'prompt,completion\n"  p x\t"," c y \n"\n'),
        ("a.txt", " \tp x || c y  \n"),
    ],
)
def test_white_space_at_both_ends_is_stripped(write: WriteFile, name: str, content: str) -> None:
    assert texts(write(name, content)) == [("p x", "c y")]


# Encoding


def encode(write: WriteFile, tokenizer: Tokenizer, entry: dict[str, str], end: int, max_length: int = 1000) -> Sample:
    (sample,) = Dataset.load(write("one.jsonl", json.dumps(entry)), tokenizer, end, max_length).samples
    return sample


PAIRS = [
    ("name[The Mill], food[English]", "The Mill serves English food."),
    ("", "x"),
    ("Köln \U0001f600", "naïve  two"),
]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_pair_is_prompt_end_space_completion_end(write: WriteFile, tokenizer: Tokenizer, prompt: str, completion: str) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    sample = encode(write, tokenizer, {"prompt": prompt, "completion": completion}, END)
    assert sample.tokens.tolist() == [*ids(prompt), END, *ids(" " + completion), END]
    assert sample.tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("name", "content", "expected", "num_learnt"),
    [
        ("a.jsonl", '{"text": "ab<|endoftext|> "}', "ab#", 2),
        ("a.jsonl", '{"text": "a<|endoftext|>b"}', "a#b#", 3),
        ("a.jsonl", '{"prompt": "p<|endoftext|>", "completion": "c<|endoftext|>"}', "p# c#", 3),
        ("a.jsonl", '{"instruction": "p", "output": "c<|endoftext|>"}', "p# c#", 3),
        ("a.csv", "prompt,completion\np,c<|endoftext|>\n", "p# c#", 3),
        ("a.txt", "p||c<|endoftext|>", "p# c#", 3),
        ("a.txt", "ab<|endoftext|>", "ab#", 2),
    ],
)
def test_end_is_added_only_where_there_is_none(
    write: WriteFile, tokenizer: Tokenizer, name: str, content: str, expected: str, num_learnt: int
) -> None:
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.decoder = decoders.ByteLevel()
    (sample,) = Dataset.load(write(name, content), tokenizer, END, 100).samples
    assert tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=False).replace("<|endoftext|>", "#") == expected
    assert sample.num_labels == num_learnt


def test_text_of_an_end_alone_is_empty(write: WriteFile, tokenizer: Tokenizer) -> None:
    """Without anything before it, it could not be predicted."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["<|endoftext|>"])
    (sample,) = Dataset.load(write("a.txt", "<|endoftext|>\nab\n"), tokenizer, END, 100).samples
    assert len(sample.tokens) == 3


@cache
def tokenizers_of(folder: Path) -> tuple[Tokenizer, Any]:
    """Ours, and that of transformers."""
    from transformers import AutoTokenizer

    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("folder", ["tokenizers/gpt2", "models/gpt2-mini"])
@pytest.mark.parametrize(("prompt", "completion"), [*PAIRS, ("a <|endoftext|> inside", "1234567 don't")])
@pytest.mark.shared
def test_encoding_is_that_of_transformers(write: WriteFile, folder: str, prompt: str, completion: str) -> None:
    ours, reference = tokenizers_of(shared_path(folder))
    end = reference.eos_token_id
    expected = [*reference(prompt)["input_ids"], end, *reference(" " + completion)["input_ids"], end]
    sample = encode(write, ours, {"prompt": prompt, "completion": completion}, end)
    assert sample.tokens.tolist() == expected


def test_labels_of_a_pair_are_its_completion_and_end(write: WriteFile, tokenizer: Tokenizer) -> None:
    sample = encode(write, tokenizer, {"prompt": "prompt", "completion": "abc"}, END)
    batch = pack([sample])
    assert batch.labels.tolist() == [*tokenizer.encode(" abc").ids, END]
    assert batch.tokens.tolist() == [*tokenizer.encode("prompt").ids, END, *tokenizer.encode(" abc").ids]
    assert (batch.lengths.tolist(), batch.label_counts.tolist()) == ([11], [5])


def test_labels_of_a_text_alone_are_all_of_it(write: WriteFile, tokenizer: Tokenizer) -> None:
    batch = pack([encode(write, tokenizer, {"text": "abcd"}, END)])
    assert batch.tokens.tolist() == tokenizer.encode("abcd").ids
    assert batch.labels.tolist() == [*tokenizer.encode("bcd").ids, END]  # nothing stands before the first token
    assert (batch.lengths.tolist(), batch.label_counts.tolist()) == ([4], [4])


def test_empty_text_is_left_out(write: WriteFile, tokenizer: Tokenizer) -> None:
    path = write("a.jsonl", '{"text": "  "}\n{"text": "ab"}\n')
    assert len(Dataset.load(path, tokenizer, END, 100).samples) == 1


def test_tokenizer_file_with_padding_and_truncation_does_neither(
    write: WriteFile, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    spoilt = Tokenizer.from_str(tokenizer.to_str())
    spoilt.enable_padding(pad_id=0, length=50)
    spoilt.enable_truncation(3)
    spoilt.save(str(tmp_path / "tokenizer.json"))
    sample = encode(write, load_tokenizer(tmp_path), {"text": "abcdef"}, END)
    assert sample.tokens.tolist() == [*tokenizer.encode("abcdef").ids, END]


# Cutting


def test_longer_samples_are_cut_and_counted(write: WriteFile, tokenizer: Tokenizer) -> None:
    path = write("a.jsonl", "".join(json.dumps({"prompt": "p" * n, "completion": "c" * 4}) + "\n" for n in (1, 3, 5, 9)))
    data = Dataset.load(path, tokenizer, END, 10)
    assert [len(sample.tokens) for sample in data.samples] == [8, 10, 10, 10]  # 7 + n without the cut
    assert [sample.num_labels for sample in data.samples] == [6, 6, 4, 0]
    assert data.num_cut == 2
    assert data.num_unlabelled == 1
    assert data.longest == 9


def test_cut_sample_keeps_the_first_tokens(write: WriteFile, tokenizer: Tokenizer) -> None:
    whole = encode(write, tokenizer, {"prompt": "prompt", "completion": "completion"}, END)
    cut = encode(write, tokenizer, {"prompt": "prompt", "completion": "completion"}, END, max_length=11)
    assert cut.tokens.tolist() == whole.tokens[:11].tolist()
    assert pack([cut]).labels.tolist() == whole.tokens[7:11].tolist()


# Batches


def numbered(count: int) -> Dataset:
    """Samples that differ in length, labels and content."""
    samples = [Sample(np.arange(i, i + 3 + i % 4, dtype=np.int32), 1 + i % 3) for i in range(count)]
    return Dataset(Samples.of(samples))


@given(st.lists(st.tuples(st.integers(2, 9), st.integers(0, 9)), min_size=1, max_size=6))
def test_packed_batch_is_its_samples_one_under_the_other(shapes: list[tuple[int, int]]) -> None:
    samples = [Sample(np.arange(100 * i, 100 * i + n, dtype=np.int32), min(m, n - 1)) for i, (n, m) in enumerate(shapes)]
    batch = pack(samples)
    assert {array.dtype.name for array in vars(batch).values()} == {"int32"}
    assert (batch.lengths.sum(), batch.label_counts.sum()) == (len(batch.tokens), len(batch.labels))
    row = label = 0
    for sample, length, count in zip(samples, batch.lengths, batch.label_counts, strict=True):
        assert batch.tokens[row : row + length].tolist() == sample.tokens[:-1].tolist()
        # The label of a row is the token after it, and the labelled rows are the last ones.
        assert batch.labels[label : label + count].tolist() == (batch.tokens[row + length - count : row + length] + 1).tolist()
        row, label = row + length, label + count


def rows_of(data: Dataset, step: int, batch_size: int, seed: tuple[int | str, ...] | None) -> list[int]:
    """Which rows of the file are in the batch: the samples of `numbered` begin with their number."""
    batch = data.batch(step, batch_size, seed)
    starts = np.cumsum(batch.lengths) - batch.lengths
    return [int(token) for token in batch.tokens[starts]]


@settings(max_examples=40)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 45),
    epoch=st.integers(0, 5),
    seed=st.one_of(st.none(), st.tuples(st.integers(0, 2**31), st.text(max_size=5))),
)
def test_every_sample_comes_exactly_once_an_epoch(
    count: int, batch_size: int, epoch: int, seed: tuple[int | str, ...] | None
) -> None:
    data = numbered(count)
    num_batches = data.num_batches(batch_size)
    batches = [rows_of(data, epoch * num_batches + i + 1, batch_size, seed) for i in range(num_batches)]
    assert sorted(row for batch in batches for row in batch) == list(range(count))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (num_batches - 1)
    assert len(batches[-1]) == count - (num_batches - 1) * batch_size


def test_file_order_gives_batch_i_the_rows_from_i_times_b() -> None:
    data = numbered(10)
    assert [rows_of(data, step, 4, None) for step in (1, 2, 3, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]


def test_order_is_a_function_of_seed_name_and_epoch() -> None:
    def order(seed: int, name: str, epoch: int) -> list[int]:
        return rows_of(numbered(30), epoch + 1, 30, (seed, name, "order"))

    assert order(0, "a", 0) == order(0, "a", 0)
    assert order(0, "a", 0) != list(range(30))
    assert len({tuple(order(*key)) for key in [(0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0)]}) == 4


def test_batch_does_not_depend_on_the_batches_before_it() -> None:
    data, fresh = numbered(9), numbered(9)
    walked = [rows_of(data, step, 2, (7, "a")) for step in range(1, 12)]
    assert rows_of(fresh, 11, 2, (7, "a")) == walked[-1]


# What is said of files that cannot be used


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', 2, "broken JSON"),
        ("a.jsonl", "[" * 100_000, 1, "broken JSON"),
        ("a.jsonl", '{"text": "a"}\n\n["text"]\n', 3, '"prompt" and "completion", or "text"'),
        ("a.jsonl", '{"prompt": "a"}\n', 1, 'of messages; "prompt" is a string, there is no "completion"'),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": 3}\n',
            1,
            'both strings, or both lists of messages; "prompt" is a string, "completion" is 3',
        ),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', 2, "half a character"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": "\xff"}\n', 3, "not UTF-8 (byte 0xff)"),
        ("a.csv", "name,food\nx,y\n", 1, 'or "instruction" and "output", or "messages"; found "name", "food"'),
        ("a.csv", "prompt;completion\np;c\n", 1, 'found "prompt;completion"'),
        ("a.csv", "text\none\ntwo, three\n", 3, "2 fields for 1 columns; a field with a comma in it is written in quotes"),
        ("a.csv", "text,text\none,two\n", 1, 'two columns have the name "text"'),
        ("a.csv", "Text,text\none,two\n", 1, '"text" is there twice'),
        ("a.csv", "prompt,completion,text\np,c,t\n", 2, 'both a "prompt" with its "completion" and a "text"'),
        (
            "a.jsonl",
            '{"prompt": "p", "completion": "c", "text": "t"}\n',
            1,
            'both a "prompt" with its "completion" and a "text"',
        ),
        (
            "a.jsonl",
            '{"input": "p", "output": "c"}\n',
            1,
            '"instruction" and "output", both strings; there is no "instruction", "output" is a string',
        ),
        ("a.jsonl", "{}\n", 1, '"messages"; found nothing'),
        ("a.jsonl", "5\n", 1, "as members of an object; found 5"),
        (
            "a.jsonl",
            '{"messages": "[]"}\n',
            1,
            '"messages", a list of messages, as .jsonl and .parquet can hold; "messages" is a string',
        ),
        (
            "a.csv",
            "messages\n[]\n",
            1,
            '"messages", a list of messages, as .jsonl and .parquet can hold; "messages" is a string',
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n{"prompt": "p", "completion": ""}\n',
            2,
            '"completion" is empty: there is nothing to learn;',
        ),
        (
            "a.jsonl",
            '{"prompt": "p", "completion": " \\n"}\n',
            1,
            '"completion" is empty: there is nothing to learn; leave the',
        ),
        ("a.csv", "prompt,completion\np,c\nq,\n", 3, '"completion" is empty: there is nothing to learn; leave the entry out'),
        ("a.txt", "p||c\nq|| \n", 2, 'what stands behind "||" is empty: there is nothing to learn; leave the entry out'),
        ("a.txt", "p||c\n\nq||d\nan ordinary line\n", 4, "'||' is in 2 of 3 lines, and this one has not: each line is"),
        ("a.txt", "one\ntwo\na || b\n", 3, "'||' is in 1 of 3 lines, and this one has it: each line is prompt||completion"),
        ("a.txt", "one\ntwo".encode("utf-16-le"), 1, "a NUL character, as files in UTF-16 have; convert the file to UTF-8"),
        ("a.csv", "text\none\nt\0wo\n", 3, "a NUL character"),
        ("a.csv", "prompt,completion\np,c\nq\n", 3, '"prompt" is a string, "completion" is null'),
        ("a.csv", 'text\n"a"b\n', 2, "broken CSV"),
        ("a.csv", 'text\na\n"never closed\n', 3, "broken CSV"),
        ("a.txt", "a\nb".encode("utf-16"), 1, "not UTF-8 (byte 0xff)"),
        ("a.txt", "one\ncaf\u00e9\n".encode("latin-1"), 2, "not UTF-8 (byte 0xe9)"),
    ],
)
def test_error_names_file_line_and_reason(write: WriteFile, name: str, content: str | bytes, line: int, reason: str) -> None:
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        texts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.csv", ""), ("a.csv", "text\n"), ("a.txt", b"\xef\xbb\xbf\n")],
)
def test_empty_file_is_named(write: WriteFile, name: str, content: str | bytes) -> None:
    path = write(name, content)
    with pytest.raises(DataError, match="is empty") as caught:
        texts(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    with pytest.raises(DataError, match="No such file") as caught:
        texts(path)
    assert str(path) in str(caught.value)


def test_folder_is_no_data_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        texts(folder)


@pytest.mark.parametrize("name", ["a.json", "a", "a.xlsx"])
def test_other_extension_is_refused_with_the_known_ones(write: WriteFile, name: str) -> None:
    with pytest.raises(DataError, match=r"data files end in \.jsonl, \.csv, \.txt, \.parquet"):
        texts(write(name, "x"))


def test_file_without_a_labelled_token_is_refused(write: WriteFile, tokenizer: Tokenizer) -> None:
    path = write("a.jsonl", json.dumps({"prompt": "p" * 50, "completion": "c"}))
    with pytest.raises(DataError, match="no token to predict is left within 20 tokens; raise --max-length") as caught:
        Dataset.load(path, tokenizer, END, 20)
    assert str(path) in str(caught.value)


def test_file_of_empty_texts_is_refused(write: WriteFile, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="there is no text in it, only 2 empty entries"):
        Dataset.load(write("a.jsonl", '{"text": " "}\n{"prompt": "", "completion": ""}\n'), tokenizer, END, 20)


@pytest.mark.parametrize("max_length", [1, 0, -3])
def test_max_length_below_two_is_refused(write: WriteFile, tokenizer: Tokenizer, max_length: int) -> None:
    with pytest.raises(DataError, match=f"max-length must be at least 2 tokens, got {max_length}"):
        Dataset.load(write("a.txt", "text"), tokenizer, END, max_length)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one_is_refused(write: WriteFile, tiny_model: Path, batch_size: int) -> None:
    with pytest.raises(DataError, match=f"batch-size must be at least 1, got {batch_size}"):
        edge_client.EdgeClient("ws://127.0.0.1:1", model=str(tiny_model), data=write("a.txt", "text"), batch_size=batch_size)


def test_tokenizer_beyond_the_models_vocabulary_is_refused(write: WriteFile, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"the tokenizer gives token 600 \('<|more|>'\), the model's vocabulary has 600"):
        edge_client.EdgeClient("ws://127.0.0.1:1", model=str(folder), data=write("a.txt", "text<|more|>"))
