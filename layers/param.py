"""A weight as a model declares it: shape, logical axes, where it is in a checkpoint, how it starts.

A model is a tree of Param leaves; sizes, shardings, loading, random initialisation and adapters are
maps over that tree. Which arrays a Param becomes on the device is a WeightFormat's business
(quantization/).
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import jax

# A leaf of a tree that is sometimes abstract: a jax.Array, or the ShapeDtypeStruct, Param, numpy
# array or sharding that stands in its place.
Leaf = Any


class Kind(Enum):
    """What a Param is for; a WeightFormat decides by it how the bytes are held."""

    LINEAR = "linear"  # [out, in], multiplied, and perhaps read by row
    GATED = "gated"  # [2 * out, in], the gates and the ups of a gated layer
    EMBEDDING = "embedding"  # [vocab, hidden], read by row alone
    VECTOR = "vector"  # norms and biases, kept as they are


@dataclass(frozen=True)
class Slice:
    """A part of a fused Param: the tensor it comes from and how many rows of axis 0 it fills."""

    name: str  # what adapters and messages call it
    tensor: str  # its name in the checkpoint
    rows: int
    unit: int = 1  # rows that stay on one device, as those of a head do


@dataclass(frozen=True)
class Param:
    """One logical weight. Its slices, stacked along axis 0, are the checkpoint's tensors."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes, mapped to mesh axes in mesh.py
    slices: tuple[Slice, ...]
    kind: Kind = Kind.LINEAR
    fill: float | None = None  # start value without a checkpoint; None draws normal(0, 0.02)

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)
        assert sum(s.rows for s in self.slices) == self.shape[0], self


def linear_param(tensor: str, shape: tuple[int, int], axes: tuple[str | None, str | None]) -> Param:
    """A weight matrix [out, in] that is one tensor of the checkpoint."""
    return Param(shape, axes, (Slice(tensor.rsplit(".", 2)[-2], tensor, shape[0]),))


def fused_param(
    parts: dict[str, tuple[str, int]],
    columns: int,
    axes: tuple[str | None, str | None],
    kind: Kind = Kind.LINEAR,
    *,
    unit: int = 1,
) -> Param:
    """Matrices [rows, columns] stacked along axis 0; parts: name -> (tensor, rows)."""
    slices = tuple(Slice(name, tensor, rows, unit) for name, (tensor, rows) in parts.items())
    return Param((sum(s.rows for s in slices), columns), axes, slices, kind)


def vector_param(
    parts: dict[str, tuple[str, int]], axis: str | None, *, fill: float, unit: int = 1
) -> Param:
    """Vectors joined end to end; parts: name -> (tensor, length)."""
    slices = tuple(Slice(name, tensor, rows, unit) for name, (tensor, rows) in parts.items())
    return Param((sum(s.rows for s in slices),), (axis,), slices, Kind.VECTOR, fill)


def is_param(leaf: Any) -> bool:
    return isinstance(leaf, Param)


def param_leaves(tree: Any) -> list[Param]:
    """The Params of a tree, in flattening order."""
    return jax.tree.leaves(tree, is_leaf=is_param)


def map_params(function: Any, tree: Any, *rest: Any) -> Any:
    """jax.tree.map over Params as leaves."""
    return jax.tree.map(function, tree, *rest, is_leaf=is_param)
