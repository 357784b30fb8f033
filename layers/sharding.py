"""How the model axis divides a Param: which part of it each shard holds.

Every shard holds its own rows of each slice, joined as the whole Param is, so q, k and v, or gates
and ups, are fused on each of them and the layers need not know of other shards. The rows of a head
stay together; with fewer key and value heads than shards, several shards hold the same one. A
vocabulary is padded with rows of zeros (vocab.py). Weights divided by columns are cut evenly.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .mesh import MESH_AXIS_BY_LOGICAL, MODEL
from .param import Param, Slice
from .vocab import padded_vocab


def split_axis(param: Param) -> int | None:
    """The axis that is divided over the model axis; None: each shard holds the whole Param."""
    axes = [i for i, axis in enumerate(param.axes) if MESH_AXIS_BY_LOGICAL[axis] == MODEL]
    return axes[0] if axes else None


def local_param(param: Param, num_shards: int) -> Param:
    """What one shard holds, as a Param: the same slices, with fewer rows or columns."""
    axis = split_axis(param)
    if axis is None:
        return param
    if axis == 1:
        rows, columns = param.shape
        assert columns % num_shards == 0, (param, num_shards)
        return replace(param, shape=(rows, columns // num_shards))
    slices = tuple(replace(s, rows=_num_rows(param, s, num_shards)) for s in param.slices)
    return replace(param, shape=(sum(s.rows for s in slices), *param.shape[1:]), slices=slices)


def global_shape(local: tuple[int, ...], param: Param, num_shards: int) -> tuple[int, ...]:
    """The shape of the array of all shards, from that of one."""
    return tuple(
        size * num_shards if axis == split_axis(param) else size for axis, size in enumerate(local)
    )


def local_parts(
    param: Param, shard: int, num_shards: int, read: Callable[[Slice], np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """The values of local_param as the checkpoint has them: the first row and the rows of each
    slice. read: the whole tensor of a slice, of which only this shard's part is touched.
    """
    local, axis = local_param(param, num_shards), split_axis(param)
    row = 0
    for piece, part in zip(param.slices, local.slices, strict=True):
        first = 0 if axis is None else _first(param, piece, shard, num_shards)
        size = part.rows if axis != 1 else local.shape[1]
        tensor = read(piece)
        # A padded vocabulary's last rows are not there: they stay zeros.
        yield row, tensor[:, first : first + size] if axis == 1 else tensor[first : first + size]
        row += part.rows


def local_rows(param: Param, shard: jax.Array, num_shards: int) -> jax.Array:
    """i32[rows]: which rows of the Param are those of local_param, -1 where it is padded. Inside a
    program; shard: i32[].
    """
    local, is_by_rows = local_param(param, num_shards), split_axis(param) == 0
    parts, row = [], 0
    for piece, part in zip(param.slices, local.slices, strict=True):
        first = _first(param, piece, shard, num_shards) if is_by_rows else 0
        at = first + jnp.arange(part.rows)
        parts.append(jnp.where(at < piece.rows, row + at, -1))
        row += piece.rows
    return jnp.concatenate(parts)


def local_columns(row: jax.Array, param: Param, shard: jax.Array, num_shards: int) -> jax.Array:
    """[local columns] of a whole row of the Param, [columns]. Inside a program; shard: i32[]."""
    if split_axis(param) != 1:
        return row
    size = local_param(param, num_shards).shape[1]
    return lax.dynamic_slice_in_dim(row, shard * size, size)


def _num_rows(param: Param, piece: Slice, num_shards: int) -> int:
    """Rows of a slice that each shard holds."""
    if _is_padded(param):
        return padded_vocab(piece.rows, num_shards) // num_shards
    units = piece.rows // piece.unit
    assert units % num_shards == 0 or num_shards % units == 0, (piece, num_shards)
    return max(1, units // num_shards) * piece.unit


def _first[Index: (int, jax.Array)](
    param: Param, piece: Slice, shard: Index, num_shards: int
) -> Index:
    """The first row of a slice, or column, that a shard holds: one that is known, or that of the
    device at work.
    """
    if split_axis(param) == 1:
        return shard * (param.shape[1] // num_shards)
    if _is_padded(param):
        return shard * _num_rows(param, piece, num_shards)
    return shard * (piece.rows // piece.unit) // num_shards * piece.unit


def _is_padded(param: Param) -> bool:
    return param.axes[0] == "vocab"
