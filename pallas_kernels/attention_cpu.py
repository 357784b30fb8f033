"""Ragged paged attention by the C++ kernel: rotation, the cache's write and attention in one.

A page of K holds its numbers as [head_dim, page_size], although its array has the shape of all
implementations: only this one reads it.
"""

import jax
import jax.numpy as jnp

from ..cpu_kernels import ops
from .checks import AttentionBatch, AttentionSpec, KVPages, LayerPages
from .heads import HeadNorms


def attend(
    qkv: jax.Array,  # [tokens, (heads + kv_heads) * head_dim + kv_heads * value_dim]
    kv: LayerPages,
    batch: AttentionBatch,
    plan: None,
    spec: AttentionSpec,
    tables: tuple[jax.Array, jax.Array] | None,
    norms: HeadNorms | None,
    sinks: jax.Array | None,
) -> tuple[jax.Array, LayerPages]:
    """f32[tokens, heads * value_dim] and the cache."""
    kv_heads, _, head_dim = kv.k.shape[-3:]
    value_dim = spec.value_dim if kv.v is None else kv.v.shape[-1]
    assert value_dim is not None
    if norms is not None and norms.q.dtype == jnp.float16:  # which the kernel does not read
        norms = HeadNorms(*(weight.astype(jnp.float32) for weight in norms))
    new_values = 0 if kv.v is None else kv_heads * value_dim
    out, k, v = ops.attention(
        qkv.astype(jnp.float32),
        kv.k,
        kv.v,
        kv.layer,
        (
            batch.attend_from, batch.attend_to, batch.token_row, batch.write_page,
            batch.write_offset, batch.page_table, batch.num_single, batch.num_items,
            batch.item_row, batch.item_first, batch.item_count,
        ),
        heads=(qkv.shape[1] - new_values) // head_dim - kv_heads,
        value_dim=value_dim,
        scale=spec.scale,
        soft_cap=spec.soft_cap,
        sinks=None if sinks is None else sinks.astype(jnp.float32),
        tables=tables,
        norms=norms,
        epsilon=spec.norm_epsilon,
    )  # fmt: skip
    return out, LayerPages(k, v, kv.layer)


def paged_attention(
    q: jax.Array,  # [tokens, heads, head_dim]
    k_new: jax.Array,  # [tokens, kv_heads, head_dim]
    v_new: jax.Array | None,  # [tokens, kv_heads, value_dim]
    kv: KVPages,
    batch: AttentionBatch,
    plan: None,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,  # f32[heads]
) -> tuple[jax.Array, KVPages]:
    """Same meaning as reference.paged_attention."""
    tokens, heads, _ = q.shape
    parts = [q, k_new] if v_new is None else [q, k_new, v_new]
    qkv = jnp.concatenate([p.reshape(tokens, -1).astype(jnp.float32) for p in parts], axis=1)
    k, v = (None if pages is None else pages[None] for pages in kv)
    stack = LayerPages(k, v, jnp.int32(0))
    out, stack = attend(qkv, stack, batch, plan, spec, None, None, sinks)
    made = KVPages(*(None if pages is None else pages[0] for pages in (stack.k, stack.v)))
    return out.reshape(tokens, heads, -1).astype(q.dtype), made
