"""From a token's row of q, k and v to heads that attention reads, and the cache, in one kernel.

One block per token, one warpgroup: heads are normed, rotated and rounded; queries are laid out by
kv head, keys and values go to their slots of the pages in place. In jnp this is three kernels.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .attention_gpu_tile import ROWS, TILE, Geometry, launch, load_global
from .checks import AttentionBatch, KVPages
from .heads import HeadNorms

PER_COLUMN = TILE.reduce(0)


class Rotation(NamedTuple):
    """cos and sin, f32[tokens, head_dim] each, of heads.rotate; None: no rotation."""

    cos: Any
    sin: Any


class Arguments(NamedTuple):
    """In device memory."""

    qkv: Any  # [tokens, slots, head_dim]: heads of q, of k, of v
    pages: Any  # i32[tokens], of the token's key and value; past the last: none
    offsets: Any  # i32[tokens]
    rotation: Rotation | None
    norms: HeadNorms | None  # f32[head_dim] each


class Preparation(NamedTuple):
    """What happens to heads before they are attended to: the arguments of heads.split_heads."""

    tables: tuple[jax.Array, jax.Array] | None
    norms: HeadNorms | None
    epsilon: float


def serves(g: Geometry) -> bool:
    """All heads of a token fit into one tile of registers, and halves of heads into its columns."""
    slots = (g.group + 2) * g.kv_heads
    return slots <= ROWS and g.head_dim == g.value_dim and g.head_dim % 16 == 0


def write_heads(
    qkv: jax.Array,  # f32[tokens, slots * head_dim]
    kv: KVPages,
    batch: AttentionBatch,
    prepared: Preparation,
    g: Geometry,
) -> tuple[jax.Array, KVPages]:
    """q, [kv_heads, tokens, group or more, head_dim] in the cache's dtype, and the cache. Heads
    past the group hold anything.
    """
    tokens = qkv.shape[0]
    tables, norms, epsilon = prepared
    wide = norms if norms is None else HeadNorms(*(w.astype(jnp.float32) for w in norms))
    arguments = Arguments(
        qkv.astype(jnp.float32).reshape(tokens, -1, g.head_dim),
        batch.write_page,
        batch.write_offset,
        None if tables is None else Rotation(*tables),
        wide,
    )
    leaves, structure = jax.tree.flatten(arguments)
    heads = -(-g.group // 8) * 8
    kernel = launch(
        partial(_body, g, structure, epsilon),
        g,
        jax.ShapeDtypeStruct((g.kv_heads, tokens, heads, g.head_dim), g.dtype),
        tokens,
        1,
        {
            "x": plgpu.SMEM((ROWS, g.head_dim), jnp.float32),
            "y": plgpu.SMEM((ROWS, g.head_dim), g.dtype),
            "ready": plgpu.Barrier(),
        },
    )
    k, v = jax.new_ref(kv.k), jax.new_ref(kv.v)
    q = kernel(*leaves, k, v)
    return q, KVPages(jax.freeze(k), jax.freeze(v))


def _body(g: Geometry, structure: Any, epsilon: float, *refs: Any, **scratch: Any) -> None:
    *leaves, k, v, q = refs
    a = jax.tree.unflatten(structure, leaves)
    x, y, ready = scratch["x"], scratch["y"], scratch["ready"]
    token = lax.axis_index("block")
    slots = (g.group + 2) * g.kv_heads
    heads, half = g.group * g.kv_heads, g.head_dim // 2
    plgpu.copy_gmem_to_smem(a.qkv.at[token], x.at[pl.ds(0, slots)], ready)
    plgpu.barrier_wait(ready)
    low, high = (plgpu.load(x.at[:, pl.ds(at, half)], layout=TILE) for at in (0, half))
    row = plgpu.broadcasted_iota(jnp.int32, low.shape, 0, layout=TILE)

    def columns(array: Any, at: int) -> jax.Array:
        """f32[ROWS, half] of f32[head_dim]."""
        values = load_global(array.at[pl.ds(at, half)], PER_COLUMN)
        return lax.broadcast_in_dim(values, low.shape, [1])

    is_value = row >= heads + g.kv_heads
    new_low, new_high = low, high
    if a.norms is not None:
        mean = ((low * low).sum(1) + (high * high).sum(1)) / g.head_dim
        factor = lax.broadcast_in_dim(lax.rsqrt(mean + epsilon), low.shape, [0])
        new_low, new_high = (
            z * factor * jnp.where(row < heads, columns(a.norms.q, at), columns(a.norms.k, at))
            for z, at in ((low, 0), (high, half))
        )
    if a.rotation is not None:
        (cos_low, cos_high), (sin_low, sin_high) = (
            [columns(table.at[token], at) for at in (0, half)] for table in a.rotation
        )
        new_low, new_high = (
            new_low * cos_low + new_high * sin_low,
            new_high * cos_high + new_low * sin_high,
        )
    for at, new, old in ((0, new_low, low), (half, new_high, high)):
        z = jnp.where(is_value, old, new)
        if g.dtype == jnp.float16:
            largest = float(jnp.finfo(g.dtype).max)
            z = jnp.minimum(jnp.maximum(z, -largest), largest)
        y[:, pl.ds(at, half)] = z.astype(g.dtype)
    plgpu.commit_smem()
    for head in range(g.kv_heads):
        plgpu.copy_smem_to_gmem(
            y.at[pl.ds(head * g.group, g.group)], q.at[head, token, pl.ds(0, g.group)]
        )
    page, offset = a.pages[token], a.offsets[token]

    @pl.when(page < k.shape[0])
    def _() -> None:
        for which, target in enumerate((k, v)):
            first = heads + which * g.kv_heads
            plgpu.copy_smem_to_gmem(y.at[pl.ds(first, g.kv_heads)], target.at[page, :, offset])

    plgpu.wait_smem_to_gmem(0)
