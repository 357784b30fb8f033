"""Files of packed weights: whole or not there, within their limit, and no other error than one."""

import errno
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from quire.layers import weight_cache
from quire.layers.weight_cache import WeightCache, WeightCacheError

NAMES = st.sampled_from(["a", "b", "c", "d"])
IMAGE_BYTES = 40 * 64
FILE_BYTES = IMAGE_BYTES + 3 * 8 + 32  # sums of three blocks, and the seal
LIMIT = 3 * FILE_BYTES


@pytest.fixture(autouse=True)
def _small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_cache, "_BLOCK", 1024)
        yield


@pytest.fixture
def cache(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path / "weights", LIMIT)


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, IMAGE_BYTES, np.uint8)


def read(cache: WeightCache, name: str) -> np.ndarray | None:
    got = np.zeros(IMAGE_BYTES, np.uint8)
    return got if cache.read(name, got) else None


def refusal(action: Any, *arguments: Any) -> str:
    with pytest.raises(WeightCacheError) as caught:
        action(*arguments)
    return str(caught.value)


def files(cache: WeightCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


@dataclass
class Kept:
    content: np.ndarray | None  # None: damaged
    size: int = FILE_BYTES


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.cache = WeightCache(self.folder / "weights", LIMIT)
        self.kept: dict[str, Kept] = {}  # the last used last

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(name=NAMES, seed=st.integers(0, 9))
    def keep(self, name: str, seed: int) -> None:
        self.cache.keep(name, image(seed))
        assert f"{name}.part" not in files(self.cache)
        if name in self.kept:
            return
        while sum(kept.size for kept in self.kept.values()) + FILE_BYTES > LIMIT:
            self.kept.pop(next(iter(self.kept)))
        self.kept[name] = Kept(image(seed))
        assert files(self.cache) == sorted(f"{name}.weights" for name in self.kept)

    @rule(name=NAMES)
    def read(self, name: str) -> None:
        if name not in self.kept:
            assert read(self.cache, name) is None
            return
        kept = self.kept.pop(name)
        if kept.content is None:
            path = self.cache.folder / f"{name}.weights"
            assert refusal(read, self.cache, name) == f"{path} is truncated or damaged"
        else:
            np.testing.assert_array_equal(read(self.cache, name), kept.content)
            self.kept[name] = kept

    @rule(name=NAMES, at=st.integers(0, FILE_BYTES - 1), bit=st.integers(0, 7))
    def flip_a_bit(self, name: str, at: int, bit: int) -> None:
        if name in self.kept and self.kept[name].content is not None:
            content = bytearray(self._path(name).read_bytes())
            content[at] ^= 1 << bit
            self._damage(name, bytes(content))

    @rule(name=NAMES, size=st.integers(0, 2 * FILE_BYTES))
    def cut_or_lengthen(self, name: str, size: int) -> None:
        if name in self.kept and size != FILE_BYTES:
            self._damage(name, self._path(name).read_bytes()[:size].ljust(size, b"\0"))

    @rule(name=NAMES, content=st.binary(max_size=9000))
    def die_while_writing(self, name: str, content: bytes) -> None:
        self.cache.folder.mkdir(exist_ok=True)
        (self.cache.folder / f"{name}.part").write_bytes(content)

    @invariant()
    def no_file_is_there_that_was_not_kept(self) -> None:
        sizes = {path.stem: path.stat().st_size for path in self.cache.folder.glob("*.weights")}
        assert sizes == {name: kept.size for name, kept in self.kept.items()}

    def _path(self, name: str) -> Path:
        return self.cache.folder / f"{name}.weights"

    def _damage(self, name: str, content: bytes) -> None:
        used = self._path(name).stat().st_mtime_ns
        self._path(name).write_bytes(content)
        os.utime(self._path(name), ns=(used, used))
        self.kept[name].content, self.kept[name].size = None, len(content)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)


def test_what_was_not_used_for_the_longest_goes_first(cache: WeightCache):
    for name in "abc":
        cache.keep(name, image(1))
    read(cache, "a")
    cache.keep("d", image(1))
    assert files(cache) == ["a.weights", "c.weights", "d.weights"]


def test_a_part_that_was_renamed_before_it_could_be_locked_is_not_written(
    cache: WeightCache, monkeypatch: pytest.MonkeyPatch
):
    cache.keep("a", image(1))
    (cache.folder / "a.weights").rename(cache.folder / "a.part")
    lock = fcntl.flock

    def later(descriptor: int, operation: int) -> None:
        (cache.folder / "a.part").rename(cache.folder / "a.weights")
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", later)
    with weight_cache._alone(cache.folder / "a.part") as descriptor:
        assert descriptor is None
    np.testing.assert_array_equal(read(cache, "a"), image(1))


def test_a_file_under_another_name_is_refused(cache: WeightCache):
    cache.keep("a", image(1))
    (cache.folder / "a.weights").rename(cache.folder / "b.weights")
    assert refusal(read, cache, "b") == f"{cache.folder / 'b.weights'} is truncated or damaged"


def test_who_writes_and_who_reads_at_once_see_whole_files(cache: WeightCache):
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(40):
                if number % 2:
                    cache.keep("a", image(1))
                    (cache.folder / "a.weights").unlink(missing_ok=True)
                elif (got := read(cache, "a")) is not None:
                    np.testing.assert_array_equal(got, image(1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not [*cache.folder.glob("*.part")]


def test_what_another_process_writes_is_left_to_it(cache: WeightCache):
    cache.folder.mkdir()
    part = cache.folder / "a.part"
    with weight_cache._alone(part) as descriptor:
        assert descriptor is not None
        os.write(descriptor, b"half")
        cache.keep("a", image(1))
        cache.keep("b", image(2))  # whose cleaning finds the other's part
        assert part.read_bytes() == b"half"
    assert files(cache) == ["a.part", "b.weights"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_leaves_nothing(
    cache: WeightCache, code: int, monkeypatch: pytest.MonkeyPatch
):
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    told = refusal(cache.keep, "a", image(1))
    assert told == f"{cache.folder} cannot be written ({os.strerror(code)})"
    assert files(cache) == []


def test_a_disk_that_would_be_nearly_full_is_left_alone(
    cache: WeightCache, monkeypatch: pytest.MonkeyPatch
):
    free = SimpleNamespace(free=2 * IMAGE_BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    told = refusal(cache.keep, "a", image(1))
    assert told == (
        f"5119 bytes are free on the disk of {cache.folder}, and twice the 2560 of the weights are "
        "asked for; free some, or set cache_dir to another disk"
    )
    assert files(cache) == []
    free.free += 1
    cache.keep("a", image(1))
    assert files(cache) == ["a.weights"]


def test_weights_beyond_the_limit_are_not_kept_and_others_stay(cache: WeightCache):
    cache.keep("a", image(1))
    small = WeightCache(cache.folder, FILE_BYTES - 1)
    told = refusal(small.keep, "b", image(2))
    assert told == "2616 bytes are more than weight_cache_bytes, 2615; raise it"
    assert files(cache) == ["a.weights"]


def test_a_folder_that_cannot_be_made_is_said(cache: WeightCache):
    cache.folder.write_text("a file")
    told = refusal(cache.keep, "a", image(1))
    assert told == f"{cache.folder} cannot be written (File exists)"
    told = refusal(read, cache, "a")
    assert told == f"{cache.folder / 'a.weights'} cannot be opened (Not a directory)"


def test_a_server_that_fails_is_said_and_its_file_stays(
    cache: WeightCache, monkeypatch: pytest.MonkeyPatch
):
    cache.keep("a", image(1))

    def fail(*_: Any) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        told = refusal(read, cache, "a")
    assert told == f"{cache.folder / 'a.weights'} cannot be read (Stale file handle)"
    np.testing.assert_array_equal(read(cache, "a"), image(1))


def test_a_cache_that_cannot_be_written_is_still_read(
    cache: WeightCache, monkeypatch: pytest.MonkeyPatch
):
    cache.keep("a", image(1))

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", fail)
    np.testing.assert_array_equal(read(cache, "a"), image(1))


def test_files_are_the_users_own(cache: WeightCache):
    cache.keep("a", image(1))
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert (cache.folder / "a.weights").stat().st_mode & 0o777 == 0o600
