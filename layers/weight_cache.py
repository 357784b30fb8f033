"""Packed weights on disk: one file for each checkpoint and form, the longest unused go first.

Knows names and bytes. What they mean, and what is said when something fails, is the caller's.

A file is the image of an arena, the sum of each of its blocks, and a seal over the name and the
sums. It is read into huge pages of the process's own, and not mapped. Mapping 2.4 GB takes 0.2 to
0.5 s of a processor where reading takes 0.8 to 2.7, and a kernel that keeps files in huge pages
multiplies as fast from it (20.6 and 21.3 GB/s, side by side). But on others every step is a fifth
slower, the pages of an idle engine's file are taken away when memory is short, and a disk or a
server that fails later would end the process.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Large: each takes the interpreter's lock several times, which tracing holds meanwhile.
_BLOCK = 32 << 20
_READ_THREADS = 4
_DIGEST_BYTES = hashlib.sha256().digest_size
# Smaller weights are packed in a tenth of a second; tests and demos leave no files.
LEAST_BYTES = 64 << 20


class WeightCacheError(Exception):
    """Why nothing was read or kept; the weights are packed instead."""


@dataclass(frozen=True)
class WeightCache:
    """Files of at most max_bytes together."""

    folder: Path
    max_bytes: int

    def read(self, name: str, image: np.ndarray) -> bool:
        """Fill an image u8[bytes]; False: there is none of this name. Raises WeightCacheError when
        the file is not whole, which removes it, or cannot be read.
        """
        path = self._path(name)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise WeightCacheError(f"{path} cannot be opened ({error.strerror})") from error
        try:
            is_whole = _read(descriptor, name, image)
        except OSError as error:
            raise WeightCacheError(f"{path} cannot be read ({error.strerror})") from error
        finally:
            os.close(descriptor)
        with suppress(OSError):  # a cache that cannot be written can still be read
            if not is_whole:
                path.unlink()
            else:
                _mark_used(path)
        if not is_whole:
            raise WeightCacheError(f"{path} is truncated or damaged")
        return True

    def keep(self, name: str, image: np.ndarray) -> None:
        """Write an image, whole or not at all: nobody sees a part of it. Nothing is done when
        another process is writing the same. Raises WeightCacheError.
        """
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            part = self.folder / f"{name}.part"
            with _alone(part) as descriptor:
                if descriptor is None:
                    return
                if self._path(name).exists():  # since read() found none
                    part.unlink()
                    return
                try:
                    self._make_room(name, image.nbytes)
                    _write(descriptor, name, image)
                    _mark_used(part)
                    os.replace(part, self._path(name))
                except BaseException:
                    part.unlink(missing_ok=True)  # a full disk is not left full
                    raise
        except OSError as error:
            raise WeightCacheError(f"{self.folder} cannot be written ({error.strerror})") from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.weights"

    def _make_room(self, name: str, num_bytes: int) -> None:
        """Remove what was left by processes that died, then what was not used for the longest."""
        size = num_bytes + _tail_bytes(num_bytes)
        if size > self.max_bytes:
            raise WeightCacheError(
                f"{size} bytes are more than weight_cache_bytes, {self.max_bytes}; raise it"
            )
        for part in self.folder.glob("*.part"):
            if part.stem != name:
                with _alone(part, creates=False) as descriptor:
                    if descriptor is not None:
                        part.unlink()
        kept = sorted((_used_and_size(path), path) for path in self.folder.glob("*.weights"))
        total = sum(size for (_, size), _ in kept)
        for (_, unused), path in kept:
            if total + size <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= unused
        free = shutil.disk_usage(self.folder).free
        if free < 2 * num_bytes:  # the disk is other people's, too
            raise WeightCacheError(
                f"{free} bytes are free on the disk of {self.folder}, and twice the {num_bytes} "
                "of the weights are asked for; free some, or set cache_dir to another disk"
            )


def _mark_used(path: Path) -> None:
    now = time.time_ns()  # finer than the file system's own clock
    os.utime(path, ns=(now, now))


def _used_and_size(path: Path) -> tuple[int, int]:
    """When a file was last used, in ns, and its bytes; nothing if another process removed it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@contextmanager
def _alone(path: Path, *, creates: bool = True) -> Iterator[int | None]:
    """The descriptor of a file that this process alone writes while inside; None: another one does,
    or it is gone. The system ends the lock with the process.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if creates else 0), 0o600)
    except FileNotFoundError:
        if creates:
            raise
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had the lock may have renamed the file: then this is a whole one by now.
            is_ours = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        yield descriptor if is_ours else None
    finally:
        os.close(descriptor)


def _read(descriptor: int, name: str, image: np.ndarray) -> bool:
    """Whether the image was filled with what was written under this name."""
    starts = range(0, len(image), _BLOCK)
    tail = _tail_bytes(len(image))
    if os.fstat(descriptor).st_size != len(image) + tail:
        return False
    ending = np.zeros(tail, np.uint8)
    _read_all(descriptor, memoryview(ending), len(image))
    sums = ending[:-_DIGEST_BYTES].view(np.uint64)
    if ending[-_DIGEST_BYTES:].tobytes() != _seal(name, sums):
        return False

    def read_block(start: int) -> bool:
        block = image[start : start + _BLOCK]
        _read_all(descriptor, memoryview(block), start)
        is_right: bool = _sum(block) == sums[start // _BLOCK]
        return is_right

    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="weight-cache") as pool:
        return all([*pool.map(read_block, starts)])


def _tail_bytes(num_bytes: int) -> int:
    """Of the sums and the seal of an image."""
    return 8 * -(-num_bytes // _BLOCK) + _DIGEST_BYTES


def _read_all(descriptor: int, data: memoryview, offset: int) -> None:
    """What was cut off since its size was asked for is left as it is, and fails its sum."""
    while data and (count := os.preadv(descriptor, [data], offset)):
        data, offset = data[count:], offset + count


def _write(descriptor: int, name: str, image: np.ndarray) -> None:
    os.ftruncate(descriptor, 0)
    blocks = [image[start : start + _BLOCK] for start in range(0, len(image), _BLOCK)]
    for block in blocks:
        _write_all(descriptor, memoryview(block))
    sums = np.array([_sum(block) for block in blocks], np.uint64)
    _write_all(descriptor, memoryview(sums.tobytes() + _seal(name, sums)))
    # Disks and servers that are full or fail may say so no sooner.
    os.fsync(descriptor)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _sum(block: np.ndarray) -> np.uint64:
    """Of a block's words: one that is wrong, lost or zero is noticed, and memory is not slowed."""
    total: np.uint64 = block.view(np.uint64).sum(dtype=np.uint64)
    return total


def _seal(name: str, sums: np.ndarray) -> bytes:
    return hashlib.sha256(name.encode() + sums.tobytes()).digest()
