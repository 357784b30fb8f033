"""y = x W^T + b, dispatched on the type of the weight.

Weights are [out, in], as checkpoints store them. A quantization format adds a weight type and one
line to _LINEAR_BY_TYPE.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .context import Context


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseWeight:
    """A matrix held as it is."""

    w: jax.Array  # [out, in]


def linear(x: jax.Array, weight: Any, bias: jax.Array | None, ctx: Context) -> jax.Array:
    """f32[tokens, out] from x [tokens, in]; column-parallel: `out` may be this device's share."""
    y = _LINEAR_BY_TYPE[type(weight)](x, weight)
    return y if bias is None else y + bias.astype(jnp.float32)


def linear_exact(x: jax.Array, weight: Any, bias: jax.Array | None, ctx: Context) -> jax.Array:
    """Like linear, with x kept to twice the bits of a bfloat16 weight's dtype.

    For q, k and v: attention scores turn their rounding into the largest error of a bfloat16 model.
    x goes in as two rows, its rounded value and what rounding left, so the weight is read once.
    """
    dtype = weight_dtype(weight)
    if dtype != jnp.bfloat16:
        return linear(x, weight, bias, ctx)
    high = x.astype(dtype)
    rest = (x - high.astype(jnp.float32)).astype(dtype)
    both = linear(jnp.concatenate([high, rest]), weight, None, ctx)
    y = both[: x.shape[0]] + both[x.shape[0] :]
    return y if bias is None else y + bias.astype(jnp.float32)


def linear_sum(x: jax.Array, weight: Any, bias: jax.Array | None, ctx: Context) -> jax.Array:
    """Like linear, with `in` split over the model axis: one all-reduce, the bias added once after
    it.
    """
    y = _LINEAR_BY_TYPE[type(weight)](x, weight)
    if ctx.model_axis is not None:
        y = lax.psum(y, ctx.model_axis)
    return y if bias is None else y + bias.astype(jnp.float32)


def _dense(x: jax.Array, weight: DenseWeight) -> jax.Array:
    # Accumulates in f32 whatever the weight's dtype.
    return lax.dot_general(
        x.astype(weight.w.dtype),
        weight.w,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def weight_dtype(weight: Any) -> Any:
    """The dtype in which a weight takes its input."""
    return weight.w.dtype


_LINEAR_BY_TYPE: dict[type, Callable[[jax.Array, Any], jax.Array]] = {DenseWeight: _dense}
