"""Weights in the form of the C++ kernels, for one CPU device."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...cpu_kernels import packing
from ...cpu_kernels.ops import Shape
from ..linear import DenseWeight
from ..packed import PackedWeight
from ..param import Kind, Param


@dataclass(frozen=True)
class Packed:
    """The format of unquantized checkpoints where the C++ kernels multiply: every matrix that is
    multiplied is packed, the others stay as they are. dtype: bfloat16 or float32.
    """

    dtype: np.dtype

    def shape(self, param: Param) -> tuple[int, ...]:
        """Of the array that holds it."""
        return _shape(param).packed if _is_packed(param) else param.shape

    def fill(self, param: Param, values: np.ndarray, array: np.ndarray) -> None:
        """The array, of zeros, from the Param's values in its own shape."""
        if _is_packed(param):
            packing.pack(values, _shape(param), array)
        else:
            array[...] = values

    def wrap(self, param: Param, array: Any) -> Any:
        """What the layers read."""
        if _is_packed(param):
            return PackedWeight(array, _shape(param))
        return array if param.kind is Kind.VECTOR else DenseWeight(array)


def _is_packed(param: Param) -> bool:
    return param.kind in (Kind.LINEAR, Kind.GATED)


def _shape(param: Param) -> Shape:
    rows, columns = param.shape
    return Shape(rows, columns, is_gated=param.kind is Kind.GATED)
