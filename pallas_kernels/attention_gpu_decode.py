"""Attention of rows with one query: flash-decoding over units of work, and the sum of their parts.

A block of the grid takes one (unit, kv head) of the plan after the other: one warpgroup keeps the
ring of tiles full, two (of wide heads one) attend to every other tile of a unit. Each leaves a
part: an output that is not divided yet, its maximum and its total, of real heads only. A second
kernel adds up a row's parts in their order.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .attention_gpu_plan import UNIT_END, UNIT_FIRST, UNIT_FROM, UNIT_ROW, UNIT_TO, Units
from .attention_gpu_tile import (
    HIDDEN,
    LOG2_E,
    LOWEST,
    ROWS,
    Geometry,
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

# TMA moves whole multiples of 128 bytes: heads of a part's maximum and total.
STATISTICS = 32
COLUMNS = 128  # of the output, per block of the second kernel
PARTS_AT_ONCE = 8  # loads in flight: they wait for memory together
# Numbers of a head with which two computing warpgroups find registers enough.
_MOST_OF_TWO = 192


class Inputs(NamedTuple):
    """In device memory."""

    q: Any  # [kv_heads, rows or more, group, head_dim], the group padded to a multiple of 8
    k: Any  # [pages, kv_heads, page_size, head_dim]
    v: Any  # [pages, kv_heads, page_size, value_dim]
    table: Any  # i32[rows, width]
    records: Any
    count: Any


class Parts(NamedTuple):
    """What units leave, one for each consumer."""

    out: Any  # f32[parts, kv_heads, group, value_dim]
    statistics: Any  # f32[parts, kv_heads, 2, STATISTICS]: maximum, total of each head


class Scratch(NamedTuple):
    """In shared memory. `ready` barriers are arrived at by TMA, `free` ones by readers."""

    q: Any  # [slots, ROWS, head_dim]
    k: Any  # [stages, keys, head_dim]
    v: Any  # [stages, keys, value_dim]
    weights: Any  # [consumers, ROWS, keys], see ValueTile
    out: Any  # f32[consumers, ROWS, 64 or less]
    statistics: Any  # f32[consumers, 2, ROWS]
    q_ready: Any
    q_free: Any
    k_ready: Any
    v_ready: Any
    free: Any


class Unit(NamedTuple):
    head: jax.Array
    number: jax.Array
    row: jax.Array
    first: jax.Array
    end: jax.Array


def attend_units(
    q: jax.Array,  # [kv_heads, rows or more, group or more, head_dim] in the cache's dtype
    kv: KVPages,
    table: jax.Array,  # i32[rows, width]
    units: Units,
    g: Geometry,
    blocks: int,
) -> Parts:
    """The parts of all units; those past the count are left as they were."""
    # One more than there are: `combine` may read a little past the last.
    num_parts = units.records.shape[0] * g.consumers + 1
    shapes = Parts(
        jax.ShapeDtypeStruct((num_parts, g.kv_heads, g.group, g.value_dim), jnp.float32),
        jax.ShapeDtypeStruct((num_parts, g.kv_heads, 2, STATISTICS), jnp.float32),
    )
    ring = (g.stages, g.keys)
    scratch = Scratch(
        q=swizzled((g.q_slots, ROWS, g.head_dim), g.dtype),
        k=swizzled((*ring, g.head_dim), g.dtype),
        v=swizzled((*ring, g.value_dim), g.dtype),
        weights=None if not g.is_interpreted else swizzled((g.consumers, ROWS, g.keys), g.dtype),
        out=plgpu.SMEM((g.consumers, ROWS, store_columns(g)), jnp.float32),
        statistics=plgpu.SMEM((g.consumers, 2, ROWS), jnp.float32),
        q_ready=plgpu.Barrier(num_barriers=g.q_slots),
        q_free=plgpu.Barrier(num_arrivals=g.consumers, num_barriers=g.q_slots),
        k_ready=plgpu.Barrier(num_arrivals=g.pages, num_barriers=g.stages),
        v_ready=plgpu.Barrier(num_arrivals=g.pages, num_barriers=g.stages),
        free=plgpu.Barrier(num_barriers=g.stages),
    )
    kernel = launch(
        partial(_body, g, blocks), g, list(shapes), blocks, g.consumers + 1, scratch._asdict()
    )
    return Parts(*kernel(q, *kv, table, units.records, units.count))


def geometry(g: Geometry, sizes: Sizes) -> Geometry:
    """g with the tiles that fit into shared memory, and the warpgroups that fit into registers."""
    # Two would spill at 256: the sums of values alone take 128 registers of a thread.
    g = replace(g, consumers=1 if max(g.head_dim, g.value_dim) > _MOST_OF_TWO else 2)
    item = jnp.dtype(g.dtype).itemsize
    stage = g.consumers * g.keys * (g.head_dim + g.value_dim) * item
    for slots in (2, 1):
        other = slots * ROWS * g.head_dim * item + g.consumers * ROWS * store_columns(g) * 4
        stages = stages_that_fit(sizes, stage, other, sizes.decode.most_stages // g.consumers)
        if stages:
            return replace(g, stages=g.consumers * stages, q_slots=slots)
    raise ValueError(f"no tile of {g} fits into shared memory")


def _body(g: Geometry, blocks: int, *refs: Any, **scratch: Any) -> None:
    inputs, parts = Inputs(*refs[:6]), Parts(*refs[6:])
    smem = Scratch(**{"weights": None, **scratch})
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == g.consumers)
    def _() -> None:
        if g.consumers > 1:  # otherwise there are registers enough for all
            plgpu.set_max_registers(40, action="decrease")
        _produce(g, blocks, inputs, smem)

    @pl.when(warpgroup != g.consumers)
    def _() -> None:
        if g.consumers > 1:
            plgpu.set_max_registers(232, action="increase")
        _consume(g, blocks, inputs, parts, smem)


def _num_rounds(g: Geometry, blocks: int, inputs: Inputs) -> jax.Array:
    """How many pairs of a unit and a kv head this block takes."""
    pairs = inputs.count[0] * g.kv_heads
    return lax.div(pairs - lax.axis_index("block") + (blocks - 1), jnp.int32(blocks))


def _unit(g: Geometry, blocks: int, inputs: Inputs, turn: jax.Array) -> Unit:
    """The unit of this block's turn. Kv heads vary fastest: they share the unit's records."""
    pair = lax.axis_index("block") + turn * blocks
    index = lax.div(pair, jnp.int32(g.kv_heads))
    record = inputs.records.at[index]
    return Unit(
        lax.rem(pair, jnp.int32(g.kv_heads)),
        index,
        record[UNIT_ROW],
        record[UNIT_FIRST],
        record[UNIT_END],
    )


def _produce(g: Geometry, blocks: int, inputs: Inputs, smem: Scratch) -> None:
    last_page = inputs.table.shape[1] - 1
    heads = inputs.q.shape[2]

    def unit(turn: jax.Array, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        u, slot = _unit(g, blocks, inputs, turn), lax.rem(turn, jnp.int32(g.q_slots))

        @pl.when(turn >= g.q_slots)
        def _() -> None:
            plgpu.barrier_wait(smem.q_free.at[slot])

        plgpu.copy_gmem_to_smem(
            inputs.q.at[u.head, u.row],
            smem.q.at[slot, pl.ds(0, heads)],
            smem.q_ready.at[slot],
        )

        def tile(i: jax.Array, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            consumer = lax.rem(i - u.first, jnp.int32(g.consumers))
            before: Any = jnp.where(consumer == 0, done[0], done[1])
            stage = _stage(g, consumer, before)
            # The last tile may pass the table's end: any page will do, nobody sees those keys.
            pages = [
                inputs.table[u.row, jnp.minimum(i * g.pages + j, last_page)] for j in range(g.pages)
            ]

            @pl.when(before >= g.stages // g.consumers)
            def _() -> None:
                plgpu.barrier_wait(smem.free.at[stage])

            for source, target, ready in (
                (inputs.k, smem.k, smem.k_ready),
                (inputs.v, smem.v, smem.v_ready),
            ):
                for j, page in enumerate(pages):
                    plgpu.copy_gmem_to_smem(
                        source.at[page, u.head],
                        target.at[stage, pl.ds(j * g.page_size, g.page_size)],
                        ready.at[stage],
                    )
            return done[0] + (1 - consumer), done[1] + consumer

        return lax.fori_loop(u.first, u.end, tile, done)

    turns = _num_rounds(g, blocks, inputs)
    done = lax.fori_loop(0, turns, unit, (jnp.int32(0), jnp.int32(0)))

    # A block ends when nobody arrives at its barriers any more.
    @pl.loop(jnp.maximum(turns - g.q_slots, 0), turns)
    def _(turn: jax.Array) -> None:
        plgpu.barrier_wait(smem.q_free.at[lax.rem(turn, jnp.int32(g.q_slots))])

    for consumer, used in enumerate(done[: g.consumers]):

        @pl.loop(jnp.maximum(used - g.stages // g.consumers, 0), used)
        def _(before: jax.Array, consumer: int = consumer) -> None:
            plgpu.barrier_wait(smem.free.at[_stage(g, consumer, before)])


def _stage(g: Geometry, consumer: Any, before: jax.Array) -> jax.Array:
    """Where a consumer's tile lies that comes after `before` others. Each has stages of its own: a
    warpgroup follows the phases of a barrier only if it waits for every one.
    """
    own = g.stages // g.consumers
    return consumer * own + lax.rem(before, jnp.int32(own))


def _consume(g: Geometry, blocks: int, inputs: Inputs, parts: Parts, smem: Scratch) -> None:
    me = lax.axis_index("warpgroup")

    def unit(turn: jax.Array, done: jax.Array) -> jax.Array:
        u, slot = _unit(g, blocks, inputs, turn), lax.rem(turn, jnp.int32(g.q_slots))
        start, end = inputs.records[u.number, UNIT_FROM], inputs.records[u.number, UNIT_TO]
        plgpu.barrier_wait(smem.q_ready.at[slot])

        def tile(step: jax.Array, state: Any) -> Any:
            i = u.first + g.consumers * step + me
            stage = _stage(g, me, done + step)
            v, v_ready = smem.v.at[stage], smem.v_ready.at[stage]
            begin = i * g.keys
            is_boundary = (begin < start) | (begin + g.keys > end)

            # Before the scores take registers.
            @pl.when(is_boundary)
            def _() -> None:
                plgpu.barrier_wait(v_ready)
                clear_outside(v, begin, start, end, g)

            plgpu.barrier_wait(smem.k_ready.at[stage])
            x = scores(smem.q.at[slot], smem.k.at[stage], g)

            def mask(x: jax.Array) -> jax.Array:
                position = key_positions(begin, g)
                return jnp.where((position >= start) & (position < end), x, HIDDEN)

            x = lax.cond(is_boundary, mask, lambda x: x, x)

            def ready() -> None:
                pl.when(~is_boundary)(lambda: plgpu.barrier_wait(v_ready))

            weights = None if smem.weights is None else smem.weights.at[me]
            state = attend(state, x, ValueTile(v, ready, weights), g)
            plgpu.barrier_arrive(smem.free.at[stage])
            return state

        tiles = lax.div(u.end - u.first - me + (g.consumers - 1), jnp.int32(g.consumers))
        state = lax.fori_loop(0, tiles, tile, empty(g))
        plgpu.barrier_arrive(smem.q_free.at[slot])
        _store(g, parts, smem, u, state)
        return done + tiles

    lax.fori_loop(0, _num_rounds(g, blocks, inputs), unit, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _store(g: Geometry, parts: Parts, smem: Scratch, u: Unit, state: Any) -> None:
    """The real heads' rows of a part, some columns at a time."""
    me = lax.axis_index("warpgroup")
    part = u.number * g.consumers + me
    columns = smem.out.shape[-1]
    for at in range(0, g.value_dim, columns):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem.out[me] = lax.slice(state.acc, (0, at), (ROWS, at + columns))
        if at == 0:
            smem.statistics[me, 0] = state.highest
            smem.statistics[me, 1] = state.total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            smem.out.at[me, pl.ds(0, g.group)], parts.out.at[part, u.head, :, pl.ds(at, columns)]
        )
        if at == 0:
            for which in range(2):
                plgpu.copy_smem_to_gmem(
                    smem.statistics.at[me, which, pl.ds(0, STATISTICS)],
                    parts.statistics.at[part, u.head, which],
                )


def combine(
    parts: Parts,
    units: Units,
    sinks: jax.Array | None,  # f32[heads]
    g: Geometry,
    dtype: Any,
) -> jax.Array:  # [rows, heads * value_dim] in dtype
    """What each row's parts give together; zeros for a row that sees nothing."""
    rows, width = units.spans.shape[0], g.kv_heads * g.group * g.value_dim
    columns = -(-width // COLUMNS)
    kernel = launch(
        partial(_combine_body, g, columns),
        g,
        jax.ShapeDtypeStruct((rows, columns * COLUMNS), dtype),
        rows * columns,
        1,
        {},
    )
    extra = [] if sinks is None else [sinks.astype(jnp.float32)]
    out = kernel(parts.out.reshape(-1), parts.statistics, units.spans, *extra)
    return out[:, :width]


def _combine_body(g: Geometry, columns: int, out: Any, statistics: Any, *refs: Any) -> None:
    """COLUMNS numbers of a row: each with the maximum and the total of its head."""
    spans, *sinks, result = refs
    block, heads = lax.axis_index("block"), g.kv_heads * g.group
    row, begin = lax.div(block, jnp.int32(columns)), lax.rem(block, jnp.int32(columns)) * COLUMNS
    first, number = spans[row, 0] * g.consumers, spans[row, 1] * g.consumers
    head = lax.div(begin, jnp.int32(g.value_dim))
    most_heads = 1 if g.value_dim % COLUMNS == 0 else (COLUMNS - 1) // g.value_dim + 2
    position = plgpu.layout_cast(lax.iota(jnp.int32, COLUMNS), _LINE) + begin

    def per_column(read: Any) -> jax.Array:
        """f32[COLUMNS] from read(head)."""
        values = _line(read(head))
        for other in range(1, most_heads):
            here = jnp.minimum(head + other, heads - 1)
            values = jnp.where(position < (head + other) * g.value_dim, values, _line(read(here)))
        return values

    def statistic(part: jax.Array, which: int) -> jax.Array:
        def read(head: jax.Array) -> jax.Array:
            group = jnp.int32(g.group)
            return statistics[part, lax.div(head, group), which, lax.rem(head, group)]

        return per_column(read)

    def batch(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        loaded = []
        for j in range(PARTS_AT_ONCE):
            at = i * PARTS_AT_ONCE + j
            is_part = plgpu.layout_cast(jnp.full((COLUMNS,), at, jnp.int32), _LINE) < number
            part = first + jnp.minimum(at, number - 1)
            start = part * (heads * g.value_dim) + begin
            numbers = load_global(out.at[pl.ds(start, COLUMNS)], _LINE)
            # What is past the row's parts may be anything.
            highest = jnp.where(is_part, statistic(part, 0), _line(2 * LOWEST))
            loaded.append((highest, statistic(part, 1), numbers, is_part))
        old, total, acc = state
        highest = old
        for part_highest, *_ in loaded:
            highest = jnp.maximum(highest, part_highest)
        shrink = jnp.exp2(old - highest)
        total, acc = total * shrink, acc * shrink
        for part_highest, part_total, numbers, is_part in loaded:
            weight = jnp.exp2(part_highest - highest)
            total += jnp.where(is_part, weight * part_total, _line(0.0))
            acc += jnp.where(is_part, weight * numbers, _line(0.0))
        return highest, total, acc

    if sinks:  # one more score, with no value
        state = (per_column(lambda head: sinks[0][head]) * LOG2_E, _line(1.0), _line(0.0))
    else:
        state = (_line(LOWEST), _line(0.0), _line(0.0))
    batches = lax.div(number + (PARTS_AT_ONCE - 1), jnp.int32(PARTS_AT_ONCE))
    _, total, acc = lax.fori_loop(0, batches, batch, state)
    out_numbers = acc / jnp.where(total == 0.0, _line(1.0), total)
    result[row, pl.ds(begin, COLUMNS)] = out_numbers.astype(result.dtype)


_LINE = plgpu.Layout.WG_STRIDED((COLUMNS,), vec_size=1)


def _line(value: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full((COLUMNS,), value, jnp.float32), _LINE)
