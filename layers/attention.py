"""Self-attention over pages: projections, optional head norms, rope, the op."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..pallas_kernels.checks import AttentionSpec, KVPages, PlannedBatch
from .context import Context
from .linear import linear_exact, linear_sum
from .norm import rms_norm
from .param import Leaf
from .rope import rotate


@dataclass(frozen=True)
class HeadShape:
    """Static facts of an attention layer."""

    head_dim: int
    epsilon: float  # of the head norms
    spec: AttentionSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Attention:
    """The weights of one attention layer; q, k and v fused."""

    qkv: Leaf  # [(heads + 2 * kv_heads) * head_dim, hidden]
    qkv_bias: Leaf
    out: Leaf  # [hidden, heads * head_dim]
    out_bias: Leaf  # [hidden]
    q_norm: Leaf  # [head_dim]
    k_norm: Leaf  # [head_dim]


def attention(
    x: jax.Array,  # [tokens, hidden]
    weights: Attention,
    kv: KVPages,
    step: PlannedBatch,
    tables: tuple[jax.Array, jax.Array],  # cos, sin
    shape: HeadShape,
    ctx: Context,
) -> tuple[jax.Array, KVPages]:
    """f32[tokens, hidden] and the cache with this step's keys and values."""
    tokens, dim = x.shape[0], shape.head_dim
    qkv = linear_exact(x, weights.qkv, weights.qkv_bias, ctx)
    kv_heads = kv.k.shape[1]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    # q and k are normed and rotated as one array: half the instructions.
    qk, v = jnp.split(qkv.reshape(tokens, -1, dim), [heads + kv_heads], axis=1)
    if weights.q_norm is not None and weights.k_norm is not None:
        per_head = [jnp.broadcast_to(weights.q_norm, (heads, dim)),
                    jnp.broadcast_to(weights.k_norm, (kv_heads, dim))]  # fmt: skip
        qk = rms_norm(qk, jnp.concatenate(per_head), shape.epsilon)
    q, k = jnp.split(rotate(qk, tables), [heads], axis=1)
    out, kv = ctx.ops.paged_attention(q, k, v, kv, step, shape.spec)
    return linear_sum(out.reshape(tokens, heads * dim), weights.out, weights.out_bias, ctx), kv
