"""Weights into the form that the kernels read, on the host."""

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
