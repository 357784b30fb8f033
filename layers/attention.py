"""Self-attention over pages: the projection of its inputs, and the op."""

from dataclasses import dataclass

import jax

from ..pallas_kernels.checks import AttentionSpec, Pages, PlannedBatch
from ..pallas_kernels.heads import HeadNorms
from .context import Context
from .linear import Norm
from .param import Leaf


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
    x: jax.Array,  # f32[tokens, hidden]
    norm: Norm,
    weights: Attention,
    kv: Pages,
    step: PlannedBatch,
    tables: tuple[jax.Array, jax.Array],  # cos, sin
    spec: AttentionSpec,
    ctx: Context,
) -> tuple[jax.Array, Pages]:
    """f32[tokens, heads * head_dim], what each head read for norm(x), and the cache with this
    step's keys and values.
    """
    # Scores turn the rounding of q and k into the largest error of a bfloat16 model.
    qkv = weights.qkv.exact_product(x, weights.qkv_bias, norm, step.batch.num_tokens)
    norms = None if weights.q_norm is None else HeadNorms(weights.q_norm, weights.k_norm)
    return ctx.ops.attend(qkv, kv, step, spec, tables, norms)
