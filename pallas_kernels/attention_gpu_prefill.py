"""Attention of work items: up to two tiles of queries of one row, against all keys that they see.

A block of the grid takes one (item, kv head) of the plan after the other. One warpgroup keeps the
ring of tiles full, the other two hold a tile of queries each and take turns: while one multiplies,
the other takes exponentials (FlashAttention-3, section 3.1). Outputs leave query by query, so that
an item's missing queries touch nothing. Tokens that are padding are items that see nothing.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .attention_gpu_plan import (
    ITEM_ALL_FROM,
    ITEM_ALL_TO,
    ITEM_COUNT,
    ITEM_FROM,
    ITEM_ROW,
    ITEM_TO,
    ITEM_TOKEN,
    Items,
)
from .attention_gpu_tile import (
    HIDDEN,
    LOG2_E,
    PER_ROW,
    ROWS,
    Geometry,
    Softmax,
    ValueTile,
    attend,
    clear_outside,
    empty,
    key_positions,
    launch,
    load_global,
    scores,
    store_columns,
    swizzled,
)
from .checks import KVPages
from .tuning import Sizes, stages_that_fit

TILES = 2  # of queries of an item; a warpgroup each
PRODUCER = TILES  # the last warpgroup


class Inputs(NamedTuple):
    """In device memory."""

    q: Any  # [kv_heads, items, TILES, ROWS, head_dim]
    k: Any  # [pages, kv_heads, page_size, head_dim]
    v: Any  # [pages, kv_heads, page_size, value_dim]
    table: Any  # i32[rows, width]
    records: Any  # i32[items + padding items, RECORD]
    ranges: Any  # i32[items, TILES, 2, ROWS]
    count: Any  # i32[1]
    sinks: Any  # f32[kv_heads, ROWS], or None


class Scratch(NamedTuple):
    """In shared memory. `ready` barriers are arrived at by TMA, `free` ones by readers."""

    q: Any  # [TILES, ROWS, head_dim]
    k: Any  # [stages, keys, head_dim]
    v: Any  # [stages, keys, value_dim]
    weights: Any  # [TILES, ROWS, keys], see ValueTile
    out: Any  # [TILES, ROWS, out_columns]
    q_ready: Any
    q_free: Any
    k_ready: Any
    k_free: Any
    v_ready: Any
    v_free: Any
    turn: Any


class Item(NamedTuple):
    head: jax.Array
    number: jax.Array
    row: jax.Array
    token: jax.Array
    queries: jax.Array
    start: jax.Array  # the lowest position that a query sees
    end: jax.Array  # one past the highest

    def tiles(self, g: Geometry) -> tuple[jax.Array, jax.Array]:
        """The first tile of keys, and the end."""
        keys = jnp.int32(g.keys)
        first = lax.div(self.start, keys)
        return first, jnp.maximum(lax.div(self.end + (g.keys - 1), keys), first)


def geometry(g: Geometry, sizes: Sizes) -> Geometry:
    """g with tiles that fit into shared memory twice."""
    item = jnp.dtype(g.dtype).itemsize
    for keys in (g.keys, g.keys // 2):
        for columns in (g.value_dim, store_columns(g)):
            if keys % ROWS:
                continue
            stage = keys * (g.head_dim + g.value_dim) * item
            other = TILES * ROWS * (g.head_dim + columns) * item
            stages = stages_that_fit(sizes, stage, other, sizes.prefill.most_stages)
            if stages >= 2:
                return replace(g, keys=keys, stages=stages, out_columns=columns)
    raise ValueError(f"no tile of {g} fits into shared memory")


class Work(NamedTuple):
    """The arguments of a launch that say what is to be done."""

    q: jax.Array  # [kv_heads, items, TILES, ROWS, head_dim] in the cache's dtype
    table: jax.Array  # i32[rows, width]
    items: Items


def attend_items(
    work: Work,
    kv: KVPages,
    sinks: jax.Array | None,  # f32[heads]
    g: Geometry,
    tokens: int,
    blocks: int,
) -> jax.Array:  # [tokens, kv_heads, group, value_dim] in the cache's dtype
    """Of one-query rows' tokens nothing is written."""
    scratch = Scratch(
        q=swizzled((TILES, ROWS, g.head_dim), g.dtype),
        k=swizzled((g.stages, g.keys, g.head_dim), g.dtype),
        v=swizzled((g.stages, g.keys, g.value_dim), g.dtype),
        weights=swizzled((TILES, ROWS, g.keys), g.dtype) if g.is_interpreted else None,
        out=plgpu.SMEM((TILES, ROWS, g.out_columns), g.dtype),
        q_ready=plgpu.Barrier(num_arrivals=TILES),
        q_free=plgpu.Barrier(num_arrivals=TILES),
        k_ready=plgpu.Barrier(num_arrivals=g.pages, num_barriers=g.stages),
        k_free=plgpu.Barrier(num_arrivals=TILES, num_barriers=g.stages),
        v_ready=plgpu.Barrier(num_arrivals=g.pages, num_barriers=g.stages),
        v_free=plgpu.Barrier(num_arrivals=TILES, num_barriers=g.stages),
        turn=plgpu.Barrier(num_arrivals=TILES),
    )
    kernel = launch(
        partial(_body, g, blocks, sinks is not None),
        g,
        jax.ShapeDtypeStruct((tokens, g.kv_heads, g.group, g.value_dim), g.dtype),
        blocks,
        TILES + 1,
        scratch._asdict(),
    )
    items = work.items
    arrays = [work.q, *kv, work.table, items.records, items.ranges, items.count]
    if sinks is not None:
        per_row = jnp.tile(sinks.astype(jnp.float32).reshape(g.kv_heads, g.group), ROWS // g.group)
        arrays.append(jnp.pad(per_row, ((0, 0), (0, ROWS - per_row.shape[1]))))
    return kernel(*arrays)


def _body(g: Geometry, blocks: int, has_sinks: bool, *refs: Any, **scratch: Any) -> None:
    *inputs, out = refs
    arrays = Inputs(*(inputs if has_sinks else [*inputs, None]))
    smem = Scratch(**{"weights": None, **scratch})
    warpgroup = lax.axis_index("warpgroup")

    # Of a thread. Wide heads need the last ones, and have few pages in a tile to copy.
    copying, computing = (24, 240) if g.value_dim > 192 else (40, 232)

    @pl.when(warpgroup == PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(copying, action="decrease")
        _produce(g, blocks, arrays, smem)

    @pl.when(warpgroup != PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(computing, action="increase")
        _consume(g, blocks, arrays, out, smem)


def _num_turns(g: Geometry, blocks: int, inputs: Inputs) -> jax.Array:
    """How many pairs of an item and a kv head any block takes at most."""
    return lax.div(inputs.count[0] * g.kv_heads + (blocks - 1), jnp.int32(blocks))


def _item(g: Geometry, blocks: int, inputs: Inputs, turn: jax.Array) -> Item:
    """The item of this block's turn. Every other turn goes backwards through the blocks: items of
    one row grow with their number, and no block shall always have the longer one.
    """
    block = lax.axis_index("block")
    is_odd = lax.rem(turn, jnp.int32(2)) == 1
    pair = turn * blocks + jnp.where(is_odd, blocks - 1 - block, block)
    is_work = pair < inputs.count[0] * g.kv_heads
    pair = jnp.where(is_work, pair, 0)
    index = lax.div(pair, jnp.int32(g.kv_heads))
    record = inputs.records.at[index]
    return Item(
        lax.rem(pair, jnp.int32(g.kv_heads)),
        index,
        record[ITEM_ROW],
        record[ITEM_TOKEN],
        jnp.where(is_work, record[ITEM_COUNT], 0),
        record[ITEM_FROM],
        jnp.where(is_work, record[ITEM_TO], 0),
    )


def _produce(g: Geometry, blocks: int, inputs: Inputs, smem: Scratch) -> None:
    last_page = inputs.table.shape[1] - 1

    def item(turn: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        it = _item(g, blocks, inputs, turn)
        first, end = it.tiles(g)
        tiles, items = done

        @pl.when(first < end)
        def _() -> None:
            @pl.when(items > 0)
            def _() -> None:
                plgpu.barrier_wait(smem.q_free)

            for t in range(TILES):
                plgpu.copy_gmem_to_smem(
                    inputs.q.at[it.head, it.number, t], smem.q.at[t], smem.q_ready
                )

        def tile(i: jax.Array, tiles: jax.Array) -> jax.Array:
            stage = lax.rem(tiles, jnp.int32(g.stages))
            # The last tile may pass the table's end: any page will do, nobody sees those keys.
            pages = [
                inputs.table[it.row, jnp.minimum(i * g.pages + j, last_page)]
                for j in range(g.pages)
            ]
            for source, target, ready, free in (
                (inputs.k, smem.k, smem.k_ready, smem.k_free),
                (inputs.v, smem.v, smem.v_ready, smem.v_free),
            ):

                @pl.when(tiles >= g.stages)
                def _(free: Any = free) -> None:
                    plgpu.barrier_wait(free.at[stage])

                for j, page in enumerate(pages):
                    plgpu.copy_gmem_to_smem(
                        source.at[page, it.head],
                        target.at[stage, pl.ds(j * g.page_size, g.page_size)],
                        ready.at[stage],
                    )
            return tiles + 1

        return lax.fori_loop(first, end, tile, tiles), items + jnp.where(first < end, 1, 0)

    turns = _num_turns(g, blocks, inputs)
    tiles, items = lax.fori_loop(0, turns, item, (jnp.int32(0), jnp.int32(0)))

    # A block ends when nobody arrives at its barriers any more.
    @pl.when(items > 0)
    def _() -> None:
        plgpu.barrier_wait(smem.q_free)

    @pl.loop(jnp.maximum(tiles - g.stages, 0), tiles)
    def _(tile: jax.Array) -> None:
        stage = lax.rem(tile, jnp.int32(g.stages))
        plgpu.barrier_wait(smem.k_free.at[stage])
        plgpu.barrier_wait(smem.v_free.at[stage])


def _consume(g: Geometry, blocks: int, inputs: Inputs, out: Any, smem: Scratch) -> None:
    me = lax.axis_index("warpgroup")

    def item(turn: jax.Array, done: jax.Array) -> jax.Array:
        it = _item(g, blocks, inputs, turn)
        first, end = it.tiles(g)

        @pl.when(first < end)
        def _() -> None:
            plgpu.barrier_wait(smem.q_ready)
            # The second one is half a tile behind from here on.
            pl.when(me == 1)(lambda: _hand_over(smem))

        state = lax.fori_loop(first, end, _tile_step(g, inputs, smem, it, done - first), empty(g))

        @pl.when(first < end)
        def _() -> None:
            pl.when(me == 0)(lambda: _hand_over(smem))
            plgpu.barrier_arrive(smem.q_free)

        _store(g, inputs, out, smem, it, state)
        return done + end - first

    lax.fori_loop(0, _num_turns(g, blocks, inputs), item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _hand_over(smem: Scratch) -> None:
    """Wait until the other one has finished its half of a tile's work, too."""
    plgpu.barrier_arrive(smem.turn)
    plgpu.barrier_wait(smem.turn)


def _tile_step(g: Geometry, inputs: Inputs, smem: Scratch, it: Item, offset: jax.Array) -> Any:
    """The loop's body over tiles of keys; offset: from a tile's number to its place in the ring."""
    me = lax.axis_index("warpgroup")
    record = inputs.records.at[it.number]
    all_from, all_to = record[ITEM_ALL_FROM], record[ITEM_ALL_TO]
    ranges = inputs.ranges.at[it.number, me]

    def mask(x: jax.Array, position: jax.Array) -> jax.Array:
        see_from, see_to = (
            lax.broadcast_in_dim(load_global(ranges.at[which], PER_ROW), x.shape, [0])
            for which in range(2)
        )
        return jnp.where((position >= see_from) & (position < see_to), x, HIDDEN)

    def step(i: jax.Array, state: Softmax) -> Softmax:
        stage = lax.rem(i + offset, jnp.int32(g.stages))
        plgpu.barrier_wait(smem.k_ready.at[stage])
        x = scores(smem.q.at[me], smem.k.at[stage], g, lambda: _hand_over(smem))
        plgpu.barrier_arrive(smem.k_free.at[stage])
        begin = i * g.keys
        sees_all = (begin >= all_from) & (begin + g.keys <= all_to)
        x = lax.cond(sees_all, lambda x: x, lambda x: mask(x, key_positions(begin, g)), x)
        v = smem.v.at[stage]

        def ready() -> None:
            _hand_over(smem)
            plgpu.barrier_wait(smem.v_ready.at[stage])

            # The other one reads this tile's values a turn later.
            @pl.when((me == 0) & ((begin < it.start) | (begin + g.keys > it.end)))
            def _() -> None:
                for at in range(0, g.keys, ROWS):
                    clear_outside(v.at[pl.ds(at, ROWS)], begin + at, it.start, it.end, g)

        weights = None if smem.weights is None else smem.weights.at[me]
        state = attend(state, x, ValueTile(v, ready, weights), g)
        plgpu.barrier_arrive(smem.v_free.at[stage])
        return state

    return step


def _store(g: Geometry, inputs: Inputs, out: Any, smem: Scratch, it: Item, state: Softmax) -> None:
    """Divide, and write the queries that there are."""
    me = lax.axis_index("warpgroup")
    total, factor = state.total, None
    if inputs.sinks is not None:  # one more score, with no value
        sink = load_global(inputs.sinks.at[it.head], PER_ROW) * LOG2_E
        highest = jnp.maximum(state.highest, sink)
        factor = jnp.exp2(state.highest - highest)
        total = total * factor + jnp.exp2(sink - highest)
    scale = 1.0 / jnp.where(total == 0.0, 1.0, total)
    if factor is not None:
        scale = scale * factor
    acc = state.acc * lax.broadcast_in_dim(scale, state.acc.shape, [0])
    queries = ROWS // g.group
    for at in range(0, g.value_dim, g.out_columns):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        piece = lax.slice(acc, (0, at), (ROWS, at + g.out_columns))
        smem.out[me] = piece.astype(g.dtype)
        plgpu.commit_smem()

        @pl.loop(0, jnp.clip(it.queries - me * queries, 0, queries))
        def _(query: jax.Array, at: int = at) -> None:
            plgpu.copy_smem_to_gmem(
                smem.out.at[me, pl.ds(query * g.group, g.group)],
                out.at[it.token + me * queries + query, it.head, :, pl.ds(at, g.out_columns)],
            )
