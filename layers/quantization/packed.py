"""Weights in the form of the C++ kernels, for one CPU device."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...cpu_kernels import packing
from ...cpu_kernels.ops import Shape
from ..arena import passing_zeros
from ..linear import DenseWeight
from ..packed import PackedWeight
from ..param import Kind, Param


@dataclass(frozen=True)
class Packed:
    """The format of unquantized checkpoints where the C++ kernels multiply: every matrix that is
    multiplied is packed, the others stay as they are. dtype: bfloat16 or float32.
    """

    dtype: np.dtype

    def layout(self) -> str:
        """Another one if arrays of another layout are made of the same Params."""
        return packing.layout(self.dtype)

    def shape(self, param: Param) -> tuple[int, ...]:
        """Of the array that holds it."""
        return _shape(param).packed if _is_packed(param) else param.shape

    def fill(
        self, param: Param, parts: Iterable[tuple[int, np.ndarray]], array: np.ndarray
    ) -> None:
        """The array, of zeros, from the first row and the rows of each part of the Param."""
        for row, values in parts:
            if _is_packed(param):
                packing.pack(_as_kernels_read(values, self.dtype), row, _shape(param), array)
            else:
                array[row : row + len(values)] = values

    def wrap(self, param: Param, array: Any) -> Any:
        """What the layers read."""
        if _is_packed(param):
            return PackedWeight(array, _shape(param))
        return array if param.kind is Kind.VECTOR else DenseWeight(array)


def _is_packed(param: Param) -> bool:
    return param.kind in (Kind.LINEAR, Kind.GATED)


def _as_kernels_read(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values themselves where they can be packed from the mapped file: a copy of them takes
    longer than to pack them.
    """
    if values.dtype == dtype and values.flags.c_contiguous and values.flags.aligned:
        return values
    made = passing_zeros(values.shape, dtype)
    made[...] = values
    return made


def _shape(param: Param) -> Shape:
    rows, columns = param.shape
    return Shape(rows, columns, is_gated=param.kind is Kind.GATED)
