"""Memory for the weights of a CPU device: one mapping in huge pages, which jax reads in place.

With pages of 4 KiB a processor reads weights a quarter slower (one core: 16 GB/s, and 21 in huge
pages), because it looks up an address for every 64 lines.
"""

import itertools
import math
import mmap
from collections.abc import Sequence

import numpy as np

_LINE = 64  # jax reads arrays in place that begin at a cache line
_HUGE = 2 << 20


class Arena:
    """Arrays of zeros, one of each of `sizes` bytes; image: u8[…], all of them as they lie."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.offsets = (0, *itertools.accumulate(-(-size // _LINE) * _LINE for size in sizes))
        self.image = _huge_zeros(self.offsets[-1])

    def array(self, index: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        start, end = self.offsets[index : index + 2]
        size = math.prod(shape) * dtype.itemsize
        assert size <= end - start, "more than was said at first"
        return self.image[start : start + size].view(dtype).reshape(shape)


def _huge_zeros(num_bytes: int) -> np.ndarray:
    # Private: what is shared counts as a file, and files come in small pages.
    mapping = mmap.mmap(-1, num_bytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    start = -whole.ctypes.data % _HUGE
    return whole[start : start + num_bytes]


def passing_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros for a short time: their memory goes back to the system at once, where that of numpy's
    own arrays stays with the thread that freed it.
    """
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size).view(dtype).reshape(shape)
