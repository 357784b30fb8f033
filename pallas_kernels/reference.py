"""What each op means, in plain jnp and float32: the oracle of the tests and the last fallback.

Written to be read, not to be run on long contexts: every query gathers its row's whole table.
"""

import jax
import jax.numpy as jnp

from .checks import AttentionBatch, AttentionSpec, KVPages, LinearSpec


def write_kv(
    k_new: jax.Array,  # [tokens, kv_heads, head_dim]
    v_new: jax.Array | None,  # [tokens, kv_heads, value_dim]
    kv: KVPages,
    batch: AttentionBatch,
) -> KVPages:
    """The cache with each token's k and v in its page; padded tokens carry page index `pages` and
    are dropped.

    One in-place scatter when the cache is donated.
    """
    at = (batch.write_page, slice(None), batch.write_offset)
    k = kv.k.at[at].set(fit(k_new, kv.k.dtype), mode="drop")
    if kv.v is None or v_new is None:
        return KVPages(k, None)
    return KVPages(k, kv.v.at[at].set(fit(v_new, kv.v.dtype), mode="drop"))


def fit(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x in the cache's dtype; float16 saturates, since infinity would become NaN in the softmax."""
    if dtype == jnp.float16:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)


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
    """Write the new keys and values, then softmax(scale * q k^T) v over each query's key range.

    A query that sees no key gives zeros. A sink is one more score per head that takes probability
    and adds nothing. Keys and values outside the range are selected away before any arithmetic: NaN
    there stays there. Returns out [tokens, heads, value_dim] in q's dtype, and the cache.
    """
    kv = write_kv(k_new, v_new, kv, batch)
    tokens, heads, _ = q.shape
    _, kv_heads, page_size, _ = kv.k.shape
    width = batch.page_table.shape[1]
    pages = batch.page_table[batch.token_row]  # [tokens, width]

    def rows_of(cache: jax.Array) -> jax.Array:  # -> f32[tokens, kv_heads, keys, dim]
        gathered = jnp.moveaxis(cache[pages], 2, 1)  # [tokens, kv_heads, width, page_size, dim]
        return gathered.reshape(tokens, kv_heads, width * page_size, -1).astype(jnp.float32)

    k = rows_of(kv.k)
    v = k[..., : spec.value_dim] if kv.v is None else rows_of(kv.v)
    position = jnp.arange(width * page_size)
    visible = (position >= batch.attend_from[:, None]) & (position < batch.attend_to[:, None])

    grouped = q.astype(jnp.float32).reshape(tokens, kv_heads, heads // kv_heads, -1)
    scores = jnp.einsum("tkgd,tkcd->tkgc", grouped, k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    highest = scores.max(-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(kv_heads, heads // kv_heads, 1)
        highest = jnp.maximum(highest, sink)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - highest)
    v = jnp.where(visible[:, None, :, None], v, 0.0)
    out = jnp.einsum("tkgc,tkcv->tkgv", weights, v) / jnp.where(total == 0, 1.0, total)
    return out.reshape(tokens, heads, -1).astype(q.dtype), kv


def linear(
    x: jax.Array,  # [tokens, in]; exact: [2 * tokens, in], high parts first
    w: jax.Array,  # [out, in], in x's dtype
    bias: jax.Array | None,  # [out]
    residual: jax.Array | None,  # f32[tokens, out]
    spec: LinearSpec,
) -> jax.Array:
    """f32[tokens, out]: residual + x W^T + bias; gated: [tokens, out / 2] in W's dtype, silu of the
    first half times the second (Shazeer 2020, section 2).
    """
    y = x.astype(jnp.float32) @ w.astype(jnp.float32).T
    if spec.is_exact:
        high, rest = jnp.split(y, 2)
        y = high + rest
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if spec.is_gated:
        gate, up = jnp.split(y, 2, axis=-1)
        return (jax.nn.silu(gate) * up).astype(w.dtype)
    return y if residual is None else residual + y
