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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Items:
    """Work items, then the padding of the step in pieces of the same size, which see nothing."""

    records: jax.Array  # i32[items + padding, RECORD]: row, first token, count; lowest and highest
    # position that a query sees; the range that all its queries see
    ranges: jax.Array  # i32[items, tiles, 2, tile_rows]: attend_from, attend_to of each row
    tokens: jax.Array  # i32[items, tiles, queries]: of each query
    count: jax.Array  # i32[1]


def plan_items(batch: AttentionBatch, group: int, tiles: int, tile_rows: int) -> Items:
    """A tile's rows are queries times the `group` heads of a kv head."""
    tokens, number = batch.attend_from.shape[0], batch.item_row.shape[0]
    queries = tile_rows // group
    size = tiles * queries
    at = jnp.arange(size)
    token = batch.item_first[:, None] + at
    is_query = at < batch.item_count[:, None]
    token = jnp.minimum(token, tokens - 1)
    start, stop = batch.attend_from[token], batch.attend_to[token]
    sees = is_query & (start < stop)
    most = jnp.iinfo(jnp.int32).max
    lowest = jnp.where(sees, start, most).min(1)
    highest = jnp.where(sees, stop, 0).max(1)
    lowest = jnp.minimum(lowest, highest)
    # A query that sees nothing sees no range that others do; nobody reads what padding gives.
    all_from = jnp.where(is_query, jnp.where(sees, start, most), 0).max(1)
    all_to = jnp.where(is_query, jnp.where(sees, stop, 0), most).min(1)
    real = _record(
        (batch.item_row, batch.item_first, batch.item_count, lowest, highest, all_from, all_to)
    )
    padding = -(-tokens // size)
    first = batch.num_tokens + jnp.arange(padding, dtype=jnp.int32) * size
    zero = jnp.zeros_like(first)
    void = _record((zero, first, jnp.clip(tokens - first, 0, size), zero, zero, zero, zero))
    records = jnp.concatenate([real, jnp.zeros_like(void)])
    records = jax.lax.dynamic_update_slice_in_dim(
        records, void, batch.num_items, 0, allow_negative_indices=False
    )
    unused = (tokens - batch.num_tokens + size - 1) // size
    ranges = jnp.stack([jnp.where(sees, start, 0), jnp.where(sees, stop, 0)], axis=1)
    ranges = jnp.repeat(ranges.reshape(number, 2, tiles, queries), group, axis=-1)
    ranges = jnp.pad(ranges, [(0, 0)] * 3 + [(0, tile_rows - queries * group)])
    return Items(
        records,
        ranges.swapaxes(1, 2),
        token.reshape(number, tiles, queries),
        (batch.num_items + unused).reshape(1),
    )
