"""Ragged paged attention on Hopper GPUs: which shapes its kernels serve, the plan, and the op.

The kernels are Pallas Mosaic GPU, whose import takes a second: only who runs them pays it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from .attention_gpu_plan import Units, plan_units
from .checks import AttentionBatch, AttentionShape, AttentionSpec, KVPages
from .reference import fit, write_kv
from .tuning import Sizes

if TYPE_CHECKING:
    from .attention_gpu_tile import Geometry

PAGE_SIZES = (16, 32, 64)
DTYPES = (jnp.bfloat16, jnp.float16)
# Rows of a tile: queries of a work item times the heads of a group.
_TILE_ROWS, _TILES_PER_ITEM = 64, 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    units: Units


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

    def plan(self, batch: AttentionBatch, page_size: int) -> Plan:
        """What every layer of a group needs to know about the step."""
        sizes = self.sizes.decode
        return Plan(plan_units(batch, sizes.keys, sizes.tiles_per_unit, sizes.most_units))

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
        from . import attention_gpu_decode as decode

        kv = write_kv(k_new, v_new, kv, batch)
        g = self._geometry(q, kv, spec, self.sizes.decode.keys)
        launched = decode.geometry(g, self.sizes)
        assert launched is not None
        rows = plan.units.spans.shape[0]
        grouped = fit(q[:rows], g.dtype).reshape(rows, g.kv_heads, g.group, g.head_dim)
        grouped = jnp.pad(grouped.swapaxes(0, 1), ((0, 0), (0, 0), (0, -g.group % 8), (0, 0)))
        blocks = self.sizes.num_sms
        parts = decode.attend_units(grouped, kv, batch.page_table, plan.units, launched, blocks)
        out = decode.combine(parts, plan.units, sinks, launched)
        return out.reshape(-1, q.shape[1], g.value_dim).astype(q.dtype), kv

    def _geometry(self, q: jax.Array, kv: KVPages, spec: AttentionSpec, keys: int) -> "Geometry":
        from .attention_gpu_tile import Geometry

        _, kv_heads, page_size, head_dim = kv.k.shape
        return Geometry(
            group=q.shape[1] // kv_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=kv.v.shape[-1],
            page_size=page_size,
            keys=keys,
            dtype=kv.k.dtype,
            scale=spec.scale,
            soft_cap=spec.soft_cap,
            is_interpreted=self.is_interpreted,
        )
