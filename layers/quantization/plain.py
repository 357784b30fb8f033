"""Weights held as they are, in one dtype."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..linear import DenseWeight
from ..param import Kind, Param


@dataclass(frozen=True)
class Plain:
    """The format of unquantized checkpoints: a Param is one array of `dtype`."""

    dtype: np.dtype

    def shape(self, param: Param) -> tuple[int, ...]:
        """Of the array that holds it."""
        return param.shape

    def fill(self, param: Param, values: np.ndarray, array: np.ndarray) -> None:
        """The array, of zeros, from the Param's values in its own shape."""
        array[...] = values

    def wrap(self, param: Param, array: Any) -> Any:
        """What the layers read: a DenseWeight for a matrix, the array itself for the rest."""
        return array if param.kind is Kind.VECTOR else DenseWeight(array)
