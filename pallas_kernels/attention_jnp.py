"""Ragged paged attention in jnp: what runs where no kernel does.

Rows with one query are taken in blocks, the rest as work items of up to 16 queries; both walk their
keys in chunks at fixed positions with an online softmax, so a row's arithmetic does not depend on
its neighbours. Trip counts follow the actual lengths, so one program serves every context.
Gathering keys per token, or one big masked matrix, is 4-20x slower and takes hundreds of MB.

What depends on the batch alone is made once a step by `plan`. A layer repeats only what it must:
each instruction of a layer costs 4 KB of memory in each program, times the layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from .checks import QUERIES_PER_ITEM, AttentionBatch, AttentionSpec, KVPages
from .reference import write_kv

ROWS_PER_BLOCK = 8
KEYS_PER_CHUNK = 128
# Steps of so few tokens take each as a row of its own: twice the work for the few that share a row,
# and half the memory for the program.
MOST_TOKENS_AS_ROWS = 32

# A score that no real one reaches; a maximum starts above it, so that its exponential is 0.
_HIDDEN, _LOWEST = -1e30, -1e29
_TINY = 1e-30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Work:
    """Pieces of one shape, `rows` rows with `queries` consecutive queries each, and the keys that
    they see.
    """

    count: jax.Array  # i32[], how many of the n are used
    extent: jax.Array  # i32[n, 3]: the first token, the first chunk that a query sees, their end
    ranges: jax.Array  # i32[n, 2, rows, queries]: attend_from, attend_to, 0 where padded
    table: jax.Array  # u32[n, rows, chunks, pages of a chunk]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """A step's work, in this order: an item's padded queries are overwritten by the next item."""

    blocks: Work  # of ROWS_PER_BLOCK rows with one query
    items: Work | None  # of one row with QUERIES_PER_ITEM queries


def plan(batch: AttentionBatch, page_size: int, group: int) -> Plan:
    """What every layer of a group needs to know about the step."""
    tokens = batch.attend_from.shape[0]
    if tokens <= MOST_TOKENS_AS_ROWS:
        sees = batch.attend_from < batch.attend_to
        num_rows = jnp.where(sees, jnp.arange(1, tokens + 1), 0).max()
        table = batch.page_table[batch.token_row]
        return Plan(_blocks(batch, table, num_rows, page_size), None)
    blocks = _blocks(batch, batch.page_table[:tokens], batch.num_single, page_size)
    if not batch.item_row.shape[0]:
        return Plan(blocks, None)
    at = batch.item_first[:, None] + jnp.arange(QUERIES_PER_ITEM)
    is_query = jnp.arange(QUERIES_PER_ITEM) < batch.item_count[:, None]
    items = _work(
        batch.num_items,
        batch.item_first,
        jnp.where(is_query, _ranges(batch).at[:, at].get(mode="clip"), 0)[:, :, None],
        batch.page_table[batch.item_row][:, None],
        page_size,
    )
    return Plan(blocks, items)


def _blocks(
    batch: AttentionBatch,
    table: jax.Array,  # i32[rows, width]: row t is that of token t
    num_single: jax.Array,
    page_size: int,
) -> Work:
    rows, width = table.shape
    count = -(-rows // ROWS_PER_BLOCK)
    missing = count * ROWS_PER_BLOCK - rows
    ranges = jnp.where(jnp.arange(rows) < num_single, _ranges(batch)[:, :rows], 0)
    ranges = jnp.pad(ranges, ((0, 0), (0, missing)))
    table = jnp.pad(table, ((0, missing), (0, 0)))
    return _work(
        (num_single + ROWS_PER_BLOCK - 1) // ROWS_PER_BLOCK,
        jnp.arange(count, dtype=jnp.int32) * ROWS_PER_BLOCK,
        ranges.reshape(2, count, ROWS_PER_BLOCK, 1),
        table.reshape(count, ROWS_PER_BLOCK, width),
        page_size,
    )


def _ranges(batch: AttentionBatch) -> jax.Array:
    """i32[2, tokens]"""
    return jnp.stack([batch.attend_from, batch.attend_to])


def _work(
    count: jax.Array,
    token: jax.Array,  # i32[n]
    ranges: jax.Array,  # i32[2, n, rows, queries]
    table: jax.Array,  # i32[n, rows, width]
    page_size: int,
) -> Work:
    pages = max(1, KEYS_PER_CHUNK // page_size)
    keys = pages * page_size
    start, end = ranges
    lowest = jnp.where(end <= start, jnp.iinfo(jnp.int32).max, start).min((1, 2))
    chunks_end = (end.max((1, 2)) + keys - 1) // keys
    table = jnp.pad(table, ((0, 0), (0, 0), (0, -table.shape[2] % pages)))
    return Work(
        count=count,
        extent=jnp.stack([token, lowest // keys, chunks_end], axis=1),
        ranges=ranges.swapaxes(0, 1),
        table=table.reshape(*table.shape[:2], -1, pages).astype(jnp.uint32),
    )


def paged_attention(
    q: jax.Array,  # [tokens, heads, head_dim]
    k_new: jax.Array,  # [tokens, kv_heads, head_dim]
    v_new: jax.Array | None,  # [tokens, kv_heads, value_dim]
    kv: KVPages,
    batch: AttentionBatch,
    plan: Plan,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,  # f32[heads]
) -> tuple[jax.Array, KVPages]:
    """Same meaning as reference.paged_attention; any table width."""
    kv = write_kv(k_new, v_new, kv, batch)
    tokens, heads, head_dim = q.shape
    kv_heads = kv.k.shape[1]
    value_dim = spec.value_dim if kv.v is None else kv.v.shape[-1]
    # The last piece may run past the end; padding keeps its slice from being shifted back.
    missing = -tokens % ROWS_PER_BLOCK if plan.items is None else QUERIES_PER_ITEM
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    grouped = jnp.pad(grouped, ((0, missing), (0, 0), (0, 0), (0, 0)))
    out = jnp.zeros((*grouped.shape[:3], value_dim), q.dtype)
    out = _attend_work(grouped, out, plan.blocks, kv, spec, sinks)
    if plan.items is not None:
        out = _attend_work(grouped, out, plan.items, kv, spec, sinks)
    return out[:tokens].reshape(tokens, heads, value_dim), kv


def _attend_work(
    q: jax.Array,  # [tokens, kv_heads, group, head_dim], padded
    out: jax.Array,  # [tokens, kv_heads, group, value_dim]
    work: Work,
    kv: KVPages,
    spec: AttentionSpec,
    sinks: jax.Array | None,
) -> jax.Array:
    """out with the results of all pieces in their places."""
    num_pieces, _, rows, queries = work.ranges.shape
    _, kv_heads, group, head_dim = q.shape
    # A product of one row is computed another way, with other roundings, than one of several.
    copies = max(1, 2 // (queries * group))

    def piece(i: jax.Array, out: jax.Array) -> jax.Array:
        def at(x: jax.Array) -> jax.Array:
            return lax.dynamic_index_in_dim(x, i, keepdims=False, allow_negative_indices=False)

        first, *chunks = at(work.extent)
        x = lax.dynamic_slice_in_dim(q, first, rows * queries, allow_negative_indices=False)
        # Queries of a head group share its keys: one product of queries * group rows.
        x = x.reshape(rows, queries, kv_heads, group, head_dim).swapaxes(1, 2)
        x = jnp.repeat(x.reshape(rows, kv_heads, queries * group, head_dim), copies, axis=2)
        result = _attend(x, at(work.ranges), chunks, at(work.table), kv, spec, sinks)
        result = (
            result[:, :, : queries * group]
            .reshape(rows, kv_heads, queries, group, -1)
            .swapaxes(1, 2)
        )
        result = result.reshape(rows * queries, *out.shape[1:]).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(out, result, first, 0, allow_negative_indices=False)

    if num_pieces == 1 and queries == 1:
        # A block of rows that nobody uses gives zeros, where an unused item would overwrite others.
        return piece(jnp.int32(0), out)
    return lax.fori_loop(0, work.count, piece, out)


def _attend(
    q: jax.Array,  # [rows, kv_heads, queries * copies, head_dim]
    ranges: jax.Array,  # i32[2, rows, queries]: attend_from, attend_to, 0 where padded
    chunks: Sequence[jax.Array],  # i32[]: the first that any of these queries sees, the end
    table: jax.Array,  # u32[rows, chunks, pages]
    kv: KVPages,
    spec: AttentionSpec,
    sinks: jax.Array | None,  # f32[heads]
) -> jax.Array:  # f32[rows, kv_heads, queries * copies, value_dim]
    """Online softmax over the chunks."""
    rows, kv_heads, queries, _ = q.shape
    see_from, see_to = ranges[..., None]
    copies = queries // ranges.shape[2]
    keys = table.shape[2] * kv.k.shape[2]
    value_dim = spec.value_dim if kv.v is None else kv.v.shape[-1]
    q = q.astype(jnp.float32) * spec.scale

    def gather(cache: jax.Array, pages: jax.Array) -> jax.Array:
        """f32[rows, kv_heads, keys, dim]"""
        chunk = cache.at[pages].get(mode="promise_in_bounds").swapaxes(1, 2)
        return chunk.reshape(rows, kv_heads, keys, cache.shape[-1]).astype(jnp.float32)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest, total, acc = carry
        pages = lax.dynamic_index_in_dim(table, i, 1, keepdims=False, allow_negative_indices=False)
        position = i * keys + jnp.arange(keys)
        visible = (position >= see_from) & (position < see_to)  # [rows, queries, keys]
        k = gather(kv.k, pages)
        v = k[..., :value_dim] if kv.v is None else gather(kv.v, pages)
        # 0 * NaN is NaN: values that nobody here sees must be gone before the product.
        v = jnp.where(visible.any(1)[:, None, :, None], v, 0.0)
        scores = jnp.einsum("rkqd,rkcd->rkqc", q, k, preferred_element_type=jnp.float32)
        if spec.soft_cap is not None:
            scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        # A barrier, or the maximum and the weights each mask them.
        mask = jnp.repeat(visible, copies, axis=1)[:, None]
        scores = lax.optimization_barrier(jnp.where(mask, scores, _HIDDEN))
        new_highest = jnp.maximum(highest, scores.max(-1))
        weights = jnp.exp(scores - new_highest[..., None])
        shrink = jnp.exp(highest - new_highest)
        total = total * shrink + weights.sum(-1)
        part = jnp.einsum("rkqc,rkcv->rkqv", weights, v, preferred_element_type=jnp.float32)
        return new_highest, total, acc * shrink[..., None] + part

    shape = (rows, kv_heads, queries)
    if sinks is None:
        highest, total = jnp.full(shape, _LOWEST, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        per_head = sinks.astype(jnp.float32).reshape(1, kv_heads, 1, -1)
        repeats = queries // per_head.shape[-1]  # heads of a group are the fastest of `queries`
        highest = jnp.broadcast_to(
            jnp.tile(per_head, (1, 1, repeats, 1)).reshape(1, kv_heads, queries), shape
        )
        total = jnp.ones(shape, jnp.float32)
    acc = jnp.zeros((*shape, value_dim), jnp.float32)
    first, end = chunks
    _, total, acc = lax.fori_loop(first, end, step, (highest, total, acc))
    # At least 1 unless nothing was seen.
    return acc / jnp.maximum(total, _TINY)[..., None]
