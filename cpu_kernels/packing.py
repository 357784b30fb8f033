"""Weights into the form that the kernels read, on the host."""

import numpy as np

from .library import Library, load
from .ops import Shape


def pack(matrix: np.ndarray, shape: Shape, packed: np.ndarray) -> None:
    """[panels, panel] of zeros is filled from [rows, columns] of bfloat16 or float32; other threads
    may run.
    """
    library = load()
    assert isinstance(library, Library)
    assert matrix.shape == (shape.rows, shape.columns)
    assert (packed.shape, packed.dtype) == (shape.packed, matrix.dtype)
    assert matrix.flags.c_contiguous
    library.handle.quire_pack(
        matrix.ctypes.data, 0, shape.rows, shape.rows, shape.columns, shape.is_gated,
        matrix.dtype.itemsize, packed.ctypes.data,
    )  # fmt: skip
