"""Which format holds the weights."""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from ...pallas_kernels.registry import Ops
from ..param import Param
from .packed import Packed
from .plain import Plain

# The first row and the rows of each part of a Param, in any dtype.
Parts = Iterable[tuple[int, np.ndarray]]


class WeightFormat(Protocol):
    """How a Param's bytes are held."""

    @property
    def dtype(self) -> np.dtype: ...

    def layout(self) -> str | None: ...

    def shape(self, param: Param) -> tuple[int, ...]: ...

    def fill(self, param: Param, parts: Parts, array: np.ndarray) -> None: ...

    def wrap(self, param: Param, array: Any) -> Any: ...


def choose_format(dtype: np.dtype, ops: Ops) -> WeightFormat:
    """The format for unquantized weights of `dtype`."""
    return Packed(dtype) if ops.linear.name == "native" else Plain(dtype, ops.linear.kernel)
