"""Weights into the form that the kernels read, on the host."""

import hashlib

import numpy as np

from .library import Library, load
from .ops import Shape


def pack(matrix: np.ndarray, first: int, shape: Shape, packed: np.ndarray) -> None:
    """[panels, panel] of zeros is filled from `first` on with rows [some, columns] of bfloat16 or
    float32; other threads may run.
    """
    library = load()
    assert isinstance(library, Library)
    assert matrix.shape == (len(matrix), shape.columns)
    assert first + len(matrix) <= shape.rows
    assert (packed.shape, packed.dtype) == (shape.packed, matrix.dtype)
    assert matrix.flags.c_contiguous
    assert matrix.flags.aligned
    library.handle.quire_pack(
        matrix.ctypes.data, first, first + len(matrix), shape.rows, shape.columns, shape.is_gated,
        matrix.dtype.itemsize, packed.ctypes.data,
    )  # fmt: skip


def layout(dtype: np.dtype) -> str:
    """A name of the packed form: the digest of a small matrix in it, so that it changes when the
    form does. The matrix has panels that are not full, and each of its elements has its own bits.
    """
    rows, columns = 70, 70
    bits = np.arange(rows * columns, dtype=np.dtype(f"u{dtype.itemsize}"))
    found = hashlib.sha256()
    for is_gated in (False, True):
        shape = Shape(rows, columns, is_gated)
        packed = np.zeros(shape.packed, dtype)
        pack(bits.view(dtype).reshape(rows, columns), 0, shape, packed)
        found.update(packed.view(np.uint8).tobytes())
    return found.hexdigest()
