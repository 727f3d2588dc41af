"""
What a device keeps of its data between two starts: the same batches as if all of it were in memory, made once, found again,
noticed to be out of date, bounded, and never half.
"""

import errno
import io
import json
import logging
import os
import random
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from conftest import make_tokenizer, run_in_thread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

import edge_client.data
import edge_client.text_encoder
import edge_client.text_file
import edge_client.token_file
from edge_client.data import Batches, DataError, Dataset
from edge_client.saved_steps import StateError
from edge_client.text_encoder import TextEncoder
from edge_client.text_file import TextFile
from edge_client.token_file import Samples, TokenFolder
from protocol import derive_seed

END, MAX_LENGTH = 256, 12


class Killed(BaseException):
    """Nothing that is done about exceptions happens to it."""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", 40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


@pytest.fixture
def load(path: Path, tokenizer: Tokenizer, folder: Path) -> Callable[..., Dataset]:
    def load(path: Path = path, **options: Any) -> Dataset:
        return Dataset.load(path, tokenizer, END, MAX_LENGTH, **{"folder": folder, **options})

    return load


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts that are encoded."""
    texts: list[str] = []
    encode = TextEncoder.encode

    def noting(encoder: TextEncoder, some: list[str]) -> list[bytes]:
        texts.extend(some)
        return encode(encoder, some)

    monkeypatch.setattr(TextEncoder, "encode", noting)
    return texts


@pytest.fixture
def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_client.data, "CHARACTERS_AT_ONCE", 1)
    monkeypatch.setattr(edge_client.data, "BYTES_BETWEEN_COMMITS", 200)


@pytest.fixture
def with_old_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file system says of a file is believed as if it had been written long ago."""
    monkeypatch.setattr(edge_client.token_file, "COARSEST_CLOCK_NS", -(10**18))


def write(path: Path, num_rows: int, word: str = "row") -> Path:
    rows = [{"prompt": f"{word} {i}", "completion": f"{'is ' * (i % 9)}{i}"} for i in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def contents(data: Dataset) -> list[tuple[list[int], int]]:
    return [(sample.tokens.tolist(), sample.num_labels) for sample in data.samples]


def token_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


# The same batches as if everything were in memory


def samples_in_memory(rows: list[tuple[str | None, str]], tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """Written a second time: ids and number of labels of each sample."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    samples = []
    for prompt, completion in rows:
        prompt, completion = prompt if prompt is None else prompt.strip(), completion.strip()
        if prompt is None or not (prompt or completion):
            tokens, num_labels = [*ids(completion), END], len(ids(completion))
        else:
            answer = [*ids(f" {completion}"), END]
            tokens, num_labels = [*ids(prompt), END, *answer], len(answer)
        if len(tokens) > 1:
            samples.append((tokens[:MAX_LENGTH], max(0, num_labels - max(0, len(tokens) - MAX_LENGTH))))
    return samples


words = st.text(st.sampled_from("ab  é\u00a0\n'1.\U0001f600"), max_size=25)


def can_be_learnt(row: tuple[str | None, str]) -> bool:
    """Nothing is asked, or it is answered."""
    prompt, completion = row
    return not (prompt or "").strip() or bool(completion.strip())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.none() | words, words).filter(can_be_learnt), min_size=1, max_size=25),
    batch_size=st.integers(1, 9),
    num_parts=st.integers(1, 3),
    shuffle=st.booleans(),
    is_kept=st.booleans(),
)
def test_batches_are_those_of_lists_in_memory_to_the_bit(
    rows: list[tuple[str | None, str]],
    batch_size: int,
    num_parts: int,
    shuffle: bool,
    is_kept: bool,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rows = [*rows, (None, "ab ab")]  # else there may be nothing to predict
    samples = samples_in_memory(rows, tokenizer)
    scratch = tmp_path_factory.mktemp("case")
    entries = [{"text": text} if prompt is None else {"prompt": prompt, "completion": text} for prompt, text in rows]
    (scratch / "a.jsonl").write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edge_client.data, "KEPT_ORDER", 2)
        patch.setattr(edge_client.data, "CHARACTERS_AT_ONCE", 20)
        for _ in range(2):  # made, and found
            folder = scratch / "tokens" if is_kept else None
            data = Dataset.load(scratch / "a.jsonl", tokenizer, END, MAX_LENGTH, folder=folder)
            assert (len(data.samples), data.num_unlabelled) == (len(samples), sum(not count for _, count in samples))
            assert data.longest == max(len(tokens) for tokens, _ in samples) - 1
            assert data.highest_token == max(token for tokens, _ in samples for token in tokens)
            batches = Batches(data=data, name="a", batch_size=batch_size, shuffle=shuffle, seed=3, num_parts=num_parts)
            num_batches = -(-len(samples) // batch_size)
            for step in range(1, 2 * num_batches + 2):
                epoch, index = divmod(step - 1, num_batches)
                order = list(range(len(samples)))
                if shuffle:
                    random.Random(derive_seed(3, "a", "order", epoch)).shuffle(order)
                for part, rows_of_part in enumerate(
                    np.array_split(order[index * batch_size : (index + 1) * batch_size], num_parts)
                ):
                    expected = [samples[int(row)] for row in rows_of_part]
                    batch = batches.micro_batch(step, part)
                    assert {array.dtype for array in vars(batch).values()} == {np.dtype(np.int32)}
                    assert batch.tokens.tolist() == [token for tokens, _ in expected for token in tokens[:-1]]
                    assert batch.lengths.tolist() == [len(tokens) - 1 for tokens, _ in expected]
                    assert batch.label_counts.tolist() == [count for _, count in expected]
                    labels = [token for tokens, count in expected for token in tokens[len(tokens) - count :]]
                    assert batch.labels.tolist() == labels


def test_samples_are_a_sequence(load: Callable[..., Dataset]) -> None:
    samples = load().samples
    listed = [(sample.tokens.tolist(), sample.num_labels) for sample in samples]
    assert len(listed) == len(samples) == 40
    assert [(sample.tokens.tolist(), sample.num_labels) for sample in samples[3:9:2]] == listed[3:9:2]
    assert samples[-1].tokens.tolist() == listed[-1][0]
    for beyond in (40, -41):
        with pytest.raises(IndexError):
            samples[beyond]


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=9), cache_bytes=st.integers(0, 4000), width=st.integers(1, 20))
def test_first_samples_fit_into_a_cache_as_their_sum_says(lengths: list[int], cache_bytes: int, width: int) -> None:
    data = Dataset(Samples.of([edge_client.data.Sample(np.zeros(length, np.int32), 1) for length in lengths]))
    room, expected = cache_bytes // edge_client.data.VERSIONS_OF_A_SAMPLE, 0
    for length in lengths:
        room -= (2 * width + edge_client.data.BYTES_MORE_A_ROW) * (length - 1)
        if room < 0:
            break
        expected += 1
    assert data.num_that_fit(cache_bytes, width=width) == expected


@pytest.mark.parametrize(("vocabulary", "num_bytes"), [(2**16, 2), (2**16 + 1, 4)])
def test_id_has_as_many_bytes_as_the_vocabulary_needs(
    load: Callable[..., Dataset], folder: Path, path: Path, vocabulary: int, num_bytes: int
) -> None:
    tokens = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens |= {f"token {number}": number for number in range(len(tokens), vocabulary)}
    large = Tokenizer(models.BPE(tokens, []))
    large.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    data = Dataset.load(path, large, vocabulary - 1, 1000, folder=folder)
    assert data.highest_token == vocabulary - 1
    assert data.samples[0].tokens.tolist() == [
        *large.encode("row 0").ids,
        vocabulary - 1,
        *large.encode(" 0").ids,
        vocabulary - 1,
    ]
    (file,) = folder.glob("*/tokens")
    assert file.stat().st_size == num_bytes * sum(len(sample.tokens) for sample in data.samples)


# Words that come again


def changed(change: Callable[[Tokenizer], object]) -> Tokenizer:
    tokenizer = make_tokenizer()
    change(tokenizer)
    return tokenizer


def _set(part: str, value: Any) -> Callable[[Tokenizer], object]:
    return lambda tokenizer: setattr(tokenizer, part, value)


def _add(token: AddedToken) -> Callable[[Tokenizer], object]:
    return lambda tokenizer: tokenizer.add_tokens([token])


TOKENIZERS: dict[str, tuple[Callable[[Tokenizer], object], bool]] = {
    "GPT-2's": (lambda tokenizer: None, True),
    "with an added word": (_add(AddedToken("b<", normalized=False)), True),
    "with an added pair of words": (_add(AddedToken("a b", normalized=False)), False),
    "with a token that eats spaces": (_add(AddedToken("b<", lstrip=True, rstrip=True)), False),
    "with a token that stands alone": (_add(AddedToken("ab", single_word=True)), False),
    "with a space before": (_set("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), False),
    "without words": (_set("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)), False),
    "of words and nothing else": (_set("pre_tokenizer", pre_tokenizers.Whitespace()), False),
    "that changes a text": (_set("normalizer", normalizers.Replace("a b", "b")), False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_the_tokenizers_whatever_was_encoded_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, cuts_at_spaces = TOKENIZERS[name]
    tokenizer = changed(change)
    monkeypatch.setattr(edge_client.text_encoder, "MOST_KNOWN", 5)
    encoder, characters = TextEncoder(tokenizer, 0), st.sampled_from("aabb   <é1.'st\n\t\x1c\x85\u00a0\u2028\u3000")
    assert encoder._knows_words == cuts_at_spaces

    @settings(max_examples=150)
    @given(st.lists(st.lists(characters | st.just("<|endoftext|>")).map("".join), max_size=5))
    def check(texts: list[str]) -> None:
        expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        assert [np.frombuffer(ids, encoder.dtype).tolist() for ids in encoder.encode(texts)] == expected
        assert len(encoder._known) <= 5
        assert all(len(piece) <= edge_client.text_encoder.LONGEST_KNOWN for piece in encoder._known)

    check()


# Made once, and found again


def test_second_start_encodes_nothing(load: Callable[..., Dataset], encoded: list[str]) -> None:
    first = contents(load())
    assert encoded
    encoded.clear()
    assert contents(load()) == first
    assert not encoded


def test_copy_of_a_file_is_found_by_its_content(load: Callable[..., Dataset], encoded: list[str], path: Path) -> None:
    first = contents(load())
    encoded.clear()
    copy = path.with_name("copy.jsonl")
    copy.write_bytes(path.read_bytes())
    assert contents(load(copy)) == first
    assert not encoded


def test_file_that_was_not_changed_is_not_even_read(
    load: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch, with_old_files: None
) -> None:
    first = contents(load())
    monkeypatch.setattr(TextFile, "pieces", None)
    monkeypatch.setattr(TextFile, "lines", None)
    assert contents(load()) == first


@pytest.mark.parametrize("is_fresh", [True, False])
def test_edit_that_changes_neither_size_nor_time_is_noticed(
    load: Callable[..., Dataset], path: Path, is_fresh: bool, request: pytest.FixtureRequest
) -> None:
    if not is_fresh:
        request.getfixturevalue("with_old_files")
    load()
    before = path.stat()
    other = path.read_bytes().replace(b"row", b"raw")
    path.write_bytes(other)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    while not is_fresh and path.stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock has ticked
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert contents(load()) == contents(load(folder=None))


def test_file_that_was_just_written_is_not_believed_by_its_time(load: Callable[..., Dataset], folder: Path) -> None:
    load()
    assert not (folder / edge_client.token_file.NOTES).exists()


@pytest.mark.parametrize("note", ["nothing", "[]", '{"PATH": 3}', '{"PATH": [[1], "0"]}', "[" * 100_000])
def test_spoilt_notes_are_as_none(load: Callable[..., Dataset], folder: Path, path: Path, note: str) -> None:
    first = contents(load())
    (folder / edge_client.token_file.NOTES).write_text(note.replace("PATH", str(path)))
    assert contents(load()) == first


def test_other_tokenizer_settings_and_kinds_of_file_are_other_token_files(
    load: Callable[..., Dataset], tokenizer: Tokenizer, path: Path, folder: Path
) -> None:
    text = path.with_suffix(".txt")
    text.write_bytes(path.read_bytes())
    more = changed(lambda tokenizer: tokenizer.add_tokens(["row"]))
    for file, by, end, length in [
        (path, tokenizer, END, MAX_LENGTH),
        (text, tokenizer, END, MAX_LENGTH),
        (path, more, END, MAX_LENGTH),
        (path, tokenizer, END + 1, MAX_LENGTH),
        (path, tokenizer, END, MAX_LENGTH + 1),
    ]:
        kept = Dataset.load(file, by, end, length, folder=folder)
        assert contents(kept) == contents(Dataset.load(file, by, end, length))
    assert len(token_files(folder)) == 5


def test_token_file_that_is_not_whole_is_made_anew(load: Callable[..., Dataset], folder: Path) -> None:
    first = contents(load())
    for name in ("tokens", "starts", "label_counts", "summary.json"):
        (file,) = folder.glob(f"*/{name}")
        os.truncate(file, file.stat().st_size - 1)
        assert contents(load()) == first
        file.unlink()
        assert contents(load()) == first


@pytest.mark.parametrize("name", ["tokens", "starts", "label_counts", "summary.json"])
def test_token_file_that_was_edited_is_made_anew(load: Callable[..., Dataset], folder: Path, name: str) -> None:
    first = contents(load())
    (file,) = folder.glob(f"*/{name}")
    content = bytearray(file.read_bytes())
    content[-6] ^= 1
    file.write_bytes(content)
    assert contents(load()) == first
    (file,) = folder.glob(f"*/{name}")
    assert file.read_bytes() != content


def test_order_that_was_edited_is_made_anew(
    load: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(edge_client.data, "KEPT_ORDER", 2)
    order = load().order(1, 8, (1, "a", "order"))
    edge_client.data._epoch_order.cache_clear()
    (kept,) = folder.glob("*/order-*")
    kept.write_bytes(kept.read_bytes()[:-8] + bytes(8))
    assert load().order(1, 8, (1, "a", "order")) == order


def test_two_programs_make_one_token_file(load: Callable[..., Dataset], encoded: list[str]) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> None:
        if done:
            begun.set()
            may_go_on.wait(60)

    one = run_in_thread(lambda: load(report=wait))
    assert begun.wait(60)
    num_encoded = len(encoded)
    other = run_in_thread(lambda: load(report=lambda done, total: may_go_on.set()))
    assert contents(one.result(timeout=60)) == contents(other.result(timeout=60))
    assert len(encoded) == num_encoded


def test_program_that_waits_for_another_says_so(load: Callable[..., Dataset], folder: Path) -> None:
    said = threading.Event()

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert record.getMessage() == f"another program reads its data into {folder}: this one waits until that is done"
            said.set()

    logger, handler = logging.getLogger("edge_client"), Listening()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with TokenFolder(folder).only_writer():
            other = run_in_thread(load)
            assert said.wait(60)
            assert not other.done()
        assert len(contents(other.result(timeout=60))) == 40
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_order_of_an_epoch_is_made_once(load: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(edge_client.data, "KEPT_ORDER", 2)
    data = load()
    orders = {epoch: data.order(5 * epoch + 1, 8, (1, "a", "order")) for epoch in range(6)}
    edge_client.data._epoch_order.cache_clear()
    assert len(list(folder.glob("*/order-*"))) == edge_client.token_file.MOST_ORDERS
    with monkeypatch.context() as patch:
        patch.setattr(random.Random, "shuffle", None)
        assert load().order(26, 8, (1, "a", "order")) == orders[5]
    for epoch, order in orders.items():
        assert load().order(5 * epoch + 1, 8, (1, "a", "order")) == order


# Bounded


@pytest.fixture
def used(load: Callable[..., Dataset], tmp_path: Path, folder: Path) -> Callable[[str], str]:
    """Loads data of that name, and says which token file it has."""

    def used(name: str) -> str:
        load(write(tmp_path / f"{name}.jsonl", 40, name))
        newest: str = max((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns).name
        return newest

    return used


def test_token_files_beyond_the_limit_go_the_least_recently_used_first(
    used: Callable[[str], str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = used("a")
    size = sum(path.stat().st_size for path in (folder / a).iterdir())
    monkeypatch.setattr(edge_client.token_file, "MOST_BYTES", 3.5 * size)
    b, c = used("b"), used("c")
    assert used("a") == a  # which is now the last but one that would go
    d = used("d")
    assert token_files(folder) == {a, c, d} != {b}
    monkeypatch.setattr(edge_client.token_file, "MOST_BYTES", 0)
    e = used("e")
    assert token_files(folder) == {e}


def test_what_a_killed_program_left_counts_and_goes(
    load: Callable[..., Dataset], used: Callable[[str], str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        load(report=_raise_at(1, Killed()))
    assert len(token_files(folder)) == 1
    monkeypatch.setattr(edge_client.token_file, "MOST_BYTES", 0)
    a = used("a")
    assert token_files(folder) == {a}


def test_data_whose_token_file_has_gone_is_still_there(
    load: Callable[..., Dataset], used: Callable[[str], str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_client.data, "KEPT_ORDER", 2)
    monkeypatch.setattr(edge_client.token_file, "MOST_BYTES", 0)
    data, before = load(), contents(load())
    a = used("a")
    assert token_files(folder) == {a}
    assert contents(data) == before
    assert sorted(data.order(1, 40, (9, "b", "order"))) == list(range(40))


def test_temporary_token_file_leaves_nothing(
    load: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(tmp_path.iterdir())
    data = load(folder=None)
    assert set(tmp_path.iterdir()) == before
    assert len(contents(data)) == 40


# Never half


def _raise_at(call: int, error: BaseException) -> Callable[[int, int], None]:
    """A report that fails when it is called the n-th time with something done."""
    calls = iter(range(1, 10**6))

    def report(done: int, total: int) -> None:
        if done and next(calls) == call:
            raise error

    return report


@pytest.mark.parametrize("kill_at", [1, 5, 20, 39])
def test_start_that_was_killed_is_gone_on_with(
    load: Callable[..., Dataset], folder: Path, encoded: list[str], in_small_pieces: None, kill_at: int, tmp_path: Path
) -> None:
    undisturbed = load(folder=tmp_path / "undisturbed")
    num_texts = len(encoded)
    with pytest.raises(Killed):
        load(report=_raise_at(kill_at, Killed()))
    (unfinished,) = folder.glob("*.part")
    for name in ("tokens", "starts", "label_counts"):  # what had been written, and not yet noted
        with (unfinished / name).open("ab") as file:
            file.write(b"more")
    encoded.clear()
    assert contents(load()) == contents(undisturbed)
    assert len(encoded) <= num_texts - 2 * (kill_at - 10)
    assert not list(folder.glob("*.part"))
    for name in ("tokens", "starts", "label_counts"):
        (one,), (other,) = folder.glob(f"*/{name}"), (tmp_path / "undisturbed").glob(f"*/{name}")
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("progress", ["", "{}", "[]", '{"bytes_of_id": 2, "num_samples": -1}'])
def test_spoilt_note_of_progress_begins_again(
    load: Callable[..., Dataset], folder: Path, in_small_pieces: None, progress: str
) -> None:
    with pytest.raises(Killed):
        load(report=_raise_at(30, Killed()))
    (note,) = folder.glob("*.part/progress.json")
    note.write_text(progress)
    assert contents(load()) == contents(load(folder=None))


def test_broken_entry_leaves_nothing_behind(
    load: Callable[..., Dataset], path: Path, folder: Path, in_small_pieces: None
) -> None:
    with path.open("a") as file:
        file.write('{"text": \n')
    with pytest.raises(DataError, match="line 41: broken JSON"):
        load()
    assert not token_files(folder)


def test_file_that_is_changed_while_it_is_read_is_refused(load: Callable[..., Dataset], path: Path, folder: Path) -> None:
    def report(done: int, total: int) -> None:
        with path.open("a") as file:
            file.write("\n")

    with pytest.raises(DataError, match="was changed while it was read; start again when it is complete"):
        load(report=report)
    assert not token_files(folder)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_full_disk_is_one_sentence(
    load: Callable[..., Dataset], folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, in_small_pieces: None
) -> None:
    calls, fsync = iter(range(1, 10**6)), os.fsync

    def full(file: int) -> None:
        if next(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StateError, match="No space left on device; free some space there") as caught:
            load()
    assert str(folder) in str(caught.value)
    assert not token_files(folder)
    assert len(contents(load())) == 40


def test_disk_that_is_full_when_files_are_closed_leaves_nothing_behind(
    load: Callable[..., Dataset], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_full_disk(path: Path) -> BinaryIO:
        path.touch()
        return io.BufferedRandom(FullDisk(path, "r+") if path.suffix == "" else io.FileIO(path, "r+"))

    monkeypatch.setattr(edge_client.token_file, "_open_private", on_full_disk)
    with pytest.raises(StateError, match="No space left on device"):
        load()
    assert not token_files(folder)


class FullDisk(io.FileIO):
    """A file to which nothing can be written: it stays in the buffer above, also when that is closed."""

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_token_file_that_goes_just_after_it_was_found_is_used(
    load: Callable[..., Dataset], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()

    def deleted_by_another_program(path: Path) -> None:
        shutil.rmtree(path)
        utime(path)

    utime = os.utime
    monkeypatch.setattr(os, "utime", deleted_by_another_program)
    assert len(contents(load())) == 40
    assert not token_files(folder)


def test_what_else_lies_in_the_folder_does_no_harm(load: Callable[..., Dataset], folder: Path) -> None:
    (folder / "other").mkdir(parents=True)
    (folder / "other" / "dangling").symlink_to("nowhere")
    assert len(contents(load())) == 40


def test_folder_that_cannot_be_made_is_one_sentence(load: Callable[..., Dataset], path: Path) -> None:
    with pytest.raises(StateError, match="Not a directory; choose another --state-dir"):
        load(folder=path / "tokens")


@pytest.mark.skipif(os.name != "posix", reason="modes of files are of Unix")
def test_only_their_owner_may_read_them(load: Callable[..., Dataset], folder: Path, with_old_files: None) -> None:
    load()
    assert {path.stat().st_mode & 0o077 for path in [folder, *folder.rglob("*")]} == {0}


# In a stream


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_memory_does_not_grow_with_the_file(
    suffix: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_client.data, "CHARACTERS_AT_ONCE", 2**12)
    monkeypatch.setattr(edge_client.token_file, "PIECE", 2**12)
    peaks = []
    for num_rows in (1_000, 20_000):
        path = tmp_path / f"{num_rows}{suffix}"
        row = {
            ".jsonl": '{"prompt": "one two", "completion": "three"}\n',
            ".csv": "one two,three\n",
            ".txt": "one two||three\n",
        }
        path.write_text(("prompt,completion\n" if suffix == ".csv" else "") + row[suffix] * num_rows)
        tracemalloc.start()
        Dataset.load(path, tokenizer, END, MAX_LENGTH, folder=tmp_path / "tokens")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000  # 20,000 numbers alone would take more


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux what of a file is in this process's memory")
def test_what_was_read_of_a_token_file_does_not_stay_in_memory(
    load: Callable[..., Dataset], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resident_kilobytes() -> int:
        mappings = Path("/proc/self/smaps").read_text().split(str(folder))[1:]
        return sum(int(mapping.partition("Rss:")[2].split()[0]) for mapping in mappings)

    monkeypatch.setattr(edge_client.token_file, "RELEASED_AFTER", 20)
    samples = load().samples
    for _ in samples[:19]:
        pass
    assert resident_kilobytes() > 0
    assert len(samples[19].tokens) > 0
    assert resident_kilobytes() == 0
    assert len(samples[20].tokens) > 0


def test_progress_goes_from_nothing_to_the_whole_file(load: Callable[..., Dataset], path: Path, in_small_pieces: None) -> None:
    reports: list[tuple[int, int]] = []
    load(report=lambda done, total: reports.append((done, total)))
    assert reports == sorted(reports)
    assert len(set(reports)) > 10
    size = path.stat().st_size
    assert {total for _, total in reports} == {size}
    assert (reports[0], reports[-1]) == ((0, size), (size, size))


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import csv

    monkeypatch.setattr(edge_client.text_file, "LONGEST_LINE", 2**20)
    yield
    csv.field_size_limit(edge_client.text_file.LONGEST_LINE)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n["' + b"x" * 2**20,
            "line 2: longer than 1 MiB, which no line may be; divide it into several entries",
        ),
        ("a.txt", b"x" * (2**20 + 1), "line 1: longer than 1 MiB"),
        ("a.csv", b'text\n"' + b"one\n" * 2**19, "line 262[0-9]*: broken CSV: field larger than field limit"),
    ],
)
def test_file_without_lines_does_not_fill_the_memory(
    load: Callable[..., Dataset], tmp_path: Path, short_lines: None, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        load(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n' * 500 + b'{"text": "\xe9"}\n', "line 501: not UTF-8 .byte 0xe9."),
        ("a.txt", b"a\n" * 500 + b"\xe2\x82", "line 501: not UTF-8 .byte 0xe2."),
        ("a.csv", b'text\n"a\nb"\n' * 1 + b"a\n" * 500 + b'"a\nb",c\n', "line 505: 2 fields for 1 columns"),
        ("a.txt", b"a\n" * 500 + b"a||b\n" + b"a\n" * 500, "line 501: '\\|\\|' is in 1 of 1001 lines, and this one has it"),
        ("a.txt", b"a||b\n" * 500 + b"a\n" + b"a||b\n" * 9, "line 501: '\\|\\|' is in 509 of 510 lines, and this one has not"),
        ("a.txt", b"a\nb||c\n", "line 2: '\\|\\|' is in 1 of 2 lines, and this one has it"),
    ],
)
def test_error_far_into_a_file_names_its_line(
    load: Callable[..., Dataset], tmp_path: Path, in_small_pieces: None, name: str, content: bytes, said: str, folder: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        load(path)
    assert not token_files(folder)


def test_lines_of_an_old_mac_are_lines_of_a_table(load: Callable[..., Dataset], tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\rone\rtwo\r")
    assert len(load(path).samples) == 2
