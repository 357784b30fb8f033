"""Ragged paged attention in jnp: what runs where no kernel does.

Rows with one query are taken in blocks, the rest as work items of up to 16 queries; both walk their
keys in chunks at fixed positions with an online softmax, so a row's arithmetic does not depend on
its neighbours. Trip counts follow the actual lengths, so one program serves every context.
Gathering keys per token, or one big masked matrix, is 4-20x slower and takes hundreds of MB.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .checks import QUERIES_PER_ITEM, AttentionBatch, AttentionSpec, KVPages
from .reference import write_kv

ROWS_PER_BLOCK = 8
KEYS_PER_CHUNK = 128

# A score that no real one reaches and whose difference to itself is 0, not NaN.
_HIDDEN = -1e30


def paged_attention(
    q: jax.Array,  # [tokens, heads, head_dim]
    k_new: jax.Array,  # [tokens, kv_heads, head_dim]
    v_new: jax.Array | None,  # [tokens, kv_heads, value_dim]
    kv: KVPages,
    batch: AttentionBatch,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,  # f32[heads]
) -> tuple[jax.Array, KVPages]:
    """Same meaning as reference.paged_attention; any table width."""
    kv = write_kv(k_new, v_new, kv, batch)
    tokens, heads, head_dim = q.shape
    kv_heads, page_size = kv.k.shape[1:3]
    group = heads // kv_heads
    value_dim = spec.value_dim if kv.v is None else kv.v.shape[-1]

    pages_per_chunk = max(1, KEYS_PER_CHUNK // page_size)
    missing = -batch.page_table.shape[1] % pages_per_chunk
    table = jnp.pad(batch.page_table, ((0, ROWS_PER_BLOCK), (0, missing)))
    # Slices of a block or an item may run past the end; padding keeps them from being shifted back.
    pad = max(ROWS_PER_BLOCK, QUERIES_PER_ITEM)
    queries = jnp.pad(
        q.reshape(tokens, kv_heads, group, head_dim), ((0, pad), (0, 0), (0, 0), (0, 0))
    )
    attend_from = jnp.pad(batch.attend_from, (0, pad))
    attend_to = jnp.pad(batch.attend_to, (0, pad))
    out = jnp.zeros((tokens + pad, kv_heads, group, value_dim), q.dtype)

    def attend(q, attend_from, attend_to, table):
        return _attend(q, attend_from, attend_to, table, kv, spec, sinks)

    def block(i, out):
        first = i * ROWS_PER_BLOCK
        rows = lax.dynamic_slice_in_dim(
            queries, first, ROWS_PER_BLOCK
        )  # [rows, kv_heads, group, head_dim]
        is_single = first + jnp.arange(ROWS_PER_BLOCK) < batch.num_single
        start = jnp.where(
            is_single, lax.dynamic_slice_in_dim(attend_from, first, ROWS_PER_BLOCK), 0
        )
        end = jnp.where(is_single, lax.dynamic_slice_in_dim(attend_to, first, ROWS_PER_BLOCK), 0)
        pages = lax.dynamic_slice_in_dim(table, first, ROWS_PER_BLOCK)
        # A product of one row is computed another way, with other roundings, than one of several.
        rows = jnp.repeat(rows, max(1, 2 // group), axis=2)
        result = attend(rows, start[:, None], end[:, None], pages)[:, :, :group]
        return lax.dynamic_update_slice_in_dim(out, result.astype(out.dtype), first, 0)

    def item(i, out):
        first, count = batch.item_first[i], batch.item_count[i]
        chunk = lax.dynamic_slice_in_dim(queries, first, QUERIES_PER_ITEM)
        # [queries, kv_heads, group, dim] -> [1, kv_heads, queries * group, dim]: more queries of
        # one row
        folded = chunk.transpose(1, 0, 2, 3).reshape(
            1, kv_heads, QUERIES_PER_ITEM * group, head_dim
        )
        is_query = jnp.arange(QUERIES_PER_ITEM) < count
        start = jnp.where(
            is_query, lax.dynamic_slice_in_dim(attend_from, first, QUERIES_PER_ITEM), 0
        )
        end = jnp.where(is_query, lax.dynamic_slice_in_dim(attend_to, first, QUERIES_PER_ITEM), 0)
        pages = lax.dynamic_slice_in_dim(table, batch.item_row[i], 1)
        result = attend(folded, jnp.repeat(start, group)[None], jnp.repeat(end, group)[None], pages)
        result = result.reshape(kv_heads, QUERIES_PER_ITEM, group, value_dim).transpose(1, 0, 2, 3)
        # The slice reaches into the next item's tokens, which may already be there.
        there = lax.dynamic_slice_in_dim(out, first, QUERIES_PER_ITEM)
        result = jnp.where(is_query[:, None, None, None], result.astype(out.dtype), there)
        return lax.dynamic_update_slice_in_dim(out, result, first, 0)

    out = lax.fori_loop(0, (batch.num_single + ROWS_PER_BLOCK - 1) // ROWS_PER_BLOCK, block, out)
    if batch.item_row.shape[0]:
        out = lax.fori_loop(0, batch.num_items, item, out)
    return out[:tokens].reshape(tokens, heads, value_dim), kv


def _attend(
    q: jax.Array,  # [rows, kv_heads, queries, head_dim]
    attend_from: jax.Array,  # i32[rows, queries or 1], 0 where padded
    attend_to: jax.Array,  # i32[rows, queries or 1], 0 where padded
    table: jax.Array,  # i32[rows, width], width a multiple of a chunk's pages
    kv: KVPages,
    spec: AttentionSpec,
    sinks: jax.Array | None,  # f32[heads]
) -> jax.Array:  # f32[rows, kv_heads, queries, value_dim]
    """Online softmax over the chunks that any of these queries sees."""
    rows, kv_heads, queries, _ = q.shape
    page_size = kv.k.shape[2]
    pages_per_chunk = max(1, KEYS_PER_CHUNK // page_size)
    keys = pages_per_chunk * page_size
    value_dim = spec.value_dim if kv.v is None else kv.v.shape[-1]
    q = q.astype(jnp.float32) * spec.scale

    def gather(cache, pages):  # -> f32[rows, kv_heads, keys, dim]
        chunk = jnp.moveaxis(cache[pages], 2, 1)
        return chunk.reshape(rows, kv_heads, keys, cache.shape[-1]).astype(jnp.float32)

    def step(i, carry):
        highest, total, acc = carry
        pages = lax.dynamic_slice_in_dim(table, i * pages_per_chunk, pages_per_chunk, axis=1)
        position = i * keys + jnp.arange(keys)
        visible = (position >= attend_from[:, :, None]) & (position < attend_to[:, :, None])
        any_visible = visible.any(1)[:, None, :, None]  # [rows, 1, keys, 1]
        k = gather(kv.k, pages)
        v = k[..., :value_dim] if kv.v is None else gather(kv.v, pages)
        # 0 * NaN is NaN: values that nobody here sees must be gone before the product.
        v = jnp.where(any_visible, v, 0.0)
        scores = jnp.einsum("rkqd,rkcd->rkqc", q, k, preferred_element_type=jnp.float32)
        if spec.soft_cap is not None:
            scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        visible = visible[:, None]  # [rows, 1, queries or 1, keys]
        scores = jnp.where(visible, scores, _HIDDEN)
        new_highest = jnp.maximum(highest, scores.max(-1))
        weights = jnp.where(visible, jnp.exp(scores - new_highest[..., None]), 0.0)
        shrink = jnp.exp(highest - new_highest)
        total = total * shrink + weights.sum(-1)
        part = jnp.einsum("rkqc,rkcv->rkqv", weights, v, preferred_element_type=jnp.float32)
        return new_highest, total, acc * shrink[..., None] + part

    shape = (rows, kv_heads, queries)
    if sinks is None:
        highest, total = jnp.full(shape, _HIDDEN, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        per_head = sinks.astype(jnp.float32).reshape(1, kv_heads, 1, -1)
        copies = queries // per_head.shape[-1]  # heads of a group are the fastest axis of `queries`
        highest = jnp.broadcast_to(
            jnp.tile(per_head, (1, 1, copies, 1)).reshape(1, kv_heads, queries), shape
        )
        total = jnp.ones(shape, jnp.float32)
    acc = jnp.zeros((*shape, value_dim), jnp.float32)

    is_empty = attend_to <= attend_from
    first = jnp.where(is_empty, jnp.iinfo(jnp.int32).max, attend_from).min() // keys
    last = (attend_to.max() + keys - 1) // keys
    _, total, acc = lax.fori_loop(first, last, step, (highest, total, acc))
    return acc / jnp.where(total == 0, 1.0, total)[..., None]
