"""What both sides keep of samples: versions by step, that count once they are answered, and go when nobody goes back there."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from storage import CacheFolder


def rows(value: int, count: int = 2) -> NDArray[np.uint16]:
    return np.full((count, 3), value, np.uint16)


@pytest.fixture
def cache(tmp_path: Path) -> CacheFolder:
    return CacheFolder(tmp_path / "samples", 10**6)


def put(cache: CacheFolder, step: int, *samples: int, micro_batch: int = 0, since: int = 0) -> None:
    cache.store(step, micro_batch, {sample: (since, rows(100 * step + sample)) for sample in samples})
    cache.confirm(step, micro_batch)


def newest(cache: CacheFolder, sample: int, before: int = 10**6) -> tuple[int, int] | None:
    """Step and value."""
    found = cache.latest(sample, before)
    return None if found is None else (found[0], int(found[1][0, 0]))


def test_version_of_the_step_before_is_found(cache: CacheFolder) -> None:
    put(cache, 3, 7)
    put(cache, 5, 7, 8)
    assert [newest(cache, 7, before) for before in (3, 4, 5, 6, 99)] == [None, (3, 307), (3, 307), (5, 507), (5, 507)]
    assert newest(cache, 9) is None
    assert np.array_equal(cache.version(7, 3), rows(307))  # type: ignore[arg-type]
    assert cache.version(7, 4) is None


def test_version_counts_once_it_is_confirmed(cache: CacheFolder) -> None:
    cache.store(1, 0, {7: (0, rows(1))})
    cache.store(1, 1, {8: (0, rows(2))})
    assert newest(cache, 7) is newest(cache, 8) is None
    cache.confirm(1, 1)
    cache.confirm(4, 0)  # of which there is nothing
    assert newest(cache, 7) is None
    assert newest(cache, 8) == (1, 2)


def test_step_that_is_done_again_replaces_its_version(cache: CacheFolder) -> None:
    put(cache, 1, 7)
    cache.store(1, 0, {7: (0, rows(55))})
    assert newest(cache, 7) is None
    cache.confirm(1, 0)
    assert newest(cache, 7) == (1, 55)


def test_going_back_forgets_what_is_later(cache: CacheFolder, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        put(cache, step, 7, micro_batch=0)
        put(cache, step, 8, micro_batch=1)
    cache.store(5, 0, {7: (0, rows(9))})
    cache.forget_after(2)
    cache.confirm(5, 0)
    assert newest(cache, 7) == (3, 307)
    assert newest(cache, 8) == (3, 308)
    assert len(list((tmp_path / "samples").iterdir())) == 6


def test_of_a_step_that_is_gone_on_with_only_what_counts_stays(cache: CacheFolder) -> None:
    put(cache, 1, 7, 8)
    put(cache, 2, 7, micro_batch=0)
    cache.store(2, 1, {8: (0, rows(9))})
    cache.forget_after(1)
    cache.confirm(2, 1)
    assert newest(cache, 7) == (2, 207)
    assert newest(cache, 8) == (1, 108)


def names(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "samples").iterdir()}


def test_only_what_a_run_may_go_back_to_is_kept(cache: CacheFolder, tmp_path: Path) -> None:
    """And what that is a change of: of an answer that was lost, only one side may know that it made the newest count."""
    put(cache, 1, 7, 8)
    put(cache, 2, 7, since=1)
    put(cache, 3, 7, since=1)
    put(cache, 5, 7, since=3)
    cache.forget_before(4)
    assert [newest(cache, 7, before) for before in (2, 3, 5, 6)] == [(1, 107), (1, 107), (3, 307), (5, 507)]
    assert newest(cache, 8) == (1, 108)  # it has no newer one
    assert names(tmp_path) == {f"{step:010}-0.npz" for step in (1, 3, 5)}
    put(cache, 6, 8, since=1)
    put(cache, 7, 8)
    cache.forget_before(7)
    assert names(tmp_path) == {f"{step:010}-0.npz" for step in (3, 5, 7)}


def test_what_a_version_is_a_change_of_is_known_after_a_kill(cache: CacheFolder, tmp_path: Path) -> None:
    put(cache, 1, 7)
    put(cache, 2, 7, since=1)
    put(cache, 3, 7, since=1)
    again = CacheFolder(tmp_path / "samples", 10**6)
    again.forget_before(3)
    assert names(tmp_path) == {f"{step:010}-0.npz" for step in (1, 3)}


def test_version_that_counts_stays_so_when_it_is_delivered_again(cache: CacheFolder) -> None:
    put(cache, 1, 7)
    cache.store(1, 0, {7: (0, rows(107))})
    assert newest(cache, 7) == (1, 107)


def test_it_is_found_again_after_a_kill_and_what_did_not_count_is_gone(cache: CacheFolder, tmp_path: Path) -> None:
    put(cache, 1, 7, 8)
    put(cache, 2, 7, micro_batch=1)
    cache.store(3, 0, {8: (0, rows(9))})
    again = CacheFolder(tmp_path / "samples", 10**6)
    assert newest(again, 7) == (2, 207)
    assert newest(again, 8) == (1, 108)
    assert again.num_bytes == sum(path.stat().st_size for path in (tmp_path / "samples").iterdir())
    put(again, 3, 7)
    again.forget_before(3)
    assert again.version(7, 1) is None
    assert newest(again, 8) == (1, 108)


def test_newest_step_is_the_latest_of_any_sample_that_counts(cache: CacheFolder) -> None:
    assert cache.newest == 0
    put(cache, 3, 7)
    put(cache, 5, 8)
    cache.store(6, 0, {7: (3, rows(1))})
    assert cache.newest == 5
    cache.forget_after(3)
    assert cache.newest == 3


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: bytes(len(data))])
def test_torn_file_is_not_there(cache: CacheFolder, tmp_path: Path, damage: object) -> None:
    put(cache, 1, 7)
    path = tmp_path / "samples" / "0000000001-0.npz"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert newest(cache, 7) is None
    assert newest(CacheFolder(tmp_path / "samples", 10**6), 7) is None
    assert not path.exists()


def test_changed_content_is_noticed(cache: CacheFolder, tmp_path: Path) -> None:
    put(cache, 1, 7)
    path = tmp_path / "samples" / "0000000001-0.npz"
    data = path.read_bytes()
    place = data.index(rows(107).tobytes())
    path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    assert newest(cache, 7) is None


def test_no_more_is_kept_than_may_be(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path / "samples", 2000)
    put(cache, 1, 7)
    with pytest.raises(ValueError, match=r"samples of \d+ bytes, at most 2000 are kept"):
        cache.store(2, 0, {8: (0, rows(1, count=400))})
    assert newest(cache, 7) == (1, 107)
    assert cache.num_bytes < 2000


def test_nothing_is_written_for_nothing(cache: CacheFolder, tmp_path: Path) -> None:
    cache.store(1, 0, {})
    cache.confirm(1, 0)
    assert not (tmp_path / "samples").exists()
