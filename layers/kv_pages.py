"""Where the bytes of the KV cache are: which layers share pages, and the arrays.

Layers with the same KVSpec and the same reach form a group with its own page table. All groups draw
page ids from one pool; layer j of every group uses array j, so a page belongs to one group at a
time and no array has holes.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from ..pallas_kernels.checks import KVPages


@dataclass(frozen=True)
class KVSpec:
    """What one layer keeps for each token. value_dim None: a latent cache, one array."""

    num_kv_heads: int
    head_dim: int
    value_dim: int | None
    window: int | None = None  # keys a query sees, itself included; None: all


@dataclass(frozen=True)
class KVLayout:
    """windows: per group; group_by_layer and array_by_layer: per layer; arrays: the shape of each
    array; num_shards: devices that share the heads.
    """

    windows: tuple[int | None, ...]
    group_by_layer: tuple[int, ...]
    array_by_layer: tuple[int, ...]
    arrays: tuple[KVSpec, ...]
    num_shards: int = 1

    @property
    def num_groups(self) -> int:
        return len(self.windows)


def plan_layout(specs: list[KVSpec], num_shards: int = 1) -> KVLayout:
    """Group layers by (spec, reach). With fewer heads than shards each shard has one, and a head is
    kept by several. Raises ValueError when groups of different shapes would share arrays.
    """
    specs = [replace(s, num_kv_heads=max(s.num_kv_heads, num_shards)) for s in specs]
    groups: list[KVSpec] = []
    counts: list[int] = []
    group_by_layer, array_by_layer = [], []
    for spec in specs:
        if spec not in groups:
            groups.append(spec)
            counts.append(0)
        group = groups.index(spec)
        group_by_layer.append(group)
        array_by_layer.append(counts[group])
        counts[group] += 1
    shapes = {(s.num_kv_heads, s.head_dim, s.value_dim) for s in groups}
    if len(shapes) > 1:
        raise ValueError(
            f"layers with KV caches of different shapes cannot share pages: {sorted(shapes)}"
        )
    arrays = (groups[0],) * max(counts)
    windows = tuple(s.window for s in groups)
    return KVLayout(windows, tuple(group_by_layer), tuple(array_by_layer), arrays, num_shards)


def page_bytes(layout: KVLayout, page_size: int, dtype: np.dtype) -> int:
    """Bytes of one page id over all arrays, on each device."""
    columns = sum(s.num_kv_heads * (s.head_dim + (s.value_dim or 0)) for s in layout.arrays)
    return columns // layout.num_shards * page_size * dtype.itemsize


def abstract_pages(
    layout: KVLayout, num_pages: int, page_size: int, dtype: np.dtype, *, is_stacked: bool = False
) -> tuple[KVPages, ...]:
    """The arrays as jax.ShapeDtypeStruct with the heads of all shards, one KVPages per array index;
    is_stacked: one alone, with an axis for the index in front.
    """
    stack = (len(layout.arrays),) if is_stacked else ()

    def array(spec: KVSpec, dim: int) -> jax.ShapeDtypeStruct:
        shape = (*stack, num_pages, spec.num_kv_heads, page_size, dim)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    return tuple(
        KVPages(array(s, s.head_dim), None if s.value_dim is None else array(s, s.value_dim))
        for s in layout.arrays[: 1 if is_stacked else None]
    )
