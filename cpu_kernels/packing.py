"""Weights into the form that the kernels read, on the host."""

import numpy as np

from .library import Library, load
from .ops import Shape


def pack(matrix: np.ndarray, shape: Shape) -> np.ndarray:
    """[panels, panel] from [rows, columns] of bfloat16 or float32; other threads may run."""
    library = load()
    assert isinstance(library, Library)
    assert matrix.shape == (shape.rows, shape.columns) and matrix.flags.c_contiguous
    packed = np.zeros(shape.packed, matrix.dtype)
    library.handle.quire_pack(
        matrix.ctypes.data, 0, shape.rows, shape.rows, shape.columns, shape.is_gated,
        matrix.dtype.itemsize, packed.ctypes.data,
    )  # fmt: skip
    return packed
