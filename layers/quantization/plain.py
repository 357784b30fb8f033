"""Weights held as they are, in one dtype."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...pallas_kernels.linear_gpu import Kernel
from ..dense_gpu import GpuWeight
from ..linear import DenseWeight
from ..param import Kind, Param


@dataclass(frozen=True)
class Plain:
    """The format of unquantized checkpoints: a Param is one array of `dtype`.

    kernel: what multiplies with few tokens; XLA, if there is none.
    """

    dtype: np.dtype
    kernel: Kernel | None = None

    def layout(self) -> None:
        """The checkpoint's own: there is nothing to keep."""

    def shape(self, param: Param) -> tuple[int, ...]:
        """Of the array that holds it."""
        return param.shape

    def fill(
        self, param: Param, parts: Iterable[tuple[int, np.ndarray]], array: np.ndarray
    ) -> None:
        """The array, of zeros, from the first row and the rows of each part of the Param."""
        for row, values in parts:
            array[row : row + len(values)] = values

    def wrap(self, param: Param, array: Any) -> Any:
        """What the layers read: a Matrix, or the array itself for a vector."""
        if param.kind is Kind.VECTOR:
            return array
        if self.kernel is None or param.kind is Kind.EMBEDDING:
            return DenseWeight(array)
        return GpuWeight(array, self.kernel)
