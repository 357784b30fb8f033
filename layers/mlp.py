"""Feed-forward layers."""

from dataclasses import dataclass

import jax

from .context import Context
from .linear import Norm
from .param import Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GatedMlp:
    """The weights of down(silu(gate x) * up x), gate and up fused."""

    gate_up: Leaf  # [2 * mlp, hidden]
    gate_up_bias: Leaf  # [2 * mlp]
    down: Leaf  # [hidden, mlp]
    down_bias: Leaf  # [hidden]


def gated_mlp(
    x: jax.Array, norm: Norm, weights: GatedMlp, count: jax.Array, ctx: Context
) -> jax.Array:
    """x + SwiGLU(norm(x)) (Shazeer 2020, section 2). x: f32[tokens, hidden]; count: i32[], rows
    that are not padding.
    """
    w = weights
    made: jax.Array = w.gate_up.gated_mlp(
        x, w.gate_up_bias, norm, w.down, w.down_bias, count, ctx.model_axis
    )
    return made
