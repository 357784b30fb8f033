"""What the two GPU attention kernels share: the static facts of a launch, how tiles lie in shared
memory, and one step of the online softmax on a tile of keys.

Pallas Mosaic GPU for Hopper: a "thread" is a warpgroup of 128 CUDA threads; wgmma reads keys and
values from shared memory, where one TMA copy per page has put them. Nothing here knows of rows,
items or plans.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of one warpgroup's tile: what a wgmma has
LOG2_E = math.log2(math.e)
# A score that no real one reaches; a maximum starts above it, so that its exponential is 0.
HIDDEN, LOWEST = -1e30, -1e29
# How a tile lies in the registers of a warpgroup, and one number for each of its rows.
TILE = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)


@dataclass(frozen=True)
class Geometry:
    """Static facts of one launch.

    keys: of a tile; stages: tiles of K and V in shared memory; q_slots: tiles of q there;
    out_columns: of the output there; consumers: warpgroups that compute parts of one unit.
    """

    group: int  # query heads that share a kv head
    kv_heads: int
    head_dim: int
    value_dim: int
    page_size: int
    dtype: Any  # of the cache, and of q
    scale: float
    soft_cap: float | None
    is_interpreted: bool
    keys: int = 0
    stages: int = 0
    q_slots: int = 0
    out_columns: int = 0
    consumers: int = 2

    @property
    def pages(self) -> int:
        """Of a tile."""
        return self.keys // self.page_size


class Softmax(NamedTuple):
    """The online softmax of a tile of rows (FlashAttention-2, algorithm 1), in base 2."""

    acc: jax.Array  # f32[ROWS, value_dim], not divided by the total yet
    highest: jax.Array  # f32[ROWS], of log2(e) times the scores
    total: jax.Array  # f32[ROWS]


class ValueTile(NamedTuple):
    """The values of a tile, and what has to happen before they can be multiplied."""

    ref: Any  # shared memory [keys, value_dim]
    ready: Callable[[], None]
    weights: Any  # shared memory [ROWS, keys] for the interpreter, which reads no registers


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory that TMA fills and wgmma reads: the widest swizzle that divides a row."""
    row_bytes = shape[-1] * jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if row_bytes % s == 0)
    columns = swizzle // jnp.dtype(dtype).itemsize
    mosaic: Any = plgpu  # mypy takes its transforms for abstract
    transforms = (mosaic.TilingTransform((8, columns)), mosaic.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def launch(
    body: Callable[..., None],
    g: Geometry,
    out_type: Any,
    grid: int,
    num_threads: int,
    scratch: dict[str, Any],
) -> Callable[..., Any]:
    """A Mosaic kernel over `grid` blocks of `num_threads` warpgroups."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(grid,),
        grid_names=("block",),
        num_threads=num_threads,
        thread_name="warpgroup",
        scratch_types=scratch,
        # Of the functions used here this changes exp2 alone: two units in the last place.
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if g.is_interpreted else None,
    )  # fmt: skip


def load_global(ref: Any, layout: Any) -> jax.Array:
    """A few numbers from device memory: jax 0.11 knows no better load for these layouts."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store_columns(g: Geometry) -> int:
    """Columns of values that pass through registers or a small array at a time: whole swizzles."""
    return next(c for c in (64, 32, 16) if g.value_dim % c == 0)


def empty(g: Geometry) -> Softmax:
    """Nothing seen yet."""
    return Softmax(
        plgpu.layout_cast(jnp.zeros((ROWS, g.value_dim), jnp.float32), TILE),
        plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), PER_ROW),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW),
    )


def scores(
    q: Any,  # shared memory [ROWS, head_dim]
    k: Any,  # shared memory [keys, head_dim]
    g: Geometry,
    started: Callable[[], None] = lambda: None,
) -> jax.Array:  # f32[ROWS, keys], times log2(e)
    """log2(e) * cap(scale * q k^T). The scale comes after the product, in f32: q is not rounded a
    second time. started: called when the product is under way.
    """

    def product(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, q, k.transpose((1, 0)))
        started()
        return acc[...]

    x = pl.run_scoped(product, plgpu.ACC((ROWS, g.keys), jnp.float32))
    if g.soft_cap is None:
        return x * (g.scale * LOG2_E)
    # tanh(y) = 1 - 2 / (1 + exp(2 y)): exact where tanh.approx keeps 11 bits.
    grown = jnp.exp2(x * (2 * g.scale * LOG2_E / g.soft_cap))
    return (g.soft_cap * LOG2_E) - (2 * g.soft_cap * LOG2_E) / (1.0 + grown)


def key_positions(first: jax.Array, g: Geometry) -> jax.Array:
    """i32[ROWS, keys]: the position of each key of the tile that starts at `first`."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, g.keys), 1, layout=TILE) + first


def attend(state: Softmax, x: jax.Array, values: ValueTile, g: Geometry) -> Softmax:
    """The softmax after a tile of scores x, f32[ROWS, keys]; hidden ones are HIDDEN."""
    highest = jnp.maximum(state.highest, x.max(1))
    shrink = jnp.exp2(state.highest - highest)
    weights = jnp.exp2(x - lax.broadcast_in_dim(highest, x.shape, [0]))
    total = state.total * shrink + weights.sum(1)
    acc = state.acc * lax.broadcast_in_dim(shrink, state.acc.shape, [0])
    rounded = weights.astype(g.dtype)
    values.ready()
    if not g.is_interpreted:
        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, rounded, values.ref))(plgpu.ACC.init(acc))
        return Softmax(acc, highest, total)

    def product(part: Any) -> jax.Array:
        plgpu.wgmma(part, values.weights, values.ref)
        return part[...]

    values.weights[...] = rounded
    plgpu.commit_smem()
    part = pl.run_scoped(product, plgpu.ACC((ROWS, g.value_dim), jnp.float32))
    return Softmax(acc + part, highest, total)


def clear_outside(
    v: Any,  # shared memory [keys, value_dim]
    first: jax.Array,
    start: jax.Array,
    end: jax.Array,
    g: Geometry,
) -> None:
    """Zero the values of the tile at position `first` that are outside [start, end): their weights
    are 0, but 0 times NaN is NaN. What is there belongs to nobody, or to another request.
    """
    keys, columns = v.shape[0], store_columns(g)
    position = plgpu.broadcasted_iota(jnp.int32, (keys, columns), 0, layout=TILE) + first
    inside = (position >= start) & (position < end)

    @pl.loop(0, g.value_dim // columns)  # few registers at a time
    def _(i: jax.Array) -> None:
        piece = v.at[:, pl.ds(i * columns, columns)]
        kept = plgpu.load(piece, layout=TILE)
        piece[...] = jnp.where(inside, kept, jnp.zeros_like(kept))

    plgpu.commit_smem()
