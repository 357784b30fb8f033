"""Ragged paged attention on Hopper GPUs: which shapes its kernels serve, the plan, and the op.

The kernels are Pallas Mosaic GPU, whose import takes a second: only who runs them pays it.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .attention_gpu_plan import Items, Units, plan_items, plan_units
from .checks import AttentionBatch, AttentionShape, AttentionSpec, KVPages
from .heads import HeadNorms, split_heads
from .reference import fit, write_kv
from .tuning import Sizes, load

if TYPE_CHECKING:
    from .attention_gpu_tile import Geometry

PAGE_SIZES = (16, 32, 64)
DTYPES = (jnp.bfloat16, jnp.float16)
# Rows of a tile: queries of a work item times the heads of a group.
_TILE_ROWS, _TILES_PER_ITEM = 64, 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """out_dtype: of the result, once the op is called."""

    units: Units
    items: Items | None  # None where no step of this size has any
    out_dtype: Any = field(default=None, metadata={"static": True})


@dataclass(frozen=True)
class Kernels:
    """The implementation for one device. is_interpreted: run on CPU, for tests."""

    sizes: Sizes
    is_interpreted: bool = False

    def serves(self, shape: AttentionShape) -> bool:
        """Heads of whole 32-byte sectors in 16-bit numbers, pages that fill a tile of keys."""
        dims = (shape.head_dim, shape.value_dim)
        return (
            shape.page_size in PAGE_SIZES
            and jnp.dtype(shape.kv_dtype) in [jnp.dtype(d) for d in DTYPES]
            and shape.heads % shape.kv_heads == 0
            and shape.heads // shape.kv_heads <= 32
            and all(dim is not None and dim % 16 == 0 and 16 <= dim <= 256 for dim in dims)
        )

    def queries_per_item(self, shape: AttentionShape) -> int:
        """A work item fills two tiles with whole queries."""
        return _TILES_PER_ITEM * (_TILE_ROWS // (shape.heads // shape.kv_heads))

    def plan(self, batch: AttentionBatch, page_size: int, group: int) -> Plan:
        """What every layer of a group needs to know about the step."""
        sizes = self.sizes.decode
        units = plan_units(batch, sizes.keys, sizes.tiles_per_unit, sizes.most_units)
        if not batch.item_row.shape[0]:
            return Plan(units, None)
        return Plan(units, plan_items(batch, group, _TILES_PER_ITEM, _TILE_ROWS))

    def run(
        self,
        q: jax.Array,  # [tokens, heads, head_dim]
        k_new: jax.Array,  # [tokens, kv_heads, head_dim]
        v_new: jax.Array | None,  # [tokens, kv_heads, value_dim]
        kv: KVPages,
        batch: AttentionBatch,
        plan: Plan,
        spec: AttentionSpec,
        sinks: jax.Array | None = None,  # f32[heads]
    ) -> tuple[jax.Array, KVPages]:
        """Same meaning as reference.paged_attention. q, the weights of the values, and the output
        of rows with several queries are rounded to the cache's dtype.
        """
        kv = write_kv(k_new, v_new, kv, batch)
        tokens, heads, head_dim = q.shape
        g = self._geometry(heads, kv, spec)
        grouped = fit(q, g.dtype).reshape(tokens, g.kv_heads, g.group, head_dim).swapaxes(0, 1)
        grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, -g.group % 8), (0, 0)))
        out = self._attend(grouped, kv, batch, replace(plan, out_dtype=q.dtype), g, sinks)
        return out.reshape(tokens, heads, -1), kv

    def attend(
        self,
        qkv: jax.Array,  # [tokens, (heads + kv_heads) * head_dim + kv_heads * value_dim]
        kv: KVPages,
        batch: AttentionBatch,
        plan: Plan,
        spec: AttentionSpec,
        tables: tuple[jax.Array, jax.Array] | None,
        norms: HeadNorms | None,
        sinks: jax.Array | None,
    ) -> tuple[jax.Array, KVPages]:
        """Ops.attend. Where the heads of a token fit into one tile, their norms, rotation and the
        write of the cache are one kernel.
        """
        from . import attention_gpu_heads

        _, kv_heads, _, head_dim = kv.k.shape
        g = self._geometry(qkv.shape[1] // head_dim - 2 * kv_heads, kv, spec)
        if not attention_gpu_heads.serves(g):
            heads = split_heads(qkv, kv_heads, head_dim, tables, norms, spec.norm_epsilon)
            out, kv = self.run(*heads, kv, batch, plan, spec, sinks)
            return out.reshape(out.shape[0], -1), kv
        prepared = attention_gpu_heads.Preparation(tables, norms, spec.norm_epsilon)
        q, kv = attention_gpu_heads.write_heads(qkv, kv, batch, prepared, g)
        plan = replace(plan, out_dtype=spec.read_as or qkv.dtype)
        return self._attend(q, kv, batch, plan, g, sinks), kv

    def _attend(
        self,
        q: jax.Array,  # [kv_heads, tokens, group, head_dim], the group padded to a multiple of 8
        kv: KVPages,
        batch: AttentionBatch,
        plan: Plan,
        g: "Geometry",
        sinks: jax.Array | None,
    ) -> jax.Array:  # [tokens, heads * value_dim]
        """Of a cache that is written; in plan.out_dtype."""
        from . import attention_gpu_decode as decode
        from . import attention_gpu_prefill as prefill

        units, items, blocks = plan.units, plan.items, self.sizes.num_sms
        fitted = decode.geometry(replace(g, keys=self.sizes.decode.keys), self.sizes)
        parts = decode.attend_units(q, kv, batch.page_table, units, fitted, blocks)
        singles = decode.combine(parts, units, sinks, fitted, plan.out_dtype)
        if items is None:
            return singles
        fitted = prefill.geometry(replace(g, keys=self.sizes.prefill.keys), self.sizes)
        # TMA cannot start at any query: each tile's are brought together.
        tiles = q[:, items.tokens, : g.group]
        tiles = tiles.reshape(*tiles.shape[:3], -1, g.head_dim)
        missing = _TILE_ROWS - tiles.shape[3]
        tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0)))
        work = prefill.Work(tiles, batch.page_table, items)
        out = prefill.attend_items(work, kv, sinks, fitted, q.shape[1], blocks)
        out = out.reshape(q.shape[1], -1).astype(plan.out_dtype)
        rows = singles.shape[0]
        is_single = jnp.arange(rows)[:, None] < batch.num_single
        return out.at[:rows].set(jnp.where(is_single, singles, out[:rows]))

    def _geometry(self, heads: int, kv: KVPages, spec: AttentionSpec) -> "Geometry":
        from .attention_gpu_tile import Geometry

        _, kv_heads, page_size, head_dim = kv.k.shape
        return Geometry(
            group=heads // kv_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=kv.v.shape[-1],
            page_size=page_size,
            dtype=kv.k.dtype,
            scale=spec.scale,
            soft_cap=spec.soft_cap,
            is_interpreted=self.is_interpreted,
        )


# An H100 has the same number of multiprocessors, of the same kind.
HOPPER = Kernels(load("h200"))
# Few blocks that take many turns, short units and many of them, for the tests.
INTERPRETED = Kernels(
    replace(
        HOPPER.sizes,
        num_sms=2,
        decode=replace(HOPPER.sizes.decode, tiles_per_unit=3, most_units=3),
    ),
    is_interpreted=True,
)
