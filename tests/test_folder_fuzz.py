"""What strangers give us, mutated: some hundreds here, a hundred thousand in `make fuzz-folders`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from folder_mutation import FolderMutator, Judge

SEED, MUTANTS = 1, 300


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.patterns.LIMIT_SECONDS", 1)
        yield Judge(tmp_path_factory.mktemp("fuzz"))


def test_every_mutant_works_or_is_one_sentence(judge: Judge) -> None:
    judge.weights = [1.0] * len(judge.kinds)
    for number in range(MUTANTS):
        judge.judge(FolderMutator(SEED, number))
    works = {outcome.partition(": ")[0] for outcome in judge.outcomes if outcome.endswith(": works")}
    refused = {outcome.partition(": ")[0] for outcome in judge.outcomes if not outcome.endswith(": works")}
    assert works == refused == judge.kinds.keys(), "a kind of which all or none is refused is badly mutated"
    assert not [outcome for outcome in judge.outcomes if outcome.endswith("without a word")]


def test_a_mutant_is_the_same_whatever_was_made_before(tmp_path: Path) -> None:
    data = b'{"a": [1, 2, {"b": "c"}]}'
    made = [FolderMutator(3, number).json(data) for number in range(50)]
    assert made[::-1] == [FolderMutator(3, number).json(data) for number in reversed(range(50))]
    assert len(set(made)) > 40


def test_any_other_error_gets_out(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a defect of ours")

    monkeypatch.setattr("folder_mutation.load_tokenizer", broken)
    judge.weights = [float(kind == "tokenizer") for kind in judge.kinds]
    with pytest.raises(KeyError, match="a defect of ours"):
        judge.judge(FolderMutator(SEED, 0))
