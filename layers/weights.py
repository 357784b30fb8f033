"""A Param tree -> its arrays on the devices, from a checkpoint or at random.

Each shard of a Param is filled once from the mapped files, joined and in its dtype, and goes to its
own device, so the peak above the weights is a few tensors' shards.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .arena import Arena
from .checkpoint import Checkpoint, CheckpointError, check_names
from .mesh import MODEL, partition
from .param import Param, map_params, param_leaves
from .quantization.registry import Parts, WeightFormat
from .sharding import (
    global_shape,
    local_columns,
    local_param,
    local_parts,
    local_rows,
    split_axis,
)

# Makes an array of a shape and a dtype.
Zeros = Callable[[tuple[int, ...], np.dtype], np.ndarray]

_LOAD_THREADS = 4
_DRAWN_AT_ONCE = 1 << 22  # random numbers


def load_weights(
    checkpoint: Checkpoint,
    params: Any,
    weight_format: WeightFormat,
    mesh: Mesh,
    is_unused: Callable[[str], bool],
    progress: Callable[[int], None] = lambda num_bytes: None,
    arena: Arena | None = None,
) -> Any:
    """The tree with each Param replaced by its device arrays, in parallel.

    `is_unused` names tensors that published files carry and the model does not read; `progress` is
    called with the bytes of each finished Param on one device; arena: that of open_arena, if the
    caller wants its image. Raises CheckpointError listing missing, unexpected and misshapen
    tensors.
    """
    check_names(checkpoint, params, is_unused)
    arena, num_shards = arena or open_arena(params, weight_format, mesh), mesh.shape[MODEL]
    index = _indices(params)

    def parts(param: Param, shard: int) -> Parts:
        return local_parts(param, shard, num_shards, lambda s: checkpoint.read(s.tensor))

    def load(param: Param) -> Any:
        zeros = _zeros(arena, index[id(param)])
        array = _placed(param, partial(parts, param), weight_format, mesh, zeros)
        for piece in param.slices:
            checkpoint.forget(piece.tensor)
        progress(_local_bytes(param, weight_format, num_shards))
        return weight_format.wrap(local_param(param, num_shards), array)

    with ThreadPoolExecutor(_LOAD_THREADS, thread_name_prefix="load") as pool:
        futures = map_params(lambda param: pool.submit(load, param), params)
        return jax.tree.map(lambda future: future.result(), futures)


def filled_weights(params: Any, weight_format: WeightFormat, mesh: Mesh, arena: Arena) -> Any:
    """The tree with each Param replaced by its array in an arena that an earlier load filled."""
    index, sharding = _indices(params), NamedSharding(mesh, PartitionSpec())

    def load(param: Param) -> Any:
        array = arena.array(index[id(param)], weight_format.shape(param), weight_format.dtype)
        return weight_format.wrap(param, jax.device_put(array, sharding))

    return map_params(load, params)


def dummy_weights(params: Any, weight_format: WeightFormat, mesh: Mesh, seed: int) -> Any:
    """Random weights of the tree's shapes, made on the devices, the same ones on any number: norms
    and biases at their start value, the rest normal(0, 0.02).
    """
    index = _indices(params)
    arena, num_shards = open_arena(params, weight_format, mesh), mesh.shape[MODEL]
    key = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)

    def make(param: Param) -> Any:
        array = _drawn(key, np.int32(index[id(param)]), _unnamed(param), weight_format.dtype, mesh)
        local = local_param(param, num_shards)
        if weight_format.shape(local) != local.shape:  # as kernels for one device have it
            values = np.asarray(array)
            zeros = _zeros(arena, index[id(param)])
            array = _placed(param, lambda shard: [(0, values)], weight_format, mesh, zeros)
        return weight_format.wrap(local, array)

    return map_params(make, params)


def weight_bytes(params: Any, weight_format: WeightFormat, num_shards: int) -> int:
    """Bytes of all arrays of the tree on one device."""
    return sum(_local_bytes(p, weight_format, num_shards) for p in param_leaves(params))


def array_shape(param: Param, weight_format: WeightFormat, num_shards: int) -> tuple[int, ...]:
    """Of the array that holds a Param on all devices."""
    return global_shape(weight_format.shape(local_param(param, num_shards)), param, num_shards)


def _unnamed(param: Param) -> Param:
    """Equal for weights of one shape, so that a model compiles one program for each of them."""
    return replace(param, slices=tuple(replace(s, name="", tensor="") for s in param.slices))


@partial(jax.jit, static_argnums=(2, 3, 4))
def _drawn(
    key: jax.Array,  # u32[2]
    index: jax.Array,  # i32[]
    param: Param,
    dtype: np.dtype,
    mesh: Mesh,
) -> jax.Array:
    """The start values of a Param. Each row is drawn with a key of its own, so a device draws only
    rows that it has a part of, and what is drawn does not depend on their number.
    """

    def draw(key: jax.Array, index: jax.Array) -> jax.Array:
        num_shards, shard = mesh.shape[MODEL], lax.axis_index(MODEL)
        if param.fill is not None:
            return jnp.full(local_param(param, num_shards).shape, param.fill, dtype)
        own_key = jax.random.fold_in(jax.random.wrap_key_data(key), index)
        _, columns = param.shape

        def draw_row(row: jax.Array) -> jax.Array:
            noise = jax.random.normal(jax.random.fold_in(own_key, row), (columns,)) * 0.02
            noise = local_columns(noise, param, shard, num_shards)
            return jnp.where(row >= 0, noise, 0).astype(dtype)

        # Some at a time: the bits of a draw take several times the memory of its result.
        rows = local_rows(param, shard, num_shards)
        return lax.map(draw_row, rows, batch_size=max(1, _DRAWN_AT_ONCE // columns))

    everywhere = PartitionSpec()
    mapped = jax.shard_map(
        draw, mesh=mesh, in_specs=everywhere, out_specs=partition(param.axes), check_vma=False
    )
    return mapped(key, index)


def open_arena(params: Any, weight_format: WeightFormat, mesh: Mesh) -> Arena | None:
    """Where arrays are made that the one CPU device reads in place; None: they are copied to it."""
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return None
    return Arena([_local_bytes(param, weight_format, 1) for param in param_leaves(params)])


def _indices(params: Any) -> dict[int, int]:
    """The place of each Param among the leaves, by its id()."""
    return {id(param): i for i, param in enumerate(param_leaves(params))}


def _zeros(arena: Arena | None, index: int) -> Zeros:
    return np.zeros if arena is None else partial(arena.array, index)


def _placed(
    param: Param,
    parts: Callable[[int], Parts],
    weight_format: WeightFormat,
    mesh: Mesh,
    zeros: Zeros,
) -> jax.Array:
    """The Param's array on its devices, from the parts of each shard, which are asked for one by
    one.
    """
    num_shards = mesh.shape[MODEL]
    local, axis = local_param(param, num_shards), split_axis(param)
    shape, dtype = weight_format.shape(local), weight_format.dtype

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        shard = 0 if axis is None or index is None else (index[axis].start or 0) // shape[axis]
        array = zeros(shape, dtype)
        with np.errstate(over="ignore"):  # said below, with the tensor's name
            weight_format.fill(local, parts(shard), array)
        if weight_format.dtype == np.float16 and not np.isfinite(array).all():
            names = ", ".join(s.tensor for s in param.slices)
            raise CheckpointError(
                f"{names}: values beyond float16's 65504 would become infinite; use dtype "
                "bfloat16 or float32"
            )
        return array

    sharding = NamedSharding(mesh, partition(param.axes))
    if num_shards == 1:
        return jax.device_put(part(None), sharding)
    return jax.make_array_from_callback(global_shape(shape, param, num_shards), sharding, part)


def _local_bytes(param: Param, weight_format: WeightFormat, num_shards: int) -> int:
    shape = weight_format.shape(local_param(param, num_shards))
    return math.prod(shape) * weight_format.dtype.itemsize
