"""The work of a step for the GPU kernels, made on the device once for all layers: plain jnp.

Rows with one query become units: runs of tiles of one row's keys, cut by the row's own length
alone, so that its arithmetic does not depend on its neighbours. Host-computed work items get the
tiles that their queries see, and each query's range.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .checks import AttentionBatch

# Columns of a unit's record; a record fills a 32-byte sector.
UNIT_ROW, UNIT_FIRST, UNIT_END, UNIT_FROM, UNIT_TO = range(5)
# Columns of an item's record.
ITEM_ROW, ITEM_TOKEN, ITEM_COUNT, ITEM_FROM, ITEM_TO, ITEM_ALL_FROM, ITEM_ALL_TO = range(7)
RECORD = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Units:
    """The work of the one-query rows of a step."""

    records: jax.Array  # i32[units, RECORD]: row, first tile, end tile, attend_from, attend_to
    count: jax.Array  # i32[1], the rest is padding
    spans: jax.Array  # i32[rows, 2]: a row's first unit, how many


def plan_units(batch: AttentionBatch, keys: int, tiles_per_unit: int, most_units: int) -> Units:
    """Rows cut into units of tiles_per_unit tiles, longer ones into most_units larger ones."""
    rows = min(batch.attend_from.shape[0], batch.page_table.shape[0])
    is_single = jnp.arange(rows) < batch.num_single
    start, stop = batch.attend_from[:rows], jnp.where(is_single, batch.attend_to[:rows], 0)
    first = start // keys
    tiles = jnp.where(start < stop, (stop + keys - 1) // keys - first, 0)
    size = jnp.maximum(tiles_per_unit, (tiles + most_units - 1) // most_units)
    number = (tiles + size - 1) // size
    before = jnp.cumsum(number) - number
    piece = jnp.arange(most_units, dtype=jnp.int32)
    begin = first[:, None] + piece * size[:, None]
    end = jnp.minimum(begin + size[:, None], (first + tiles)[:, None])
    columns = (jnp.arange(rows)[:, None], begin, end, start[:, None], stop[:, None])
    total = rows * most_units
    at = jnp.where(piece < number[:, None], before[:, None] + piece, total)
    records = jnp.zeros((total, RECORD), jnp.int32).at[at].set(_record(columns), mode="drop")
    return Units(records, number.sum(keepdims=True), jnp.stack([before, number], axis=1))


def _record(columns: tuple[jax.Array, ...]) -> jax.Array:  # i32[..., RECORD]
    wide = jnp.stack(jnp.broadcast_arrays(*columns), axis=-1).astype(jnp.int32)
    return jnp.pad(wide, [(0, 0)] * (wide.ndim - 1) + [(0, RECORD - len(columns))])
