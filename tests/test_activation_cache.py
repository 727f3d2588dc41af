"""What both sides keep of samples: versions by step, that count once they are answered, and go when nobody goes back there."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from storage import CacheFolder


def rows(value: int, count: int = 2) -> NDArray[np.uint16]:
    return np.full((count, 3), value, np.uint16)


@pytest.fixture
def kept(tmp_path: Path) -> CacheFolder:
    return CacheFolder(tmp_path / "samples", 10**6)


def put(kept: CacheFolder, step: int, *samples: int, micro_batch: int = 0, since: int = 0) -> None:
    kept.keep(step, micro_batch, {sample: (since, rows(100 * step + sample)) for sample in samples})
    kept.confirm(step, micro_batch)


def newest(kept: CacheFolder, sample: int, before: int = 10**6) -> tuple[int, int] | None:
    """Step and value."""
    found = kept.latest(sample, before)
    return None if found is None else (found[0], int(found[1][0, 0]))


def test_version_of_the_step_before_is_found(kept: CacheFolder) -> None:
    put(kept, 3, 7)
    put(kept, 5, 7, 8)
    assert [newest(kept, 7, before) for before in (3, 4, 5, 6, 99)] == [None, (3, 307), (3, 307), (5, 507), (5, 507)]
    assert newest(kept, 9) is None
    assert np.array_equal(kept.version(7, 3), rows(307))  # type: ignore[arg-type]
    assert kept.version(7, 4) is None


def test_version_counts_once_it_is_confirmed(kept: CacheFolder) -> None:
    kept.keep(1, 0, {7: (0, rows(1))})
    kept.keep(1, 1, {8: (0, rows(2))})
    assert newest(kept, 7) is newest(kept, 8) is None
    kept.confirm(1, 1)
    kept.confirm(4, 0)  # of which there is nothing
    assert newest(kept, 7) is None
    assert newest(kept, 8) == (1, 2)


def test_step_that_is_done_again_replaces_its_version(kept: CacheFolder) -> None:
    put(kept, 1, 7)
    kept.keep(1, 0, {7: (0, rows(55))})
    assert newest(kept, 7) is None
    kept.confirm(1, 0)
    assert newest(kept, 7) == (1, 55)


def test_going_back_forgets_what_is_later(kept: CacheFolder, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        put(kept, step, 7, micro_batch=0)
        put(kept, step, 8, micro_batch=1)
    kept.keep(5, 0, {7: (0, rows(9))})
    kept.forget_after(2)
    kept.confirm(5, 0)
    assert newest(kept, 7) == (3, 307)
    assert newest(kept, 8) == (3, 308)
    assert len(list((tmp_path / "samples").iterdir())) == 6


def test_of_a_step_that_is_gone_on_with_only_what_counts_stays(kept: CacheFolder) -> None:
    put(kept, 1, 7, 8)
    put(kept, 2, 7, micro_batch=0)
    kept.keep(2, 1, {8: (0, rows(9))})
    kept.forget_after(1)
    kept.confirm(2, 1)
    assert newest(kept, 7) == (2, 207)
    assert newest(kept, 8) == (1, 108)


def names(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "samples").iterdir()}


def test_only_what_a_run_may_go_back_to_is_kept(kept: CacheFolder, tmp_path: Path) -> None:
    """And what that is a change of: of an answer that was lost, only one side may know that it made the newest count."""
    put(kept, 1, 7, 8)
    put(kept, 2, 7, since=1)
    put(kept, 3, 7, since=1)
    put(kept, 5, 7, since=3)
    kept.forget_before(4)
    assert [newest(kept, 7, before) for before in (2, 3, 5, 6)] == [(1, 107), (1, 107), (3, 307), (5, 507)]
    assert newest(kept, 8) == (1, 108)  # it has no newer one
    assert names(tmp_path) == {f"{step:010}-0.npz" for step in (1, 3, 5)}
    put(kept, 6, 8, since=1)
    put(kept, 7, 8)
    kept.forget_before(7)
    assert names(tmp_path) == {f"{step:010}-0.npz" for step in (3, 5, 7)}


def test_what_a_version_is_a_change_of_is_known_after_a_kill(kept: CacheFolder, tmp_path: Path) -> None:
    put(kept, 1, 7)
    put(kept, 2, 7, since=1)
    put(kept, 3, 7, since=1)
    again = CacheFolder(tmp_path / "samples", 10**6)
    again.forget_before(3)
    assert names(tmp_path) == {f"{step:010}-0.npz" for step in (1, 3)}


def test_version_that_counts_stays_so_when_it_is_delivered_again(kept: CacheFolder) -> None:
    put(kept, 1, 7)
    kept.keep(1, 0, {7: (0, rows(107))})
    assert newest(kept, 7) == (1, 107)


def test_it_is_found_again_after_a_kill_and_what_did_not_count_is_gone(kept: CacheFolder, tmp_path: Path) -> None:
    put(kept, 1, 7, 8)
    put(kept, 2, 7, micro_batch=1)
    kept.keep(3, 0, {8: (0, rows(9))})
    again = CacheFolder(tmp_path / "samples", 10**6)
    assert newest(again, 7) == (2, 207)
    assert newest(again, 8) == (1, 108)
    assert again.num_bytes == sum(path.stat().st_size for path in (tmp_path / "samples").iterdir())
    put(again, 3, 7)
    again.forget_before(3)
    assert again.version(7, 1) is None
    assert newest(again, 8) == (1, 108)


def test_newest_step_is_the_latest_of_any_sample_that_counts(kept: CacheFolder) -> None:
    assert kept.newest == 0
    put(kept, 3, 7)
    put(kept, 5, 8)
    kept.keep(6, 0, {7: (3, rows(1))})
    assert kept.newest == 5
    kept.forget_after(3)
    assert kept.newest == 3


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: bytes(len(data))])
def test_torn_file_is_not_there(kept: CacheFolder, tmp_path: Path, damage: object) -> None:
    put(kept, 1, 7)
    path = tmp_path / "samples" / "0000000001-0.npz"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert newest(kept, 7) is None
    assert newest(CacheFolder(tmp_path / "samples", 10**6), 7) is None
    assert not path.exists()


def test_changed_content_is_noticed(kept: CacheFolder, tmp_path: Path) -> None:
    put(kept, 1, 7)
    path = tmp_path / "samples" / "0000000001-0.npz"
    data = path.read_bytes()
    place = data.index(rows(107).tobytes())
    path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    assert newest(kept, 7) is None


def test_no_more_is_kept_than_may_be(tmp_path: Path) -> None:
    kept = CacheFolder(tmp_path / "samples", 2000)
    put(kept, 1, 7)
    with pytest.raises(ValueError, match=r"samples of \d+ bytes, at most 2000 are kept"):
        kept.keep(2, 0, {8: (0, rows(1, count=400))})
    assert newest(kept, 7) == (1, 107)
    assert kept.num_bytes < 2000


def test_nothing_is_written_for_nothing(kept: CacheFolder, tmp_path: Path) -> None:
    kept.keep(1, 0, {})
    kept.confirm(1, 0)
    assert not (tmp_path / "samples").exists()
