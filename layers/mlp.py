"""Feed-forward layers."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .context import Context
from .linear import linear, linear_sum
from .param import Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GatedMlp:
    """The weights of down(silu(gate x) * up x), gate and up fused."""

    gate_up: Leaf  # [2 * mlp, hidden]
    gate_up_bias: Leaf  # [2 * mlp]
    down: Leaf  # [hidden, mlp]
    down_bias: Leaf  # [hidden]


def gated_mlp(x: jax.Array, weights: GatedMlp, ctx: Context) -> jax.Array:
    """SwiGLU (Shazeer 2020, section 2). x: [tokens, hidden] -> f32[tokens, hidden]."""
    both = linear(x, weights.gate_up, weights.gate_up_bias, ctx)
    gate, up = jnp.split(both, 2, axis=-1)
    return linear_sum(jax.nn.silu(gate) * up, weights.down, weights.down_bias, ctx)
