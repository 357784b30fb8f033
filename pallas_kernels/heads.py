"""From a row of q, k and v to the heads that attention reads: norms of each head, rotation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .norm import rms_norm


class HeadNorms(NamedTuple):
    """Weights of the norms of each head, [head_dim]."""

    q: jax.Array
    k: jax.Array


class Heads(NamedTuple):
    q: jax.Array  # [tokens, heads, head_dim]
    k: jax.Array  # [tokens, kv_heads, head_dim]
    v: jax.Array  # [tokens, kv_heads, value_dim]


def split_heads(
    qkv: jax.Array,  # [tokens, (heads + 2 * kv_heads) * head_dim]
    kv_heads: int,
    head_dim: int,
    tables: tuple[jax.Array, jax.Array] | None,  # of rotate; None: no rotation
    norms: HeadNorms | None,
    epsilon: float,
) -> Heads:
    """q, k and v, the first two normed and rotated."""
    tokens = qkv.shape[0]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    # q and k are normed and rotated as one array: half the instructions.
    qk, v = jnp.split(qkv.reshape(tokens, -1, head_dim), [heads + kv_heads], axis=1)
    if norms is not None:
        per_head = [
            jnp.broadcast_to(norms.q, (heads, head_dim)),
            jnp.broadcast_to(norms.k, (kv_heads, head_dim)),
        ]
        qk = rms_norm(qk, jnp.concatenate(per_head), epsilon)
    if tables is not None:
        qk = rotate(qk, tables)
    q, k = jnp.split(qk, [heads], axis=1)
    return Heads(q, k, v)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each head by its position (RoFormer eq. 34; half-split layout as in Llama), in f32.

    x: [tokens, heads, head_dim]; tables: cos and sin, f32[tokens, head_dim] each, the first half of
    the sines negative. bfloat16 cannot tell position 256 from 257.
    """
    cos, sin = (t[:, None, :] for t in tables)
    x = x.astype(jnp.float32)
    return x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin
